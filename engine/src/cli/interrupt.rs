//! Ctrl-C in commands that do not just end at it.
//!
//! Builds without the server and the chat have no runtime to wait for signals with: there Ctrl-C
//! ends every command at once.

#[cfg(feature = "make")]
use std::sync::Arc;
#[cfg(feature = "make")]
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(any(feature = "chat", feature = "server"))]
pub(super) use listener::Listener;

/// Exit code of a program that SIGINT has ended, as shells tell it.
#[cfg(any(feature = "chat", feature = "server"))]
pub(super) const INTERRUPTED: i32 = 130;

/// Whether a command shall come to its end: the first Ctrl-C asks for it, the second does not wait.
#[cfg(feature = "make")]
pub(super) struct Stop {
    is_asked: Arc<AtomicBool>,
    #[cfg(any(feature = "chat", feature = "server"))]
    _listener: Listener,
}

#[cfg(feature = "make")]
impl Stop {
    /// Listens until it is dropped. The first Ctrl-C is answered with `message`.
    #[cfg(any(feature = "chat", feature = "server"))]
    pub(super) fn listen(message: &'static str) -> anyhow::Result<Stop> {
        use std::io::Write as _;
        let is_asked = Arc::new(AtomicBool::new(false));
        let of_listener = Arc::clone(&is_asked);
        let listener = Listener::new(move || {
            if of_listener.swap(true, Ordering::SeqCst) {
                std::process::exit(INTERRUPTED);
            }
            // NOTE: nobody could be told that it cannot be written.
            let _ = writeln!(std::io::stderr(), "{message}");
        })?;
        Ok(Stop { is_asked, _listener: listener })
    }

    /// Nobody listens.
    #[cfg(not(any(feature = "chat", feature = "server")))]
    pub(super) fn listen(_message: &'static str) -> anyhow::Result<Stop> {
        Ok(Stop { is_asked: Arc::new(AtomicBool::new(false)) })
    }

    pub(super) fn is_asked(&self) -> bool {
        self.is_asked.load(Ordering::SeqCst)
    }
}

#[cfg(any(feature = "chat", feature = "server"))]
mod listener {
    use std::io;
    use std::pin::pin;
    use std::sync::Arc;
    use std::thread::{self, JoinHandle};

    use anyhow::Context as _;
    use futures_util::future::{Either, select};
    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::Notify;

    /// Waits for SIGINT on a thread of its own, until it is dropped.
    pub(in crate::cli) struct Listener {
        end: Arc<Notify>,
        thread: Option<JoinHandle<()>>,
    }

    impl Listener {
        /// Calls `take` at every Ctrl-C; from now on none ends the program by itself.
        pub(in crate::cli) fn new(take: impl FnMut() + Send + 'static) -> anyhow::Result<Listener> {
            let cannot = "cannot listen for Ctrl-C";
            let runtime = Builder::new_current_thread().enable_io().build().context(cannot)?;
            let end = Arc::new(Notify::new());
            let end_of_thread = Arc::clone(&end);
            let signals = signals(&runtime).context(cannot)?;
            let thread = thread::Builder::new().name("interrupts".to_owned()).spawn(move || {
                runtime.block_on(serve(signals, take, &end_of_thread));
            });
            Ok(Listener { end, thread: Some(thread.context(cannot)?) })
        }
    }

    impl Drop for Listener {
        fn drop(&mut self) {
            self.end.notify_one();
            if let Some(thread) = self.thread.take() {
                // NOTE: the thread has nothing to say.
                drop(thread.join());
            }
        }
    }

    #[cfg(unix)]
    type Signals = tokio::signal::unix::Signal;
    #[cfg(windows)]
    type Signals = tokio::signal::windows::CtrlC;

    fn signals(runtime: &Runtime) -> io::Result<Signals> {
        let _context = runtime.enter();
        #[cfg(unix)]
        let signals = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt());
        #[cfg(windows)]
        let signals = tokio::signal::windows::ctrl_c();
        signals
    }

    async fn serve(mut signals: Signals, mut take: impl FnMut(), end: &Notify) {
        let mut end = pin!(end.notified());
        while let Either::Left((Some(()), _)) = select(pin!(signals.recv()), &mut end).await {
            take();
        }
    }
}
