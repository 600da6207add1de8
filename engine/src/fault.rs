//! Bugs that the simulation plants on purpose, to prove that it finds them.
//!
//! Outside of this crate's own unit tests every hook is the constant `false`.

/// One bug, named by what goes wrong.
#[cfg_attr(not(test), allow(dead_code, reason = "only the simulation plants faults"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A page's hash covers its own tokens and the root only, not the pages between.
    HashIgnoresParent,
    /// Pages are shared between namespaces.
    NamespaceIgnored,
    /// A page that is handed out anew keeps its old place in the prefix index.
    StaleHash,
    /// Stamps of a page that is handed out anew stay valid.
    StaleStamp,
    /// A cancelled sequence keeps one page for ever.
    LeakOnCancel,
    /// Sharing a page does not count the new owner.
    ShareNotCounted,
    /// A sequence writes into a page that others read.
    NoCopyOnWrite,
    /// A whole prompt comes from the cache and no row is left to compute.
    NothingLeftToCompute,
    /// A preempted sequence forgets which of its tokens were computed last.
    PreemptionSkipsToken,
    /// A preempted sequence goes to the end of the queue.
    PreemptedGoesLast,
    /// A page counts as full one token too early.
    PageFullTooEarly,
    /// The sequence that needs a page is preempted instead of the latest.
    PreemptsTheNeedy,
    /// Rewinding a session keeps the pages of what was cut off.
    RewindKeepsPages,
    /// A grammar goes on as if some tokens had not been there.
    GrammarMissesToken,
}

#[cfg(test)]
impl Fault {
    pub(crate) const ALL: [Fault; 14] = [
        Fault::HashIgnoresParent,
        Fault::NamespaceIgnored,
        Fault::StaleHash,
        Fault::StaleStamp,
        Fault::LeakOnCancel,
        Fault::ShareNotCounted,
        Fault::NoCopyOnWrite,
        Fault::NothingLeftToCompute,
        Fault::PreemptionSkipsToken,
        Fault::PreemptedGoesLast,
        Fault::PageFullTooEarly,
        Fault::PreemptsTheNeedy,
        Fault::RewindKeepsPages,
        Fault::GrammarMissesToken,
    ];
}

#[cfg(test)]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Fault>> = const { std::cell::Cell::new(None) };
}

/// Plants a fault in this thread, or none.
#[cfg(test)]
pub(crate) fn plant(fault: Option<Fault>) {
    PLANTED.set(fault);
}

/// Whether the simulation planted `fault` in this thread.
#[inline]
pub(crate) fn is_planted(fault: Fault) -> bool {
    #[cfg(test)]
    {
        PLANTED.get() == Some(fault)
    }
    #[cfg(not(test))]
    {
        let _ = fault;
        false
    }
}
