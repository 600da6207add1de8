//! Seeded simulation of the engine: random requests, sessions and cancels on the null backend.
//!
//! Every token must be the one that the request gives when it runs alone, which a wrong, stale or
//! overwritten page anywhere in its context would change, or a grammar that lost its place. After
//! every step the bookkeeping must add up, and no request may need more steps than the scheduler
//! promises. A seed decides everything.
//!
//! That the simulation can see is shown by bugs that it plants, see [`crate::fault`].

mod grammar;
mod workload;

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use workload::Workload;

use super::Engine;
use crate::backend::null::{NullOptions, next_logits};
use crate::config::EngineOptions;
use crate::fault::{Fault, plant};
use crate::kernels::KernelTable;
use crate::kv_cache::num_pages;
use crate::request::{Failure, FinishReason, Request, RequestId, RequestOutput};
use crate::sampling::{History, Sampler, choice_seed};
use crate::session::{SessionId, SessionTurn};

const VOCAB: usize = 24;
/// Requests that are alive at once.
const LIVE_MAX: usize = 20;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn one_in(&mut self, count: usize) -> bool {
        self.below(count) == 0
    }
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A request that has not ended.
struct Live {
    request: Request,
    num_prompt: usize,
    len_max: usize,
    choices: Vec<Choice>,
    /// The step by which it must have ended.
    deadline: u64,
}

#[derive(Clone)]
struct Choice {
    /// History, prompt and output.
    tokens: Vec<u32>,
    finish_reason: Option<FinishReason>,
}

/// A session as it must be.
#[derive(Clone, Default)]
struct SessionModel {
    tokens: Vec<u32>,
    running: Option<RequestId>,
    ends: bool,
}

/// What a run did, to see that it did a lot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    steps: u64,
    finished: u64,
    cancelled: u64,
    refused: u64,
    cached_tokens: u64,
    preemptions: u64,
    turns: u64,
    /// Answers that their grammars ended.
    completed: u64,
    /// Hash of all that happened.
    log: u64,
}

struct Simulation {
    random: Random,
    engine: Engine,
    max_context: usize,
    num_pages: usize,
    sessions_max: usize,
    workload: Workload,
    sampler: Sampler,
    logits: Vec<f32>,
    live: BTreeMap<RequestId, Live>,
    sessions: BTreeMap<SessionId, SessionModel>,
    /// The earliest request of a namespace that had some beginning.
    beginnings: BTreeMap<u64, RequestId>,
    counts: Counts,
}

impl Simulation {
    fn new(seed: u64) -> Simulation {
        let mut random = Random(seed);
        let page_size = [1, 2, 4, 8][random.below(4)];
        let max_context = 2 + random.below(60);
        // Mostly just enough for the longest request, so that they get into each other's way.
        let num_pages = match random.below(4) {
            0 => 1 + random.below(24),
            _ => num_pages(max_context, page_size) + random.below(6),
        };
        let max_batch_tokens = 1 + random.below(20);
        let sessions_max = 1 + random.below(5);
        let options = EngineOptions {
            max_batch_tokens,
            max_chunk_tokens: random.one_in(2).then(|| 1 + random.below(10)),
            max_sequences: 1 + random.below(max_batch_tokens),
            max_context: Some(max_context),
            num_pages: Some(num_pages),
            prefix_cache: !random.one_in(5),
            hash_key: Some([7; 32]),
            max_sessions: sessions_max,
            ..EngineOptions::new(KernelTable::default())
        };
        let null = NullOptions { vocab_size: VOCAB, page_size, ..NullOptions::default() };
        Simulation {
            random,
            engine: Engine::null(&null, &options).unwrap(),
            max_context,
            num_pages,
            sessions_max,
            workload: Workload::new(page_size, max_context),
            sampler: Sampler::new(VOCAB),
            logits: vec![0.0; VOCAB],
            live: BTreeMap::new(),
            sessions: BTreeMap::new(),
            beginnings: BTreeMap::new(),
            counts: Counts::default(),
        }
    }

    /// One random event; most are steps.
    fn event(&mut self) {
        match self.random.below(100) {
            0..22 if self.live.len() < LIVE_MAX => self.submit(),
            22..24 => self.cancel(),
            24..28 => self.use_session(),
            28 if self.random.one_in(8) => self.drain(),
            _ => self.step(),
        }
    }

    fn submit(&mut self) {
        let mut request = self.workload.request(&mut self.random);
        if self.random.one_in(3) {
            self.take_turn(&mut request);
        }
        let history = self.history(&request);
        let expected = history.as_ref().is_some_and(|history| self.is_possible(&request, history));
        let result = self.engine.add_request(request.clone());
        assert_eq!(result.is_ok(), expected, "{request:?}: {result:?}");
        let (Ok(id), Some(mut tokens)) = (result, history) else {
            self.counts.refused += 1;
            return;
        };
        tokens.extend_from_slice(&request.prompt_ids);
        self.begin_turn(&request, id);
        let num_prompt = tokens.len();
        let len_max = (num_prompt + request.max_tokens).min(self.max_context);
        let choice = Choice { tokens, finish_reason: None };
        let choices = vec![choice; request.num_choices];
        let left = |live: &Live| {
            let num_live = live.choices.iter().filter(|c| c.finish_reason.is_none()).count();
            (num_live * live.len_max) as u64
        };
        let live = Live { request, num_prompt, len_max, choices, deadline: 0 };
        let deadline = self.counts.steps + self.live.values().map(left).sum::<u64>() + left(&live);
        self.note_beginnings(id, &live, 0);
        self.live.insert(id, Live { deadline, ..live });
    }

    fn is_possible(&self, request: &Request, history: &[u32]) -> bool {
        let num_prompt = history.len() + request.prompt_ids.len();
        let len_max = (num_prompt + request.max_tokens).min(self.max_context);
        let page_size = self.engine.pool.page_size();
        num_prompt < self.max_context
            && num_pages(len_max - 1, page_size) <= self.num_pages
            && (request.session.is_none() || request.num_choices == 1)
    }

    /// Makes a request part of a session.
    fn take_turn(&mut self, request: &mut Request) {
        let name = ["a", "b", "c"][self.random.below(3)];
        let id = SessionId::new(request.namespace, name).unwrap();
        let known = self.sessions.get(&id).map(|session| session.tokens.len());
        let starts = if known.is_none() { !self.random.one_in(4) } else { self.random.one_in(8) };
        let known = known.unwrap_or(0);
        request.session = Some(SessionTurn {
            id,
            start: starts,
            end: self.random.one_in(8),
            step: self.random.one_in(4).then(|| self.random.below(known + 2)),
        });
        // Histories grow by short prompts.
        request.prompt_ids.truncate(if starts { usize::MAX } else { 1 + self.random.below(8) });
        if !self.random.one_in(10) {
            request.num_choices = 1;
        }
    }

    /// The history that the request goes on from, `None` where its session must refuse it.
    fn history(&self, request: &Request) -> Option<Vec<u32>> {
        let Some(turn) = &request.session else { return Some(Vec::new()) };
        let mut tokens = match self.sessions.get(&turn.id) {
            Some(session) if session.running.is_some() => return None,
            Some(_) if turn.start => Vec::new(),
            Some(session) => session.tokens.clone(),
            None if turn.start && self.sessions.len() < self.sessions_max => Vec::new(),
            None => return None,
        };
        if turn.step.is_some_and(|step| step > tokens.len()) {
            return None;
        }
        tokens.truncate(turn.step.unwrap_or(tokens.len()));
        Some(tokens)
    }

    fn begin_turn(&mut self, request: &Request, id: RequestId) {
        let Some(turn) = &request.session else { return };
        let history = self.history(request).expect("the turn was accepted");
        let session = SessionModel { tokens: history, running: Some(id), ends: turn.end };
        self.sessions.insert(turn.id.clone(), session);
        self.counts.turns += 1;
    }

    fn cancel(&mut self) {
        if self.live.is_empty() {
            return;
        }
        let idx = self.random.below(self.live.len());
        let id = *self.live.keys().nth(idx).unwrap();
        assert!(self.engine.cancel(id));
        assert!(!self.engine.cancel(id), "a request ends once");
        self.end(id);
        self.counts.cancelled += 1;
        self.check();
    }

    /// Cuts, branches, stops or ends a session.
    fn use_session(&mut self) {
        if self.sessions.is_empty() {
            return;
        }
        let idx = self.random.below(self.sessions.len());
        let (id, session) = self.sessions.iter().nth(idx).unwrap();
        let (id, session) = (id.clone(), session.clone());
        let is_idle = session.running.is_none();
        match self.random.below(5) {
            0 => {
                let step = self.random.below(session.tokens.len() + 2);
                let is_done = self.engine.rewind_session(&id, step).is_ok();
                assert_eq!(is_done, is_idle && step <= session.tokens.len());
                if is_done {
                    self.sessions.get_mut(&id).unwrap().tokens.truncate(step);
                }
            }
            1 | 2 => self.branch(&id, &session),
            3 => {
                assert_eq!(self.engine.stop_session(&id).unwrap(), !is_idle);
                session.running.into_iter().for_each(|request| self.end(request));
            }
            _ => {
                self.engine.end_session(&id).unwrap();
                session.running.into_iter().for_each(|request| self.end(request));
                self.sessions.remove(&id);
            }
        }
        self.check();
    }

    fn branch(&mut self, id: &SessionId, session: &SessionModel) {
        let to = SessionId::new(id.namespace(), ["a", "b", "c"][self.random.below(3)]).unwrap();
        let step = self.random.one_in(2).then(|| self.random.below(session.tokens.len() + 2));
        let is_possible = session.running.is_none()
            && !self.sessions.contains_key(&to)
            && self.sessions.len() < self.sessions_max
            && step.is_none_or(|step| step <= session.tokens.len());
        let result = self.engine.branch_session(id, &to, step);
        assert_eq!(result.is_ok(), is_possible, "{result:?}");
        if is_possible {
            let mut branch = session.clone();
            branch.tokens.truncate(step.unwrap_or(branch.tokens.len()));
            self.sessions.insert(to, branch);
        }
    }

    fn step(&mut self) {
        let mut outputs = Vec::new();
        self.engine.step(&mut outputs).unwrap();
        self.counts.steps += 1;
        outputs.iter().for_each(|output| self.receive(output));
        self.check();
        let late = self.live.iter().find(|(_, live)| live.deadline < self.counts.steps);
        assert!(late.is_none(), "{:?} starves", late.map(|(id, _)| id));
    }

    /// Compares an output with that of the request alone.
    fn receive(&mut self, output: &RequestOutput) {
        let live = self.live.get_mut(&output.id).expect("an ended request is silent");
        let choice = &mut live.choices[output.choice_idx];
        assert_eq!(choice.finish_reason, None, "an ended answer is silent");
        let num_before = choice.tokens.len();
        let end_tokens = &live.request.stop_token_ids;
        let next = |tokens: &[u32]| {
            let output = &tokens[live.num_prompt..];
            live.request.grammar.is_some().then(|| grammar::next(output, end_tokens))
        };
        let before = next(&choice.tokens);
        let mut sampling = live.request.sampling.clone();
        sampling.seed = choice_seed(sampling.seed, output.choice_idx);
        let stats = next_logits(&choice.tokens, &mut self.logits);
        let history = History {
            tokens: &choice.tokens,
            num_prompt: live.num_prompt,
            stop_token_ids: &live.request.stop_token_ids,
            mask: before.as_ref().map(|next| &next.mask),
        };
        let expected = self.sampler.sample(&sampling, &history, &self.logits, &stats);
        let token = expected.as_ref().map(|sample| sample.token);
        let logprob = expected.map_or(f32::NEG_INFINITY, |sample| sample.logprob);
        assert_eq!((output.token, output.logprob), (token, logprob), "{:?}", output.id);
        choice.tokens.extend(token);
        let after = next(&choice.tokens);
        choice.finish_reason = match token {
            // The null backend gives finite logits: without a grammar there is a token.
            None if before.expect("a grammar").is_end => Some(FinishReason::Stop),
            None => Some(FinishReason::Failed(Failure::NoAllowedToken)),
            Some(token) if end_tokens.contains(&token) => Some(FinishReason::Stop),
            _ if after.is_some_and(|next| next.is_complete) => {
                self.counts.completed += 1;
                Some(FinishReason::Stop)
            }
            _ => (choice.tokens.len() == live.len_max).then_some(FinishReason::Length),
        };
        assert_eq!(output.finish_reason, choice.finish_reason, "{:?}", output.id);
        let is_first = num_before == live.num_prompt;
        let is_over = live.choices.iter().all(|choice| choice.finish_reason.is_some());
        let event = u64::from(token.unwrap_or(u32::MAX)) << 8 | output.choice_idx as u64;
        self.counts.log = mix(self.counts.log ^ mix(output.id.0 << 32 | event));
        if is_first {
            self.check_cached(output);
        }
        let live = self.live.remove(&output.id).expect("found above");
        self.note_beginnings(output.id, &live, output.choice_idx);
        self.live.insert(output.id, live);
        if is_over {
            self.end(output.id);
            self.counts.finished += 1;
        }
    }

    /// What a request found in the cache was there before, of its own namespace.
    fn check_cached(&mut self, output: &RequestOutput) {
        let live = &self.live[&output.id];
        assert!(output.num_cached < live.num_prompt, "a row is left to compute");
        self.counts.cached_tokens += output.num_cached as u64;
        if output.choice_idx == 0 && output.num_cached > 0 {
            let tokens = &live.choices[0].tokens[..output.num_cached];
            let beginning = tokens.iter().fold(live.request.namespace.0, |before, token| {
                mix(before ^ mix(u64::from(*token) + 1))
            });
            let owner = self.beginnings.get(&beginning);
            assert!(owner.is_some_and(|owner| *owner < output.id), "{tokens:?} of nobody");
        }
    }

    /// Notes that the tokens of a choice may be in the cache from now on.
    fn note_beginnings(&mut self, id: RequestId, live: &Live, choice_idx: usize) {
        let mut beginning = live.request.namespace.0;
        for token in &live.choices[choice_idx].tokens {
            beginning = mix(beginning ^ mix(u64::from(*token) + 1));
            let owner = self.beginnings.entry(beginning).or_insert(id);
            *owner = id.min(*owner);
        }
    }

    /// A request ended or was cancelled: its session has what was generated.
    fn end(&mut self, id: RequestId) {
        let live = self.live.remove(&id).expect("a request ends once");
        let tokens = &live.choices[0].tokens;
        self.workload.remember(tokens.clone(), &mut self.random);
        let Some(turn) = &live.request.session else { return };
        let session = self.sessions.get_mut(&turn.id).expect("it was begun");
        assert_eq!(session.running, Some(id));
        session.running = None;
        session.tokens.clone_from(tokens);
        if session.ends {
            self.sessions.remove(&turn.id);
        }
    }

    fn check(&mut self) {
        if let Err(message) = self.engine.check() {
            panic!("{message}");
        }
        let status = self.engine.status();
        let choices = self.live.values().flat_map(|live| &live.choices);
        let num_live = choices.filter(|choice| choice.finish_reason.is_none()).count();
        assert_eq!(status.num_waiting + status.num_running, num_live, "one state for each");
        assert_eq!(status.num_sessions, self.sessions.len());
        if num_live == 0 {
            assert_eq!(status.pages.active, 0, "an idle engine holds no page");
        }
        for (id, session) in &self.sessions {
            if session.running.is_none() {
                let found = self.engine.session_tokens(id).unwrap();
                assert_eq!(found, session.tokens, "session {id}");
            }
        }
    }

    /// Silence until everything has ended.
    fn drain(&mut self) {
        while !self.live.is_empty() {
            self.step();
        }
        assert!(self.engine.is_idle());
    }
}

/// At least `num_steps` steps under one seed.
fn run(seed: u64, num_steps: u64) -> Counts {
    let mut simulation = Simulation::new(seed);
    while simulation.counts.steps < num_steps {
        simulation.event();
    }
    simulation.drain();
    simulation.counts.preemptions = simulation.engine.status().num_preemptions;
    simulation.counts
}

/// Runs `num_seeds` seeds from `first` on, `num_steps` steps each.
fn run_seeds(first: u64, num_seeds: u64, num_steps: u64) -> Counts {
    let mut total = Counts::default();
    for seed in first..first + num_seeds {
        let run = catch_unwind(|| run(seed, num_steps));
        let counts = run.unwrap_or_else(|_| panic!("seed {seed} fails"));
        total.steps += counts.steps;
        total.finished += counts.finished;
        total.cancelled += counts.cancelled;
        total.refused += counts.refused;
        total.cached_tokens += counts.cached_tokens;
        total.preemptions += counts.preemptions;
        total.turns += counts.turns;
        total.completed += counts.completed;
    }
    total
}

/// Steps of one seed, and seeds of one test: two million steps in four tests.
const NUM_STEPS: u64 = 5000;
const NUM_SEEDS: u64 = 100;

fn check_seeds(first: u64) {
    let counts = run_seeds(first, NUM_SEEDS, NUM_STEPS);
    assert!(counts.steps >= NUM_SEEDS * NUM_STEPS);
    // Everything happened often.
    let is_busy = counts.finished > 50_000 && counts.cancelled > 2000 && counts.refused > 5000;
    assert!(is_busy && counts.preemptions > 3000, "{counts:?}");
    assert!(counts.cached_tokens > 50_000 && counts.turns > 5000, "{counts:?}");
    assert!(counts.completed > 500, "{counts:?}");
}

#[test]
fn seeds_from_0_keep_every_promise() {
    check_seeds(0);
}

#[test]
fn seeds_from_1000_keep_every_promise() {
    check_seeds(1000);
}

#[test]
fn seeds_from_2000_keep_every_promise() {
    check_seeds(2000);
}

#[test]
fn seeds_from_3000_keep_every_promise() {
    check_seeds(3000);
}

#[test]
fn a_seed_replays_itself() {
    assert_eq!(run(17, 3000), run(17, 3000));
    assert_ne!(run(17, 3000).log, run(18, 3000).log);
}

#[test]
fn planted_bugs_are_found() {
    for fault in Fault::ALL {
        let find = |seed| {
            plant(Some(fault));
            let result = catch_unwind(AssertUnwindSafe(|| run(seed, 2000)));
            plant(None);
            result.is_err()
        };
        assert!((0..200).any(find), "{fault:?} was not found");
    }
}
