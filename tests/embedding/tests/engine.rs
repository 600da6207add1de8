//! The engine over this crate's kernels: against another program's tokens, and in every way in
//! which a program may ask for an answer.

use std::future::Future;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::task::{Context, Poll, Wake};
use std::thread::{self, Thread};

use bespoke::binding::Binding;
use bespoke::config::EngineOptions;
use bespoke::engine::Engine;
use bespoke::handle::{EngineHandle, Event, HandleLimits, Submission};
use bespoke::kernel_gen::spec::{ActivationType, KvDType};
use bespoke::request::Request;
use bespoke_embedding::model;
use safetensors::SafeTensors;

fn model_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/tiny/llama-awq-g32")
}

/// An engine that computes in float32 throughout, as the other program did.
fn engine() -> Engine {
    let options = EngineOptions {
        kv_dtype: KvDType::F32,
        activation: ActivationType::Float,
        max_context: Some(128),
        num_threads: Some(2),
        ..model::Kernels::options()
    };
    let engine = Engine::load(&model_dir(), &options, &mut |_| {}).unwrap();
    assert_eq!(engine.backend_name(), "cpu");
    engine
}

/// A prompt of 33 tokens, and what greedy decoding appends to it.
fn expected() -> (Vec<u32>, Vec<u32>) {
    let bytes = std::fs::read(model_dir().join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| {
        let bytes = file.tensor(name).unwrap().data().chunks_exact(4);
        bytes.map(|bytes| u32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    (ids("input_ids.2"), ids("greedy.2"))
}

fn request(max_tokens: usize) -> Request {
    Request { prompt_ids: expected().0, max_tokens, ignore_eos: true, ..Request::default() }
}

fn accepted<T>(submission: Submission<T>) -> T {
    match submission {
        Submission::Accepted(value) => value,
        _ => panic!("an idle engine takes a request"),
    }
}

fn start() -> EngineHandle {
    EngineHandle::start(|| Ok(engine()), HandleLimits::default()).unwrap()
}

#[test]
fn the_constants_are_those_of_the_config() {
    let shape = model::Kernels::shape();
    assert_eq!(model::NAME, "llama-awq-g32");
    assert_eq!((model::NUM_LAYERS, model::INTERMEDIATE_SIZE), (2, 384));
    assert_eq!((model::HIDDEN_SIZE, model::VOCAB_SIZE), (shape.hidden_size, shape.vocab_size));
    assert_eq!(model::PAGE_SIZE, model::Kernels::kernels().page_size);
    assert_eq!(shape, *engine().shape());
}

#[test]
fn a_callback_sees_every_token_and_may_break_off() {
    let (mut engine, mut tokens) = (engine(), Vec::new());
    let generation = engine.generate(request(16), &mut |output| {
        tokens.extend(output.token);
        ControlFlow::Continue(())
    });
    assert_eq!(tokens, expected().1);
    assert_eq!(generation.unwrap().output_ids, tokens);
    let first = engine.generate(request(16), &mut |_| ControlFlow::Break(())).unwrap();
    assert_eq!(first.output_ids, tokens[..1]);
}

#[test]
fn a_blocking_stream_ends_with_its_last_event() {
    let handle = start();
    let events: Vec<Event> = accepted(handle.submit(request(16)).unwrap()).collect();
    let tokens = events.iter().filter_map(|event| match event {
        Event::Output(output) => output.token,
        _ => None,
    });
    assert_eq!(tokens.collect::<Vec<_>>(), expected().1);
    assert_eq!(events.last(), Some(&Event::Finished));
}

#[test]
fn a_sink_takes_events_on_the_engines_thread() {
    let handle = start();
    let (sender, receiver) = channel();
    let sink = Box::new(move |event| drop(sender.send(event)));
    accepted(handle.submit_with(request(16), sink).unwrap());
    assert_eq!(receiver.into_iter().last(), Some(Event::Finished));
}

#[test]
fn a_cancelled_request_says_so() {
    let handle = start();
    let mut stream = accepted(handle.submit(request(90)).unwrap());
    stream.cancellation().cancel();
    assert_eq!(stream.by_ref().last(), Some(Event::Cancelled));
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Unpark>) {
        self.0.unpark();
    }
}

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

#[test]
fn a_task_awaits_events() {
    let handle = start();
    let mut stream = accepted(handle.submit_async(request(16)).unwrap());
    let tokens = block_on(async {
        let mut tokens = Vec::new();
        while let Some(event) = stream.next().await {
            match event {
                Event::Output(output) => tokens.extend(output.token),
                last => assert_eq!(last, Event::Finished),
            }
        }
        tokens
    });
    assert_eq!(tokens, expected().1);
}
