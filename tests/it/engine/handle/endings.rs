//! How an engine's thread ends: drained, dropped, failed, panicked.

use std::sync::mpsc::RecvTimeoutError;

use super::*;

#[track_caller]
fn assert_draining(handle: &EngineHandle) {
    assert!(matches!(handle.submit(request(2, 2)).unwrap(), Submission::Draining));
}

#[test]
fn a_drain_lets_accepted_requests_end() {
    let handle = start();
    let gate = Gate::close(&handle);
    let streams: Vec<_> = (0..5).map(|i| accepted(handle.submit(request(9, 10 + i)))).collect();
    handle.start_drain(LONG);
    assert_eq!(handle.state(), EngineState::Draining);
    assert_draining(&handle);
    gate.step();
    assert_draining(&handle);
    drop(gate);
    for (i, mut stream) in streams.into_iter().enumerate() {
        assert_eq!(read(&mut stream), (expected(&request(9, 10 + i)), Event::Finished));
    }
    assert_eq!(handle.wait_timeout(LONG), EngineState::Stopped);
    assert_draining(&handle);
    // Again is as good as once.
    assert_eq!(handle.drain(Duration::ZERO), EngineState::Stopped);
}

#[test]
fn a_deadline_cancels_the_rest() {
    let handle = start();
    let gate = Gate::close(&handle);
    let mut streams: Vec<_> = (0..5).map(|_| accepted(handle.submit(request(2, 50)))).collect();
    gate.step();
    gate.step();
    // The earlier deadline counts.
    handle.start_drain(Duration::ZERO);
    handle.start_drain(LONG);
    assert_eq!(handle.wait_timeout(Duration::ZERO), EngineState::Draining);
    drop(gate);
    for (idx, stream) in streams.iter_mut().enumerate() {
        let (tokens, last) = read(stream);
        assert_eq!(last, Event::Cancelled);
        assert_eq!(tokens.is_empty(), idx > 0, "one of five runs beside the gate");
    }
    assert_eq!(handle.wait(), EngineState::Stopped);
    assert_eq!(handle.stats().counts.num_cancelled, 6);
    assert_eq!(handle.stats().counts.num_steps, 3);
}

#[test]
fn the_last_handle_takes_the_thread_along() {
    let handle = start();
    let other = handle.clone();
    let gate = Gate::close(&handle);
    let mut stream = accepted(handle.submit(request(2, 50)));
    drop(handle);
    assert_eq!(other.state(), EngineState::Running);
    thread::scope(|scope| {
        scope.spawn(move || drop(other));
        drop(gate);
    });
    assert!(
        stream.has_ended() || matches!(read(&mut stream).1, Event::Cancelled | Event::Finished)
    );
}

#[test]
fn a_sink_may_own_a_handle() {
    let handle = start();
    let owned = handle.clone();
    let (sender, receiver) = channel();
    let sink = Box::new(move |event| {
        // Neither waits for the thread it is on.
        let error = owned.call(|engine| engine.is_idle()).unwrap_err();
        assert_eq!(owned.wait(), owned.state());
        sender.send((event, error.to_string())).unwrap();
    });
    accepted(handle.submit_with(request(2, 1), sink));
    drop(handle);
    let (_, message) = receiver.recv_timeout(LONG).unwrap();
    assert!(message.contains("own thread"), "{message}");
    // The thread drops the last handle with the sink, and ends.
    let end = std::iter::repeat_with(|| receiver.recv_timeout(LONG)).find_map(Result::err);
    assert_eq!(end, Some(RecvTimeoutError::Disconnected));
}

#[test]
fn a_sink_has_exactly_one_last_event() {
    for fault in [None, Some(Fault::Error { step: 20 }), Some(Fault::Panic { step: 20 })] {
        let load = move || engine(fault, &options());
        let handle = EngineHandle::start(load, HandleLimits::default()).unwrap();
        let mut events = Vec::new();
        for i in 0..100 {
            let (sender, receiver) = channel();
            let sink = Box::new(move |event| sender.send(event).unwrap());
            // The engine may be dead by now.
            let Ok(Submission::Accepted(cancellation)) =
                handle.submit_with(request(1 + i % 9, 1 + i % 7), sink)
            else {
                assert!(fault.is_some());
                continue;
            };
            if i % 5 == 0 {
                cancellation.cancel();
            }
            events.push(receiver);
        }
        drop(handle);
        // All senders are gone: what is there is all there will ever be.
        for events in events {
            let events: Vec<Event> = events.iter().collect();
            let num_last = events.iter().filter(|event| event.is_last()).count();
            assert!(num_last == 1 && events[events.len() - 1].is_last(), "{events:?}");
        }
    }
}

/// Every stream ends with a reason that contains `reason`, and nothing hangs afterwards.
fn check_death(handle: &EngineHandle, streams: Vec<RequestStream>, reason: &str) {
    for mut stream in streams {
        let (_, last) = read(&mut stream);
        let Event::Died(message) = last else { panic!("{last:?}") };
        assert!(message.contains(reason), "{message}");
    }
    let state = handle.wait();
    assert!(matches!(&state, EngineState::Dead(message) if message.contains(reason)), "{state:?}");
    assert_eq!((handle.state(), handle.drain(LONG)), (state.clone(), state));
    let Err(error) = handle.submit(request(2, 2)) else { panic!("accepted") };
    assert!(matches!(error, Error::Engine(_)) && error.to_string().contains(reason), "{error}");
    let error = handle.call(|engine| engine.is_idle()).unwrap_err();
    assert!(error.to_string().contains(reason), "{error}");
    let stats = handle.stats();
    assert_eq!((stats.num_waiting, stats.num_waiting_tokens, stats.num_running), (0, 0, 0));
}

#[test]
fn a_failing_or_panicking_step_ends_every_stream() {
    for (fault, reason) in [
        (Fault::Error { step: 3 }, "step 3 fails"),
        (Fault::Panic { step: 3 }, "step 3 panics"),
        (Fault::Panic { step: 0 }, "step 0 panics"),
    ] {
        let load = move || engine(Some(fault), &options());
        let handle = EngineHandle::start(load, HandleLimits::default()).unwrap();
        let submit = |_| accepted(handle.submit(request(3, 50)));
        let streams = while_held(&handle, || (0..7).map(submit).collect());
        check_death(&handle, streams, reason);
        assert_eq!(handle.stats().counts.num_died, 7);
    }
}

#[test]
fn a_panicking_call_or_sink_is_the_engines_end() {
    let handle = start();
    let gate = Gate::close(&handle);
    let streams: Vec<_> = (0..4).map(|_| accepted(handle.submit(request(3, 50)))).collect();
    let caller = handle.clone();
    thread::scope(|scope| {
        let call = scope.spawn(move || caller.call(|_| -> u32 { panic!("call of no use") }));
        drop(gate);
        let error = call.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("call of no use"), "{error}");
    });
    check_death(&handle, Vec::new(), "call of no use");
    let ends = streams.into_iter().map(|mut stream| read(&mut stream).1);
    assert!(ends.into_iter().all(|last| last.is_last()));

    let handle = start();
    let gate = Gate::close(&handle);
    accepted(handle.submit_with(request(3, 50), Box::new(|_| panic!("sink with a hole"))));
    let streams: Vec<_> = (0..4).map(|_| accepted(handle.submit(request(3, 50)))).collect();
    drop(gate);
    check_death(&handle, streams, "sink with a hole");
    assert_eq!(handle.stats().counts.num_died, 6);
}

#[test]
fn an_engine_that_does_not_load_is_an_error() {
    let fail = || Err(Error::Resources("no engine today".to_owned()));
    let Err(error) = EngineHandle::start(fail, HandleLimits::default()) else { panic!("started") };
    assert!(matches!(error, Error::Resources(_)), "{error:?}");
    let panics = || panic!("load with a hole");
    let Err(error) = EngineHandle::start(panics, HandleLimits::default()) else {
        panic!("started")
    };
    assert!(error.to_string().contains("load with a hole"), "{error}");
}
