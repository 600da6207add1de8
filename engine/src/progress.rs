//! How far a long operation has come, for whoever wants to show it.

/// What `done` and `total` of a [`Progress`] count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Bytes,
    Tensors,
    Layers,
    /// Chunks of a text.
    Chunks,
    /// Parts of the whole that take about the same time: only their share means something.
    Share,
}

/// One report of a long operation. A new `stage` starts a new count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is being done, such as `converting weights`.
    pub stage: &'static str,
    /// Never above `total` where the total is known.
    pub done: u64,
    /// 0 while nobody knows how much there is.
    pub total: u64,
    pub unit: Unit,
}

/// Whoever is told. A closure that ignores its argument is a fine one.
pub type Report<'a> = &'a mut dyn FnMut(Progress);
