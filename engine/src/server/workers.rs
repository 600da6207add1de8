//! Threads for work that would hold up the sockets: tokenizing, templates, grammars.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::sync::oneshot;

use super::error::ApiError;
use super::metrics::{Metrics, WorkerFailure};
use crate::error::Error;

/// What a task does; its failures are counted by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    Tokenize,
    Template,
    Grammar,
}

/// A few threads with a bounded queue. They end with the last clone.
#[derive(Clone)]
pub struct Workers {
    pool: Arc<Pool>,
    metrics: Metrics,
    time: Duration,
}

struct Pool {
    queue: Arc<Queue>,
}

struct Queue {
    tasks: Mutex<Tasks>,
    ready: Condvar,
    tasks_max: usize,
}

#[derive(Default)]
struct Tasks {
    waiting: VecDeque<Task>,
    is_over: bool,
}

type Task = Box<dyn FnOnce() + Send>;

/// Templates and grammars recurse.
const STACK_BYTES: usize = 8 << 20;

impl Workers {
    /// `time` is how long a task may take, waiting included.
    pub fn new(
        num_threads: usize,
        tasks_max: usize,
        time: Duration,
        metrics: Metrics,
    ) -> Result<Workers, Error> {
        let queue = Arc::new(Queue { tasks: Mutex::default(), ready: Condvar::new(), tasks_max });
        let pool = Arc::new(Pool { queue: Arc::clone(&queue) });
        for idx in 0..num_threads {
            let queue = Arc::clone(&queue);
            thread::Builder::new()
                .name(format!("worker-{idx}"))
                .stack_size(STACK_BYTES)
                .spawn(move || queue.serve())
                .map_err(|error| Error::Resources(format!("no thread for a worker: {error}")))?;
        }
        Ok(Workers { pool, metrics, time })
    }

    /// Runs `task` on a thread of the pool. A panic is the answer 500, a queue that is full 429, a
    /// task that takes too long 503; its thread goes on to the end of it, so that tasks must be
    /// bounded themselves.
    pub async fn run<T: Send + 'static>(
        &self,
        work: Work,
        task: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let (sender, receiver) = oneshot::channel();
        let task: Task = Box::new(move || {
            // Whoever went away needs no result.
            if !sender.is_closed() {
                let result = catch_unwind(AssertUnwindSafe(task));
                drop(sender.send(result.map_err(|_| ())));
            }
        });
        if !self.pool.queue.push(task) {
            self.metrics.worker_failed(work, WorkerFailure::Full);
            return Err(ApiError::overloaded(Duration::from_secs(1)));
        }
        match tokio::time::timeout(self.time, receiver).await {
            Ok(Ok(Ok(result))) => result.inspect_err(|_| {
                self.metrics.worker_failed(work, WorkerFailure::Refused);
            }),
            Ok(Ok(Err(())) | Err(_)) => {
                self.metrics.worker_failed(work, WorkerFailure::Panic);
                Err(ApiError::internal())
            }
            Err(_) => {
                self.metrics.worker_failed(work, WorkerFailure::Timeout);
                let message = "the text of the request took too long to prepare; try again later";
                Err(ApiError::unavailable("worker_timeout", message))
            }
        }
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Tasks> {
        // NOTE: nothing panics while it holds the lock, so a poisoned one is whole too.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False where the queue is full.
    fn push(&self, task: Task) -> bool {
        let mut tasks = self.lock();
        if tasks.waiting.len() >= self.tasks_max {
            return false;
        }
        tasks.waiting.push_back(task);
        self.ready.notify_one();
        true
    }

    fn serve(&self) {
        let mut tasks = self.lock();
        loop {
            if let Some(task) = tasks.waiting.pop_front() {
                drop(tasks);
                task();
                tasks = self.lock();
            } else if tasks.is_over {
                return;
            } else {
                tasks = self.ready.wait(tasks).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.queue.lock().is_over = true;
        self.queue.ready.notify_all();
    }
}
