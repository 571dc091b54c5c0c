//! What replicas promise, with engines that do what a test tells them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;

use super::super::{Delta, EngineEvent, FinishReason, GenerationRequest, RequestError, Usage};
use super::record::BLOCK_TOKENS;
use super::*;

/// Tokens that a scripted cache holds.
const CACHE_TOKENS: usize = 64 * BLOCK_TOKENS;

/// Accepts, and keeps the sending ends of its answers.
struct Scripted {
    info: ModelInfo,
    health: Mutex<Health>,
    /// What each submission is refused with.
    refuses: Mutex<Option<SubmitError>>,
    /// The submissions that it accepted: the prompts, and the answers.
    accepted: Mutex<Vec<Vec<Vec<u32>>>>,
    answers: Mutex<Vec<mpsc::Sender<EngineEvent>>>,
    num_tokenized: AtomicUsize,
    draining: AtomicBool,
    metrics: Metrics,
}

impl Scripted {
    fn new() -> Self {
        let name = "scripted".to_owned();
        Self {
            info: ModelInfo { name, created: 0, context_length: 4096, vocab_size: 500, has_tokenizer: true },
            health: Mutex::new(Health::Ready),
            refuses: Mutex::default(),
            accepted: Mutex::default(),
            answers: Mutex::default(),
            num_tokenized: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            metrics: Metrics::default(),
        }
    }

    fn num_accepted(&self) -> usize {
        self.accepted.lock().expect("no panic").len()
    }

    fn set_health(&self, health: Health) {
        *self.health.lock().expect("no panic") = health;
    }

    fn refuse_with(&self, error: Option<SubmitError>) {
        *self.refuses.lock().expect("no panic") = error;
    }

    /// Sends an event to the answer at this place among those that are open, and forgets the answer if that was the last one.
    fn send(&self, at: usize, event: EngineEvent) {
        let mut answers = self.answers.lock().expect("no panic");
        let is_last = !matches!(event, EngineEvent::Delta(_));
        // Its client may have left.
        let _ = answers[at].try_send(event);
        if is_last {
            answers.remove(at);
        }
    }

    fn num_open(&self) -> usize {
        self.answers.lock().expect("no panic").len()
    }
}

impl Engine for Scripted {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit_all(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError> {
        if let Some(error) = self.refuses.lock().expect("no panic").clone() {
            return Err(error);
        }
        let prompt = |request: &GenerationRequest| match &request.prompt {
            Prompt::Tokens(tokens) => tokens.clone(),
            other => panic!("not tokenized: {other:?}"),
        };
        let prompts: Vec<Vec<u32>> = submission.requests.iter().map(prompt).collect();
        let (senders, streams): (Vec<_>, Vec<_>) = (0..prompts.len() * submission.n)
            .map(|_| mpsc::channel(8))
            .map(|(sender, receiver)| (sender, EventStream::new(receiver)))
            .unzip();
        self.accepted.lock().expect("no panic").push(prompts);
        self.answers.lock().expect("no panic").extend(senders);
        Ok(streams)
    }

    fn has_room(&self, client: &ClientId, _num_answers: usize) -> Result<(), SubmitError> {
        if *client == ClientId::new("flood") {
            return Err(SubmitError::QueueFull { max_queued_requests: 1 });
        }
        Ok(())
    }

    fn prefix_cache_tokens(&self) -> usize {
        CACHE_TOKENS
    }

    fn probe(&self) -> Result<EventStream, SubmitError> {
        self.submit(request(&[0]))
    }

    fn num_steps(&self) -> u64 {
        7
    }

    fn encode(&self, text: &str, _add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn decode(&self, tokens: &[u32], _skip_special_tokens: bool) -> Result<String, SubmitError> {
        Ok(format!("{tokens:?}"))
    }

    fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        self.num_tokenized.fetch_add(1, Ordering::Relaxed);
        match prompt {
            Prompt::Text(text) => self.encode(&text, true),
            other => Err(SubmitError::Prompt(format!("{other:?}"))),
        }
    }

    fn flush_cache(&self) {}

    fn server_info(&self) -> Value {
        json!({"model": "scripted", "settings": {"devices": ["host:0"]}})
    }

    fn health(&self) -> Health {
        match self.draining.load(Ordering::Relaxed) {
            true => Health::Draining,
            false => self.health.lock().expect("no panic").clone(),
        }
    }

    fn replica_metrics(&self) -> Vec<&Metrics> {
        vec![&self.metrics]
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }
}

fn replicas(num: usize) -> Replicas<Scripted> {
    Replicas::new((0..num).map(|_| Scripted::new()).collect())
}

fn request(prompt: &[u32]) -> GenerationRequest {
    GenerationRequest { max_tokens: Some(8), ..GenerationRequest::greedy(Prompt::Tokens(prompt.to_vec())) }
}

/// A prompt of this many blocks that no other `first` begins like.
fn prompt(blocks: usize, first: u32) -> Vec<u32> {
    (0..(blocks * BLOCK_TOKENS) as u32).map(|at| first * 1000 + at).collect()
}

fn finished() -> EngineEvent {
    EngineEvent::Finished { reason: FinishReason::Stop, usage: Usage::default() }
}

fn loads(replicas: &Replicas<Scripted>) -> Vec<(usize, usize)> {
    replicas.loads.iter().map(|load| (load.tokens(), load.answers())).collect()
}

/// How many submissions each replica has accepted.
fn accepted(replicas: &Replicas<Scripted>) -> Vec<usize> {
    replicas.engines().iter().map(Scripted::num_accepted).collect()
}

#[test]
fn a_prefix_goes_where_it_was_and_other_prompts_spread() {
    let replicas = replicas(2);
    let mut streams = Vec::new();
    let mut ask = |prompt: &[u32]| streams.push(replicas.submit(request(prompt)).expect("accepted"));
    ask(&prompt(20, 1));
    ask(&prompt(20, 2));
    assert_eq!(accepted(&replicas), [1, 1], "the second one had the other replica free");
    for at in 3..8 {
        ask(&[&prompt(20, 1)[..], &prompt(1, at)].concat());
    }
    assert_eq!(accepted(&replicas), [6, 1], "they share 20 blocks with the first");
    for at in 100..108 {
        ask(&prompt(3, at));
    }
    let spread = accepted(&replicas);
    assert!(spread[1] > 4, "prompts that share nothing even the load out: {spread:?}");
    replicas.flush_cache();
    assert_eq!(replicas.router().route(&[], 1, &[Standing::Serves; 2]).map(|(at, _)| at), Some(1), "less to do");
}

#[test]
fn a_flood_of_one_prefix_is_computed_on_both_and_loads_stay_close() {
    let replicas = replicas(2);
    let _streams: Vec<_> = (0..200)
        .map(|at| {
            let prompt = [&prompt(10, 1)[..], &prompt(1, 100 + at)].concat();
            replicas.submit(request(&prompt)).expect("accepted")
        })
        .collect();
    let [(one, _), (two, _)] = loads(&replicas)[..] else { panic!("two replicas") };
    let (most, least) = (one.max(two), one.min(two));
    assert!(most <= least + least / 4 + 11 * BLOCK_TOKENS + 32, "{most} and {least}");
    let _others: Vec<_> =
        (0..200).map(|at| replicas.submit(request(&prompt(2, 1000 + at))).expect("accepted")).collect();
    let [(one, _), (two, _)] = loads(&replicas)[..] else { panic!("two replicas") };
    assert!(one.abs_diff(two) <= 2 * (2 * BLOCK_TOKENS + 32), "strangers even it out: {one} and {two}");
}

#[test]
fn the_load_of_an_answer_ends_with_its_prompt_and_with_itself() {
    let replicas = replicas(2);
    let submission = Submission { n: 3, ..Submission::one(request(&prompt(2, 1))) };
    let mut streams = replicas.submit_all(submission).expect("accepted");
    assert_eq!(loads(&replicas)[0], (3 * (2 * BLOCK_TOKENS + 8 * 4), 3), "all answers are together");
    let engine = &replicas.engines()[0];
    engine.send(0, EngineEvent::Delta(Delta::default()));
    streams[0].next_blocking().expect("a token");
    assert_eq!(loads(&replicas)[0], (2 * 2 * BLOCK_TOKENS + 3 * 8 * 4, 3), "its prompt is computed");
    engine.send(0, finished());
    streams[0].next_blocking().expect("the end");
    engine.send(0, EngineEvent::Failed(RequestError::Engine("lost".into())));
    streams[1].next_blocking().expect("the end");
    assert_eq!(loads(&replicas)[0], (2 * BLOCK_TOKENS + 8 * 4, 1));
    drop(streams);
    assert_eq!(loads(&replicas), [(0, 0); 2], "the client left");
}

#[test]
fn text_becomes_tokens_once_and_only_if_there_is_room() {
    let replicas = replicas(3);
    let mut submission = Submission::one(GenerationRequest::greedy(Prompt::Text("abc".into())));
    submission.client = ClientId::new("flood");
    let refused = replicas.submit_all(submission.clone()).expect_err("no room");
    assert_eq!(refused, SubmitError::QueueFull { max_queued_requests: 1 });
    let tokenized = |at: usize| replicas.engines()[at].num_tokenized.load(Ordering::Relaxed);
    assert_eq!(tokenized(0), 0);
    submission.client = ClientId::default();
    replicas.submit_all(submission).expect("accepted");
    assert_eq!([0, 1, 2].map(tokenized), [1, 0, 0]);
    let mut text = String::new();
    replicas.engines()[0].metrics.encode(&mut text).expect("a string takes everything");
    assert!(text.contains("bcg_submissions_refused_total{reason=\"queue_full\"} 1"), "{text}");
}

#[test]
fn an_ill_replica_gets_nothing_and_says_so() {
    let replicas = replicas(2);
    let [first, second] = replicas.engines() else { panic!("two replicas") };
    let known = prompt(20, 1);
    let _kept = replicas.submit(request(&known)).expect("accepted");
    first.set_health(Health::Failed("the device is lost".into()));
    let _moved = replicas.submit(request(&known)).expect("accepted");
    assert_eq!(accepted(&replicas), [1, 1], "though the first one had its prefix");
    let ill = "replica 0: the device is lost";
    assert_eq!(replicas.health(), Health::Degraded(ill.into()));
    let info = replicas.server_info();
    assert_eq!((&info["dp_size"], &info["replicas"][0]["status"]), (&json!(2), &json!("failed")));
    assert_eq!(info["replicas"][1]["answers"], 1);
    assert!(replicas.probe().is_ok() && second.num_open() == 2, "the one that serves is asked");
    // One that ended since it was looked at.
    first.set_health(Health::Ready);
    let stopped = || Some(SubmitError::Stopped("gone".into()));
    second.refuse_with(stopped());
    let _again = replicas.submit(request(&prompt(1, 7))).expect("the other one takes it");
    first.refuse_with(stopped());
    assert_eq!(replicas.submit(request(&known)).expect_err("none"), SubmitError::Stopped("gone".into()));
    [first, second].iter().for_each(|engine| engine.set_health(Health::Failed("gone".into())));
    assert_eq!(replicas.health(), Health::Failed("replica 0: gone; replica 1: gone".into()));
    // One that is loaded again keeps what it is given.
    first.refuse_with(None);
    assert!(replicas.submit(request(&known)).is_ok(), "where none serves, one that may serve again is asked");
}

#[test]
fn a_refusal_that_another_replica_would_repeat_is_passed_on() {
    let replicas = replicas(2);
    let wrong = SubmitError::Prompt("a wrong token".into());
    replicas.engines().iter().for_each(|engine| engine.refuse_with(Some(wrong.clone())));
    assert_eq!(replicas.submit(request(&[1])).expect_err("wrong"), wrong);
    assert_eq!(loads(&replicas), [(0, 0); 2]);
}

#[test]
fn a_drain_reaches_all() {
    let replicas = replicas(2);
    assert_eq!((replicas.health(), replicas.num_steps()), (Health::Ready, 14));
    replicas.engines()[1].set_health(Health::Failed("gone".into()));
    replicas.drain();
    assert!(replicas.engines().iter().all(|engine| engine.draining.load(Ordering::Relaxed)));
    assert_eq!(replicas.health(), Health::Draining);
}

/// Random submissions, answers, clients that leave, replicas that fall ill, end and come back.
fn random_life(seed: u64, rng: &mut SmallRng) {
    let replicas = replicas(rng.random_range(2..=4));
    let engines = replicas.engines();
    let mut streams: Vec<EventStream> = Vec::new();
    let (mut submitted, mut answers_submitted) = (0, 0);
    for _ in 0..300 {
        let engine = &engines[rng.random_range(0..engines.len())];
        match rng.random_range(0..10) {
            0..=3 => {
                let known = prompt(rng.random_range(0..6), rng.random_range(0..4));
                let requests = (0..rng.random_range(1..=3)).map(|at| request(&[&known[..], &[at, 1]].concat()));
                let submission = Submission {
                    requests: requests.collect(),
                    n: rng.random_range(1..=3),
                    ..Submission::one(request(&[1]))
                };
                let answers = submission.requests.len() * submission.n;
                if let Ok(given) = replicas.submit_all(submission) {
                    assert_eq!(given.len(), answers, "seed {seed}: every answer has a stream");
                    (submitted, answers_submitted) = (submitted + 1, answers_submitted + answers);
                    streams.extend(given);
                }
            }
            4 | 5 if engine.num_open() > 0 => {
                let at = rng.random_range(0..engine.num_open());
                let end = [
                    EngineEvent::Delta(Delta::default()),
                    finished(),
                    EngineEvent::Failed(RequestError::Engine("lost".into())),
                ];
                engine.send(at, end[rng.random_range(0..3)].clone());
            }
            6 if !streams.is_empty() => drop(streams.swap_remove(rng.random_range(0..streams.len()))),
            7 => engine.set_health([Health::Ready, Health::Failed("ill".into())][rng.random_range(0..2)].clone()),
            8 => engine.refuse_with([None, Some(SubmitError::Stopped("gone".into()))][rng.random_range(0..2)].clone()),
            _ => replicas.flush_cache(),
        }
        assert!(loads(&replicas).iter().map(|(_, answers)| answers).sum::<usize>() <= answers_submitted);
        assert!(replicas.router().num_remembered() <= engines.len() * CACHE_TOKENS / BLOCK_TOKENS, "seed {seed}");
    }
    assert_eq!(accepted(&replicas).iter().sum::<usize>(), submitted, "seed {seed}: each has one replica");
    // All that is left ends, by its engine or with it.
    engines.iter().for_each(|engine| engine.answers.lock().expect("no panic").clear());
    for stream in &mut streams {
        let mut ends = 0;
        while let Some(event) = stream.next_blocking() {
            ends += usize::from(!matches!(event, EngineEvent::Delta(_)));
        }
        assert_eq!(ends, 1, "seed {seed}: each answer ends once");
    }
    assert!(loads(&replicas).iter().all(|load| *load == (0, 0)), "seed {seed}: {:?}", loads(&replicas));
}

#[test]
fn no_submission_is_lost_and_loads_return_to_zero() {
    for seed in 0..200 {
        random_life(seed, &mut SmallRng::seed_from_u64(seed));
    }
}

#[test]
fn a_choice_takes_microseconds() {
    const SUBMISSIONS: u32 = 2000;
    let replicas = replicas(8);
    let prompts: Vec<Vec<u32>> = (0..16).map(|at| prompt(64, at)).collect();
    let mut times = Vec::new();
    for at in 0..SUBMISSIONS {
        let submission = Submission::one(request(&prompts[at as usize % prompts.len()]));
        let began = Instant::now();
        let asked: Vec<Asked> = submission.requests.iter().map(|one| Asked::new(&replicas.names, one)).collect();
        let routed = replicas.router().route(&asked, 1, &[Standing::Serves; 8]);
        times.push(began.elapsed());
        drop(routed);
    }
    times.sort_unstable();
    let median = times[times.len() / 2];
    println!("a choice among 8 replicas for a prompt of 4096 tokens: {median:?}");
    // A forward of such a prompt takes 100 ms.
    assert!(median < Duration::from_millis(1), "{median:?}");
}
