//! A pair of models that compute nothing but what their pages and states hold: random requests, cancels and lost roles.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bcg_models::state::PagePool;
use bcg_models::{SampledToken, SequenceInput};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::super::local::{LocalEngine, LocalOptions};
use super::super::model::{Damage, GraphCounters, StepError, StepModel};
use super::super::prefix_cache::PrefixCache;
use super::super::scheduler::Limits;
use super::super::{
    ClientId, Engine, EngineEvent, EventStream, GenerationRequest, Health, ModelInfo, Prompt, QueueOptions, Submission,
    WatchdogOptions,
};
use super::*;

const PAGE_SIZE: usize = 4;
const LIMITS: Limits = Limits { max_running_requests: 4, chunked_prefill_size: 16, context_length: 40 };
const VOCAB: u32 = 500;

/// What a device's memory holds: the token of each slot of the pages, and the tokens that each state stands for.
#[derive(Debug, Default)]
struct Memory {
    slots: HashMap<usize, u32>,
    states: HashMap<u32, Vec<u32>>,
}

/// The next token depends on all tokens that the pages hold, which the state must hold too.
struct Fake {
    own: Arc<Mutex<Memory>>,
    /// In the prefill role, the other's.
    far: Option<Arc<Mutex<Memory>>>,
    chosen: Vec<u32>,
    is_lost: Arc<AtomicBool>,
    /// Longest time of a step, in microseconds.
    delay: u64,
    rng: SmallRng,
}

fn slot(pages: &[u32], token: usize) -> usize {
    pages[token / PAGE_SIZE] as usize * PAGE_SIZE + token % PAGE_SIZE
}

fn next_token(tokens: &[u32]) -> u32 {
    let hash = tokens.iter().fold(7_u32, |hash, token| hash.wrapping_mul(31).wrapping_add(*token));
    3 + hash % (VOCAB - 3)
}

impl Fake {
    /// Runs one sequence, and returns its next token.
    fn run(&self, work: &Work) -> u32 {
        let mut own = self.own.lock().expect("lock");
        let chosen = work.chosen.map(|row| self.chosen[row]);
        let past_len = work.past_len;
        for (at, &token) in (past_len..).zip(work.tokens.iter().chain(&chosen)) {
            own.slots.insert(slot(&work.pages, at), token);
        }
        let kv_len = past_len + work.tokens.len() + chosen.iter().len();
        let held: Vec<u32> = (0..kv_len).map(|at| own.slots[&slot(&work.pages, at)]).collect();
        if let Some(read) = work.state.0 {
            assert_eq!(own.states[&read], held[..past_len], "a state stands for the tokens before the step");
        }
        own.states.insert(work.state.1, held.clone());
        drop(own);
        if let (Some(far), Some((pages, from, state))) = (&self.far, &work.push) {
            let mut far = far.lock().expect("lock");
            for (at, &token) in held.iter().enumerate().skip(*from) {
                far.slots.insert(slot(pages, at), token);
            }
            far.states.extend(state.map(|state| (state, held.clone())));
        }
        next_token(&held)
    }
}

/// A sequence's part of a step that was launched.
struct Work {
    tokens: Vec<u32>,
    /// The row of the step before that chooses one more.
    chosen: Option<usize>,
    past_len: usize,
    pages: Vec<u32>,
    /// What is read, and what is written.
    state: (Option<u32>, u32),
    /// Pages, first token and state.
    push: Option<(Vec<u32>, usize, Option<u32>)>,
}

impl StepModel for Fake {
    type Pending = Vec<Work>;

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Vec<Work>, StepError> {
        if self.is_lost.swap(false, Ordering::SeqCst) {
            return Err(StepError { message: "no device".to_owned(), damage: Damage::Model });
        }
        let work = |sequence: &SequenceInput<'_>| {
            let state = sequence.state.expect("a lease has a state");
            let slots = state.slots(sequence.past_len);
            state.commit(sequence.kv_len());
            Work {
                tokens: sequence.tokens.to_vec(),
                chosen: sequence.chosen.map(|chosen| chosen.row),
                past_len: sequence.past_len,
                pages: sequence.pages.to_vec(),
                state: slots,
                push: sequence.push.map(|push| (push.pages.to_vec(), push.from, push.state)),
            }
        };
        Ok(batch.iter().map(work).collect())
    }

    /// All that a step does happens as late as it can: now.
    fn collect(&mut self, step: Vec<Work>) -> Result<Vec<SampledToken>, StepError> {
        std::thread::sleep(Duration::from_micros(self.rng.random_range(0..=self.delay)));
        self.chosen = step.iter().map(|work| self.run(work)).collect();
        let sampled = |&id: &u32| SampledToken { id, logprob: None, top: Vec::new(), logits: None };
        Ok(self.chosen.iter().map(sampled).collect())
    }

    fn stats(&self) -> GraphCounters {
        GraphCounters::default()
    }
}

/// An engine in two roles, and what tests see of it.
struct Rig {
    engine: LocalEngine,
    /// Of the roles of the latest load.
    pools: Arc<Mutex<Vec<PagePool>>>,
    is_lost: [Arc<AtomicBool>; 2],
    loads: Arc<AtomicUsize>,
}

impl Rig {
    fn start(num_pages: [usize; 2], seed: u64) -> Self {
        let (pools, loads) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicUsize::new(0)));
        let is_lost: [Arc<AtomicBool>; 2] = Default::default();
        let (kept, counted, lost) = (Arc::clone(&pools), Arc::clone(&loads), is_lost.clone());
        let engine = LocalEngine::start_roles(move || {
            let load = counted.fetch_add(1, Ordering::SeqCst) as u64;
            let [near, far] =
                num_pages.map(|pages| PagePool::with_states(pages, PAGE_SIZE, LIMITS.max_running_requests));
            *kept.lock().expect("lock") = vec![near.clone(), far.clone()];
            let [own, other]: [Arc<Mutex<Memory>>; 2] = Default::default();
            let model = |own: &Arc<Mutex<Memory>>, far, role: usize| Fake {
                own: Arc::clone(own),
                far,
                chosen: Vec::new(),
                is_lost: Arc::clone(&lost[role]),
                delay: 300,
                rng: SmallRng::seed_from_u64(seed ^ load << 8 ^ role as u64),
            };
            let models = [model(&own, Some(Arc::clone(&other)), 0), model(&other, None, 1)];
            // A shared prefix has no state of its own.
            let roles = Roles::new(models, LIMITS, PrefixCache::new(near, false), far, MovedBytes::default());
            Ok((roles, options()))
        });
        Self { engine: engine.expect("starts"), pools, is_lost, loads }
    }

    /// Waits until no role holds a page or a state.
    fn check_that_all_is_free(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let is_free = |pool: &PagePool| pool.num_free() == pool.num_pages();
        while !self.pools.lock().expect("lock").iter().all(is_free) {
            assert!(Instant::now() < deadline, "pages are never given back");
            std::thread::sleep(Duration::from_millis(1));
        }
        self.pools.lock().expect("lock").iter().for_each(|pool| pool.check([]));
    }
}

fn options() -> LocalOptions {
    let context_length = LIMITS.context_length;
    let name = "fake".to_owned();
    LocalOptions {
        info: ModelInfo { name, created: 0, context_length, vocab_size: VOCAB as usize, has_tokenizer: false },
        tokenizer: None,
        chat: None,
        eos: vec![2],
        queue: QueueOptions { queue_timeout: Some(Duration::from_secs(20)), ..QueueOptions::default() },
        watchdog: WatchdogOptions::default(),
        prefix_cache_tokens: 0,
        settings: Value::Null,
    }
}

/// A request, and what it is answered.
struct Asked {
    prompt: Vec<u32>,
    max_tokens: usize,
    /// After how many tokens its client leaves.
    leaves_after: Option<usize>,
}

impl Asked {
    fn random(rng: &mut SmallRng) -> Self {
        let len = rng.random_range(1..30);
        Self {
            prompt: (0..len).map(|_| rng.random_range(3..VOCAB)).collect(),
            max_tokens: rng.random_range(1..=(LIMITS.context_length - len).min(20)),
            leaves_after: rng.random_bool(0.2).then(|| rng.random_range(0..4)),
        }
    }

    fn submit(&self, engine: &LocalEngine, client: u64) -> EventStream {
        let mut request = GenerationRequest::greedy(Prompt::Tokens(self.prompt.clone()));
        (request.max_tokens, request.ignore_eos) = (Some(self.max_tokens), true);
        let client = ClientId::new(&format!("client {client}"));
        let submission = Submission { client, ..Submission::one(request) };
        engine.submit_all(submission).expect("accepted").remove(0)
    }

    /// Reads an answer to its end, or until the client leaves; an error is the one that ended it.
    fn read(&self, mut stream: EventStream) -> Result<(), String> {
        let mut tokens = self.prompt.clone();
        let len = |tokens: &[u32]| tokens.len() - self.prompt.len();
        loop {
            if self.leaves_after.is_some_and(|count| len(&tokens) >= count) {
                return Ok(());
            }
            match stream.next_blocking() {
                Some(EngineEvent::Delta(delta)) => {
                    for token in delta.tokens {
                        assert_eq!(token, next_token(&tokens), "token {} of {:?}", len(&tokens), self.prompt);
                        tokens.push(token);
                    }
                }
                Some(EngineEvent::Finished { .. }) => break,
                Some(EngineEvent::Failed(error)) => return Err(error.to_string()),
                None => panic!("no last event"),
            }
        }
        assert_eq!(len(&tokens), self.max_tokens);
        assert!(stream.next_blocking().is_none(), "it ends once");
        Ok(())
    }
}

/// Sends random requests from a few clients at random times, and returns the errors.
fn ask(engine: &LocalEngine, seed: u64, count: usize) -> Vec<String> {
    let client = |client: u64| {
        let mut rng = SmallRng::seed_from_u64(seed << 8 | client);
        let mut errors = Vec::new();
        for _ in 0..count {
            std::thread::sleep(Duration::from_micros(rng.random_range(0..500)));
            let asked: Vec<Asked> = (0..rng.random_range(1..4)).map(|_| Asked::random(&mut rng)).collect();
            let streams: Vec<EventStream> = asked.iter().map(|asked| asked.submit(engine, client)).collect();
            errors.extend(asked.iter().zip(streams).filter_map(|(asked, stream)| asked.read(stream).err()));
        }
        errors
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..3).map(|number| scope.spawn(move || client(number))).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// With few pages in either role: requests wait, chunks are preempted, answers are preempted, and clients leave.
#[test]
fn random_requests_have_their_own_answers_and_leave_nothing() {
    let mut moved = 0;
    for (seed, num_pages) in (0..12).zip([[30, 30], [11, 30], [30, 11], [11, 11]].into_iter().cycle()) {
        let rig = Rig::start(num_pages, seed);
        assert_eq!(ask(&rig.engine, seed, 8), Vec::<String>::new(), "seed {seed}");
        rig.check_that_all_is_free();
        let metrics = rig.engine.metrics();
        moved += metrics.moved_requests.get();
        assert_eq!((rig.loads.load(Ordering::SeqCst), metrics.failed_steps.get()), (1, 0));
    }
    assert!(moved > 100, "{moved} requests moved");
}

/// A role that is lost ends what both hold, at once and once, and both come back.
#[test]
fn a_lost_role_fails_what_runs_and_both_come_back() {
    for (seed, role) in [(1, 0), (2, 1), (3, 0), (4, 1)] {
        let rig = Rig::start([20, 16], seed);
        let errors = std::thread::scope(|scope| {
            let asking = scope.spawn(|| ask(&rig.engine, seed, 12));
            std::thread::sleep(Duration::from_millis(4 + seed));
            rig.is_lost[role].store(true, Ordering::SeqCst);
            let lost = Instant::now();
            while rig.loads.load(Ordering::SeqCst) < 2 {
                assert!(lost.elapsed() < Duration::from_secs(2), "seed {seed}: nobody notices");
                std::thread::sleep(Duration::from_millis(1));
            }
            asking.join().expect("no panic")
        });
        assert!(errors.iter().all(|error| error.contains("no device")), "{errors:?}");
        assert!(errors.len() <= 2 * LIMITS.max_running_requests + 1, "only those that ran: {errors:?}");
        assert_eq!(rig.engine.health(), Health::Ready);
        assert_eq!(ask(&rig.engine, seed + 10, 2), Vec::<String>::new());
        rig.check_that_all_is_free();
        assert_eq!(rig.loads.load(Ordering::SeqCst), 2);
    }
}

#[test]
fn a_request_that_ends_with_its_first_token_never_moves() {
    let rig = Rig::start([20, 20], 0);
    let asked = Asked { prompt: vec![3, 4, 5, 6, 7], max_tokens: 1, leaves_after: None };
    asked.read(asked.submit(&rig.engine, 0)).expect("an answer");
    assert_eq!(rig.engine.metrics().moved_requests.get(), 0);
    let asked = Asked { max_tokens: 2, ..asked };
    asked.read(asked.submit(&rig.engine, 0)).expect("an answer");
    assert_eq!(rig.engine.metrics().moved_requests.get(), 1);
    rig.check_that_all_is_free();
}

#[test]
fn a_role_and_its_gpu_are_read_and_printed() {
    let read = |text: &str| text.parse::<RoleDevice>();
    assert_eq!(read("decode:3"), Ok(RoleDevice { role: RoleName::Decode, gpu: 3 }));
    assert_eq!(read("prefill:0").map(|device| device.to_string()), Ok("prefill:0".to_owned()));
    for wrong in ["", "prefill", "prefill:", "prefill:x", "mixed:0", "decode:-1"] {
        assert!(read(wrong).expect_err("no role").contains("such as prefill:0"), "{wrong}");
    }
}
