//! Several requests at once on an engine with a thread of its own: a blocking stream, a callback, a
//! task, and one that is called off.
//!
//! ```sh
//! BESPOKE_MODEL=path/to/model cargo run --release --example streams -- path/to/model
//! ```

#![allow(clippy::print_stdout, reason = "a program for people")]

use std::error::Error;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};
use std::time::Duration;

use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::handle::{AsyncRequestStream, EngineHandle, Event, HandleLimits, Submission};
use bespoke::kernels::generated;
use bespoke::request::Request;
use bespoke::tokenizer::{SpecialTokens, Tokenizer};

fn main() -> Result<(), Box<dyn Error>> {
    let dir = std::env::args().nth(1).map(PathBuf::from).ok_or("usage: streams MODEL_DIR")?;
    let tokenizer = Arc::new(Tokenizer::load(&dir)?);
    let of_engine = Arc::clone(&tokenizer);
    let load = move || {
        let options = EngineOptions::new(generated::table());
        let mut engine = Engine::load(&dir, &options, &mut |_| {})?;
        engine.set_tokenizer(of_engine);
        Ok(engine)
    };
    let engine = EngineHandle::start(load, HandleLimits::default())?;
    let request = |prompt: &str, max_tokens| {
        let prompt_ids = tokenizer.encode(prompt, SpecialTokens::Add)?;
        Ok::<_, bespoke::Error>(Request { prompt_ids, max_tokens, ..Request::default() })
    };

    // All four run in the same steps.
    let blocking = accepted(engine.submit(request("The sun", 24)?)?)?;
    let (sender, receiver) = channel();
    let sink = Box::new(move |event| {
        // The engine waits for this: it hands over, and nothing else.
        let _ = sender.send(event);
    });
    accepted(engine.submit_with(request("The moon", 24)?, sink)?)?;
    let task = accepted(engine.submit_async(request("The stars", 24)?)?)?;
    let mut endless = accepted(engine.submit(request("One two three", 2000)?)?)?;

    println!("blocking: {}", text(&tokenizer, blocking)?);
    println!("callback: {}", text(&tokenizer, receiver)?);
    println!("task: {}", text(&tokenizer, block_on(collect(task)))?);
    endless.cancellation().cancel();
    let last = endless.by_ref().last();
    println!("called off: {last:?}");
    engine.drain(Duration::from_secs(1));
    Ok(())
}

fn accepted<T>(submission: Submission<T>) -> Result<T, Box<dyn Error>> {
    match submission {
        Submission::Accepted(value) => Ok(value),
        Submission::Overloaded { num_waiting, .. } => {
            Err(format!("{num_waiting} requests wait already; ask again later").into())
        }
        Submission::Draining => Err("the engine is about to end".into()),
    }
}

/// The text of a whole answer.
fn text(
    tokenizer: &Tokenizer,
    events: impl IntoIterator<Item = Event>,
) -> Result<String, Box<dyn Error>> {
    let mut ids = Vec::new();
    for event in events {
        match event {
            Event::Output(output) => ids.extend(output.token),
            Event::Finished => return Ok(tokenizer.decode(&ids)?),
            last => return Err(format!("no answer: {last:?}").into()),
        }
    }
    Err("the last event is missing".into())
}

/// In a program with an executor, this is a task of it. The stream is a `futures_core::Stream` too.
async fn collect(mut stream: AsyncRequestStream) -> Vec<Event> {
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    events
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Unpark>) {
        self.0.unpark();
    }
}

/// The smallest executor.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}
