//! Sessions: what continues them, what is refused, and that they survive a restart.

use std::ops::ControlFlow;
use std::path::Path;

use bespoke::Error;
use bespoke::config::{BackendChoice, EngineOptions};
use bespoke::engine::Engine;
use bespoke::kv_cache::Namespace;
use bespoke::request::{Generation, Request, RequestOutput};
use bespoke::session::{SessionId, SessionTurn};
use bespoke_kernel_gen::spec::{ActivationType, KvDType};

use crate::golden::golden_dir;

fn options() -> EngineOptions {
    EngineOptions {
        backend: BackendChoice::Cpu,
        kv_dtype: KvDType::I8,
        activation: ActivationType::Float,
        num_threads: Some(1),
        max_context: Some(256),
        num_pages: Some(16),
        max_sessions: 3,
        ..EngineOptions::new(bespoke_tests::tiny_kernels())
    }
}

fn load(case: &str, options: &EngineOptions) -> Engine {
    Engine::load(&golden_dir().join("tiny").join(case), options, &mut |_| {}).unwrap()
}

fn id(name: &str) -> SessionId {
    SessionId::new(Namespace(0), name).unwrap()
}

fn turn(name: &str, start: bool) -> SessionTurn {
    SessionTurn { start, ..SessionTurn::of(id(name)) }
}

fn request(len: usize, max_tokens: usize, session: SessionTurn) -> Request {
    Request {
        prompt_ids: (0..len as u32).map(|i| (i * 37 + len as u32) % 512).collect(),
        max_tokens,
        ignore_eos: true,
        session: Some(session),
        ..Request::default()
    }
}

/// What a request gives, and how many tokens of its prompt were found in the cache.
fn run(engine: &mut Engine, request: Request) -> (Generation, usize) {
    let mut num_cached = 0;
    let mut note = |output: &RequestOutput| {
        num_cached = output.num_cached;
        ControlFlow::Continue(())
    };
    (engine.generate(request, &mut note).unwrap(), num_cached)
}

#[track_caller]
fn assert_refused<T>(result: Result<T, Error>, words: &str) {
    let Err(Error::Request(message)) = result else { panic!("not refused") };
    assert!(message.contains(words), "{message}");
}

#[test]
fn a_turn_goes_on_from_all_that_was_said() {
    let mut engine = load("llama-gqa2", &options());
    let (first, num_cached) = run(&mut engine, request(40, 10, turn("a", true)));
    assert_eq!(num_cached, 0);
    let mut history = request(40, 10, turn("a", true)).prompt_ids;
    history.extend(&first.output_ids);
    assert_eq!(engine.session_tokens(&id("a")).unwrap(), history);
    let (second, num_cached) = run(&mut engine, request(5, 3, turn("a", false)));
    assert_eq!(num_cached, 49, "all but the last token, which was never computed");
    assert_eq!(second.output_ids.len(), 3);
    assert_eq!(engine.session_tokens(&id("a")).unwrap().len(), 58);
    // From the middle of a page: what was written behind it stays, in a copy of the page.
    let (again, num_cached) =
        run(&mut engine, request(5, 3, SessionTurn { step: Some(50), ..turn("a", false) }));
    assert_eq!((again, num_cached), (second, 50));
    let (_, num_cached) =
        run(&mut engine, request(5, 3, SessionTurn { end: true, ..turn("a", false) }));
    assert_eq!(num_cached, 57);
    assert_refused(engine.session_tokens(&id("a")), "no session a");
    engine.check().unwrap();
}

#[test]
fn sessions_refuse_what_cannot_be() {
    let mut engine = load("llama-gqa2", &options());
    assert_refused(engine.add_request(request(5, 5, turn("a", false))), "no session a");
    run(&mut engine, request(5, 5, turn("a", true)));
    let step = SessionTurn { step: Some(11), ..turn("a", false) };
    assert_refused(engine.add_request(request(5, 5, step)), "10 tokens, it cannot be cut to 11");
    let many = Request { num_choices: 2, ..request(5, 5, turn("a", false)) };
    assert_refused(engine.add_request(many), "1 to 1");
    let foreign = Request { namespace: Namespace(7), ..request(5, 5, turn("a", false)) };
    assert_refused(engine.add_request(foreign), "namespace");
    assert_refused(engine.add_request(request(250, 5, turn("a", false))), "history of 10");

    let running = engine.add_request(request(5, 50, turn("a", false))).unwrap();
    let mut outputs = Vec::new();
    engine.step(&mut outputs).unwrap();
    for result in [
        engine.add_request(request(5, 5, turn("a", false))).map(drop),
        engine.add_request(request(5, 5, turn("a", true))).map(drop),
        engine.rewind_session(&id("a"), 0),
        engine.branch_session(&id("a"), &id("b"), None),
        engine.save_session(&id("a"), Path::new("never")),
    ] {
        let Err(Error::Busy(message)) = result else { panic!("{result:?}") };
        assert!(message.contains("session a has a request running"), "{message}");
    }
    assert!(engine.stop_session(&id("a")).unwrap());
    assert!(!engine.cancel(running) && !engine.stop_session(&id("a")).unwrap());
    assert_eq!(engine.session_tokens(&id("a")).unwrap().len(), 16, "what was generated stays");

    engine.branch_session(&id("a"), &id("b"), Some(7)).unwrap();
    assert_refused(engine.branch_session(&id("a"), &id("b"), None), "session b already");
    assert_refused(engine.branch_session(&id("a"), &id("c"), Some(17)), "cannot be cut to 17");
    engine.branch_session(&id("a"), &id("c"), None).unwrap();
    assert_refused(engine.add_request(request(5, 5, turn("d", true))), "3 sessions");
    let lens: Vec<_> =
        engine.sessions().iter().map(|info| (info.id.name().to_owned(), info.num_tokens)).collect();
    assert_eq!(lens, [("a".to_owned(), 16), ("b".to_owned(), 7), ("c".to_owned(), 16)]);
    engine.end_session(&id("b")).unwrap();
    assert_refused(engine.end_session(&id("b")), "no session b");
    engine.check().unwrap();
}

#[test]
fn branches_share_pages_and_then_part() {
    let mut engine = load("llama-gqa2", &options());
    run(&mut engine, request(40, 10, turn("a", true)));
    engine.branch_session(&id("a"), &id("b"), None).unwrap();
    // Both append to the same half-filled page.
    let (a, cached_a) = run(&mut engine, request(6, 8, turn("a", false)));
    let (b, cached_b) = run(&mut engine, request(7, 8, turn("b", false)));
    assert_eq!((cached_a, cached_b), (49, 49));
    let mut fresh = load("llama-gqa2", &EngineOptions { prefix_cache: false, ..options() });
    for (name, len, expected) in [("a", 6, a), ("b", 7, b)] {
        run(&mut fresh, request(40, 10, turn(name, true)));
        fresh.rewind_session(&id(name), 50).unwrap();
        assert_eq!(run(&mut fresh, request(len, 8, turn(name, false))).0, expected);
    }
}

#[test]
fn evicted_sessions_are_computed_again() {
    let few = EngineOptions { num_pages: Some(4), ..options() };
    let mut engine = load("llama-gqa2", &few);
    run(&mut engine, request(60, 10, turn("a", true)));
    run(&mut engine, request(100, 10, turn("b", true)));
    let (found, num_cached) = run(&mut engine, request(5, 10, turn("a", false)));
    assert!(num_cached < 69, "{num_cached} tokens were left");
    let mut roomy = load("llama-gqa2", &options());
    run(&mut roomy, request(60, 10, turn("a", true)));
    let (expected, num_cached) = run(&mut roomy, request(5, 10, turn("a", false)));
    assert_eq!((found, 69), (expected, num_cached));
}

/// A new engine goes on from the files of an old one, with its keys and values.
#[test]
fn sessions_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut engine = load("llama-gqa2", &options());
    run(&mut engine, request(40, 10, turn("a", true)));
    run(&mut engine, request(70, 2, turn("b", true)));
    engine.save_sessions(dir.path()).unwrap();
    let (expected, _) = run(&mut engine, request(5, 10, turn("a", false)));

    let mut again = load("llama-gqa2", &options());
    assert!(again.load_sessions(dir.path()).unwrap().is_empty());
    assert_eq!(again.sessions().len(), 2);
    let (found, num_cached) = run(&mut again, request(5, 10, turn("a", false)));
    assert_eq!((found, num_cached), (expected.clone(), 49));
    again.check().unwrap();
    // A second time they are there already.
    assert_eq!(again.load_sessions(dir.path()).unwrap().len(), 2);

    // Other pages: the tokens count, keys and values are computed again.
    let mut float = load("llama-gqa2", &EngineOptions { kv_dtype: KvDType::F32, ..options() });
    assert!(float.load_sessions(dir.path()).unwrap().is_empty());
    let (_, num_cached) = run(&mut float, request(5, 10, turn("a", false)));
    assert_eq!(num_cached, 0);

    // Little room: as much as fits.
    let mut small = load("llama-gqa2", &EngineOptions { num_pages: Some(3), ..options() });
    assert!(small.load_sessions(dir.path()).unwrap().is_empty());
    assert_eq!(run(&mut small, request(5, 10, turn("a", false))).0, expected);

    // Another model.
    let mut other = load("llama-mha-tied", &options());
    let refused = other.load_sessions(dir.path()).unwrap();
    assert_eq!(refused.len(), 2);
    assert!(refused[0].1.to_string().contains("another model"), "{}", refused[0].1);
    assert!(other.sessions().is_empty());
}
