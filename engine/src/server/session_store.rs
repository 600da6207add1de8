//! Sessions that nobody uses end, and those that are left outlive the server in files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::app::App;
use crate::engine::Engine;
use crate::error::Error;
use crate::session::SessionId;
use crate::session_file::SessionFile;

/// When sessions were last used, on a clock that nobody sets.
#[derive(Default)]
pub(super) struct SessionClock {
    seen: BTreeMap<SessionId, Seen>,
}

/// A session as the last sweep found it.
struct Seen {
    last_use: u64,
    was_running: bool,
    last_used: Instant,
}

/// Bounds of the time between two sweeps.
const SWEEP_MIN: Duration = Duration::from_millis(10);
const SWEEP_MAX: Duration = Duration::from_secs(30);

impl SessionClock {
    /// Ends the sessions that were idle for `ttl` at `now`; says how many.
    fn sweep(&mut self, engine: &mut Engine, now: Instant, ttl: Duration) -> usize {
        let infos = engine.sessions();
        let mut seen_before = std::mem::take(&mut self.seen);
        let mut num_ended = 0;
        for info in infos {
            let (last_use, is_running) = (info.last_use, info.is_running);
            let last_used = match seen_before.remove(&info.id) {
                // NOTE: a request that ended since the last sweep may have ended just now.
                Some(seen) if seen.last_use == last_use && !seen.was_running && !is_running => {
                    seen.last_used
                }
                _ => now,
            };
            if now.saturating_duration_since(last_used) > ttl
                && engine.end_session(&info.id).is_ok()
            {
                num_ended += 1;
                continue;
            }
            self.seen.insert(info.id, Seen { last_use, was_running: is_running, last_used });
        }
        num_ended
    }
}

/// Ends idle sessions for as long as the server runs.
pub(super) async fn expire(app: Arc<App>) {
    let ttl = app.options.session_ttl;
    let clock = Arc::new(Mutex::new(SessionClock::default()));
    loop {
        tokio::time::sleep((ttl / 10).clamp(SWEEP_MIN, SWEEP_MAX)).await;
        if app.handle.stats().status.num_sessions == 0 {
            // NOTE: no use has the number of an earlier one, so that the clock may remember more.
            continue;
        }
        let clock = Arc::clone(&clock);
        let sweep = move |engine: &mut Engine| {
            let mut clock = clock.lock().unwrap_or_else(PoisonError::into_inner);
            clock.sweep(engine, Instant::now(), ttl)
        };
        match app.call(sweep).await {
            Ok(0) => {}
            Ok(num) => {
                app.metrics.sessions_expired(num);
                tracing::info!(num, "sessions expired");
            }
            // Too busy, or over; the next sweep is soon.
            Err(_) => {}
        }
    }
}

/// Takes up the sessions of the folder `dir`, which is made where it is missing, and keeps those
/// that are left when the engine is drained.
pub(super) fn keep(app: &App, dir: &Path) -> Result<(), Error> {
    create_private(dir)?;
    let folder = dir.to_owned();
    let loaded = app.handle.call(move |engine| load(engine, &folder))??;
    let folder = dir.to_owned();
    app.handle.at_drained(move |engine| save(engine, &folder, &loaded))
}

/// Only the server's own user reads what was said.
fn create_private(dir: &Path) -> Result<(), Error> {
    use std::os::unix::fs::DirBuilderExt;
    let created = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    created.map_err(|error| Error::io(dir, error))
}

/// The sessions that were taken up. Files that are refused stay where they are.
fn load(engine: &mut Engine, dir: &Path) -> Result<Vec<SessionId>, Error> {
    for (_, error) in engine.load_sessions(dir)? {
        tracing::warn!(%error, "a session file was refused");
    }
    let loaded: Vec<SessionId> = engine.sessions().into_iter().map(|info| info.id).collect();
    tracing::info!(num = loaded.len(), "sessions loaded");
    Ok(loaded)
}

/// Writes every session, and removes the files of those of `loaded` that have ended since. One that
/// cannot be written takes no other with it.
fn save(engine: &mut Engine, dir: &Path, loaded: &[SessionId]) {
    let ids: Vec<SessionId> = engine.sessions().into_iter().map(|info| info.id).collect();
    let ended = loaded.iter().filter(|id| !ids.contains(id));
    for path in ended.map(|id| SessionFile::path(dir, id)) {
        if let Err(error) = remove(&path) {
            tracing::error!(%error, "the file of an ended session is still there");
        }
    }
    let mut num_saved = 0;
    for id in &ids {
        match engine.save_session(id, dir) {
            Ok(()) => num_saved += 1,
            Err(error) => tracing::error!(%error, "a session was not saved"),
        }
    }
    tracing::info!(num = num_saved, "sessions saved");
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::null::NullOptions;
    use crate::config::EngineOptions;
    use crate::kernels::KernelTable;
    use crate::kv_cache::Namespace;
    use crate::request::Request;
    use crate::session::SessionTurn;

    const TTL: Duration = Duration::from_secs(900);

    fn engine() -> Engine {
        let options =
            EngineOptions { max_context: Some(64), ..EngineOptions::new(KernelTable::default()) };
        Engine::null(&NullOptions::default(), &options).unwrap()
    }

    fn turn(engine: &mut Engine, name: &str, start: bool) -> SessionId {
        let id = SessionId::new(Namespace::default(), name).unwrap();
        let turn = SessionTurn { start, ..SessionTurn::of(id.clone()) };
        let request = Request {
            prompt_ids: vec![1, 2],
            max_tokens: 2,
            session: Some(turn),
            ..Request::default()
        };
        engine.generate(request, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        id
    }

    #[test]
    fn sessions_end_after_idle_time_and_not_before() {
        let (mut engine, mut clock) = (engine(), SessionClock::default());
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        turn(&mut engine, "a", true);
        turn(&mut engine, "b", true);
        assert_eq!(clock.sweep(&mut engine, at(0), TTL), 0);
        assert_eq!(clock.sweep(&mut engine, at(900), TTL), 0);
        // The same tokens as before are a use all the same.
        turn(&mut engine, "b", true);
        assert_eq!(clock.sweep(&mut engine, at(901), TTL), 1);
        let names = |engine: &Engine| -> Vec<String> {
            engine.sessions().iter().map(|info| info.id.name().to_owned()).collect()
        };
        assert_eq!(names(&engine), ["b"]);
        assert_eq!(clock.sweep(&mut engine, at(1801), TTL), 0);
        assert_eq!(clock.sweep(&mut engine, at(1802), TTL), 1);
        assert!(names(&engine).is_empty());
    }

    #[test]
    fn ended_sessions_do_not_come_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = engine();
        turn(&mut first, "kept", true);
        let gone = turn(&mut first, "gone", true);
        save(&mut first, dir.path(), &[]);
        let mut second = engine();
        let loaded = load(&mut second, dir.path()).unwrap();
        assert_eq!(loaded.len(), 2);
        second.end_session(&gone).unwrap();
        save(&mut second, dir.path(), &loaded);
        let mut third = engine();
        let names: Vec<String> =
            load(&mut third, dir.path()).unwrap().iter().map(|id| id.name().to_owned()).collect();
        assert_eq!(names, ["kept"]);
    }
}
