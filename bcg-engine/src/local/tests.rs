//! What an engine promises, with a model that counts.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use bcg_models::state::PagePool;
use bcg_models::{SampledToken, SequenceInput};

use super::super::metrics::ReasonLabel;
use super::super::model::{Damage, GraphCounters, StepError};
use super::super::prefix_cache::PrefixCache;
use super::super::scheduler::{Limits, Scheduler};
use super::super::{EngineEvent, FinishReason};
use super::*;

/// Counts upwards from the last token; token 100 makes a step fail, 150 makes its launch fail, 200 makes it panic, 400 loses
/// the device, 450 does so at the launch, and 460 loses the context.
struct Counting {
    gate: Option<Arc<Mutex<Receiver<()>>>>,
    chosen: Vec<u32>,
}

impl StepModel for Counting {
    type Pending = Vec<u32>;

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Vec<u32>, StepError> {
        let last = |sequence: &SequenceInput<'_>| match sequence.chosen {
            Some(token) => self.chosen[token.row],
            None => sequence.tokens[sequence.tokens.len() - 1],
        };
        self.chosen = batch.iter().map(|sequence| last(sequence) + 1).collect();
        if self.chosen.contains(&451) {
            return Err(StepError { message: "no launch".to_owned(), damage: Damage::Model });
        }
        if self.chosen.contains(&151) {
            return Err(StepError::harmless("out of luck"));
        }
        Ok(self.chosen.clone())
    }

    fn collect(&mut self, step: Vec<u32>) -> Result<Vec<SampledToken>, StepError> {
        if let Some(gate) = &self.gate {
            let _ = gate.lock().expect("lock").recv();
        }
        let failed = |message: &str, damage| StepError { message: message.to_owned(), damage };
        for &id in &step {
            match id {
                101 => return Err(failed("out of luck", Damage::Nothing)),
                401 => return Err(failed("device lost", Damage::Model)),
                461 => return Err(failed("a trap", Damage::Context)),
                _ => assert_ne!(id, 201, "a bug"),
            }
        }
        Ok(step.into_iter().map(|id| SampledToken { id, logprob: None, top: Vec::new(), logits: None }).collect())
    }

    fn stats(&self) -> GraphCounters {
        GraphCounters::default()
    }
}

fn engine(max_queued_requests: usize, gated: bool) -> (LocalEngine, Option<Sender<()>>) {
    engine_with(QueueOptions { max_queued_requests, ..QueueOptions::default() }, gated, true)
}

fn engine_with(queue: QueueOptions, gated: bool, has_tokenizer: bool) -> (LocalEngine, Option<Sender<()>>) {
    engine_watched(queue, gated, has_tokenizer, Duration::from_secs(60))
}

fn engine_watched(
    queue: QueueOptions,
    gated: bool,
    has_tokenizer: bool,
    watchdog: Duration,
) -> (LocalEngine, Option<Sender<()>>) {
    let (open, gate) = channel();
    let gate = gated.then(|| Arc::new(Mutex::new(gate)));
    let engine = LocalEngine::start(move || {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        let name = "counting".to_owned();
        let info = ModelInfo { name, created: 0, context_length: 64, vocab_size: 462, has_tokenizer };
        let options = LocalOptions {
            info,
            tokenizer: has_tokenizer.then(|| Tokenizer::load(&dir)).transpose()?,
            chat: ChatTemplate::load(&dir)?,
            eos: vec![2],
            queue,
            watchdog: WatchdogOptions { timeout: Some(watchdog), captures_lazily: false },
            prefix_cache_tokens: 128,
            settings: Value::Null,
        };
        let limits = Limits { max_running_requests: 2, chunked_prefill_size: 64, context_length: 64 };
        let scheduler = Scheduler::new(limits, PrefixCache::new(PagePool::new(8, 16), true));
        Ok((Counting { gate: gate.clone(), chosen: Vec::new() }, scheduler, options))
    });
    (engine.expect("starts"), gated.then_some(open))
}

fn request(first: u32, max_tokens: usize) -> GenerationRequest {
    let mut request = GenerationRequest::greedy(Prompt::Tokens(vec![first]));
    request.max_tokens = Some(max_tokens);
    request
}

fn tokens(mut events: EventStream) -> Result<(Vec<u32>, FinishReason), String> {
    let mut tokens = Vec::new();
    loop {
        match events.next_blocking() {
            Some(EngineEvent::Delta(delta)) => tokens.extend(delta.tokens),
            Some(EngineEvent::Finished { reason, .. }) => return Ok((tokens, reason)),
            Some(EngineEvent::Failed(error)) => return Err(error.to_string()),
            None => return Err("no last event".to_owned()),
        }
    }
}

#[track_caller]
fn eventually(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..500 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("never: {what}");
}

#[test]
fn every_request_gets_its_own_answer() {
    let (engine, _) = engine(16, false);
    let streams: Vec<_> = (0..8).map(|at| engine.submit(request(300 + 10 * at, 5)).expect("accepted")).collect();
    for (at, stream) in (0..8).zip(streams) {
        let first = 300 + 10 * at;
        assert_eq!(tokens(stream), Ok(((first + 1..=first + 5).collect(), FinishReason::Length)));
    }
    eventually("all pages are free", || engine.metrics().kv_pages_used.get() == 0);
}

#[test]
fn one_request_too_many_is_refused_and_later_ones_are_not() {
    let (engine, open) = engine(2, true);
    let mut streams = vec![engine.submit(request(300, 2)).expect("accepted")];
    eventually("the first request runs", || engine.siblings.submissions.taken() == 0);
    streams.push(engine.submit(request(310, 2)).expect("waits"));
    streams.push(engine.submit(request(320, 2)).expect("waits"));
    assert_eq!(engine.submit(request(330, 2)).expect_err("full"), SubmitError::QueueFull { max_queued_requests: 2 });
    drop(open);
    for stream in streams {
        assert!(tokens(stream).is_ok());
    }
    engine.submit(request(330, 2)).expect("there is room again");
}

/// A submission of one request with `n` answers.
fn answers(client: &str, first: u32, max_tokens: usize, n: usize) -> Submission {
    Submission { n, client: ClientId::new(client), ..Submission::one(request(first, max_tokens)) }
}

#[test]
fn answers_wait_for_their_turn_and_take_one_place_together() {
    let (engine, open) = engine(2, true);
    let streams = engine.submit_all(answers("a", 300, 2, 128)).expect("accepted");
    eventually("two run", || engine.siblings.answers.taken() == 126);
    assert_eq!(engine.siblings.submissions.taken(), 1);
    let other = engine.submit_all(answers("b", 320, 2, 64)).expect("accepted");
    let full = engine.submit_all(answers("b", 330, 2, 1)).expect_err("both places are taken");
    assert_eq!(full, SubmitError::QueueFull { max_queued_requests: 2 });
    let too_many = engine.submit_all(answers("c", 330, 2, 5000)).expect_err("more than can ever wait").to_string();
    assert!(too_many.contains("5000 answers; no more than 4096"), "{too_many}");
    assert_eq!(
        (engine.siblings.submissions.taken(), engine.siblings.answers.taken()),
        (2, 126 + 64),
        "refusals hold nothing"
    );
    drop(open);
    for stream in streams {
        assert_eq!(tokens(stream), Ok((vec![301, 302], FinishReason::Length)));
    }
    assert!(other.into_iter().all(|stream| tokens(stream).is_ok()));
    assert_eq!((engine.siblings.submissions.taken(), engine.siblings.answers.taken()), (0, 0));
    let refused = engine.metrics().refused.get_or_create(&ReasonLabel { reason: "queue_full" }).get();
    assert_eq!(refused, 1);
}

#[test]
fn a_submission_is_refused_as_a_whole() {
    let (engine, open) = engine(4, true);
    let requests = vec![request(300, 2), request(462, 2)];
    let refused = engine.submit_all(Submission { requests, ..answers("a", 0, 1, 3) });
    assert!(matches!(refused, Err(SubmitError::Prompt(_))));
    let gone = answers("a", 300, 2, 3);
    gone.cancelled.cancel();
    assert_eq!(engine.submit_all(gone).expect_err("the client left"), SubmitError::Cancelled);
    assert_eq!((engine.siblings.submissions.taken(), engine.siblings.answers.taken()), (0, 0));
    drop(open);
    assert_eq!(engine.metrics().prompt_tokens.get(), 0, "nothing of them reached the worker");
}

#[test]
fn a_client_with_few_requests_is_served_beside_one_with_many() {
    let (engine, open) = engine(256, true);
    let many = engine.submit_all(answers("a", 300, 20, 100)).expect("accepted");
    eventually("two run", || engine.siblings.answers.taken() == 98);
    let mut one = engine.submit_all(answers("b", 320, 3, 1)).expect("accepted").remove(0);
    let open = open.expect("gated");
    let before = engine.num_steps();
    // It may have been on its way when the next two steps were launched.
    (0..4).for_each(|_| open.send(()).expect("the worker lives"));
    assert!(matches!(one.next_blocking(), Some(EngineEvent::Delta(_))));
    assert!(engine.num_steps() <= before + 4);
    drop(open);
    assert!(many.into_iter().all(|stream| tokens(stream).is_ok()));
}

#[test]
fn a_request_that_waits_too_long_fails_and_one_that_ran_does_not() {
    let queue = QueueOptions { queue_timeout: Some(Duration::from_millis(300)), ..QueueOptions::default() };
    let (engine, open) = engine_with(queue, true, false);
    let running = engine.submit_all(answers("a", 300, 20, 2)).expect("accepted");
    eventually("two run", || engine.siblings.submissions.taken() == 0);
    let waiting = engine.submit(request(320, 2)).expect("waits");
    std::thread::sleep(Duration::from_millis(400));
    let open = open.expect("gated");
    (0..2).for_each(|_| open.send(()).expect("the worker lives"));
    let error = tokens(waiting).expect_err("it waited too long");
    assert!(error.contains("waited 0 seconds in the queue"), "{error}");
    drop(open);
    assert!(running.into_iter().all(|stream| tokens(stream).is_ok()));
    let ended = |reason| engine.metrics().finished.get_or_create(&ReasonLabel { reason }).get();
    assert_eq!((ended("queue_timeout"), ended("failed"), engine.siblings.submissions.taken()), (1, 0, 0));
}

#[test]
fn a_probe_is_answered_though_the_queue_is_full() {
    let (engine, open) = engine(2, true);
    let mut streams = vec![engine.submit(request(300, 4)).expect("accepted")];
    eventually("it runs", || engine.siblings.submissions.taken() == 0);
    streams.extend((0..2).map(|_| engine.submit(request(310, 4)).expect("waits")));
    engine.submit(request(310, 4)).expect_err("full");
    let probes: Vec<_> = (0..PROBES_MAX).map(|_| engine.probe().expect("it takes no place in the queue")).collect();
    assert_eq!(engine.probe().expect_err("enough"), SubmitError::QueueFull { max_queued_requests: PROBES_MAX });
    drop(open);
    assert!(probes.into_iter().all(|stream| tokens(stream).is_ok_and(|(tokens, _)| tokens.len() == 1)));
    assert!(streams.into_iter().all(|stream| tokens(stream).is_ok()));
}

#[test]
fn a_dropped_stream_frees_its_pages() {
    let (engine, open) = engine(4, true);
    let stream = engine.submit(request(300, 60)).expect("accepted");
    let open = open.expect("gated");
    open.send(()).expect("the worker lives");
    eventually("the request holds pages", || engine.metrics().kv_pages_used.get() > 0);
    drop(stream);
    open.send(()).expect("the worker lives");
    eventually("its pages are free", || engine.metrics().kv_pages_used.get() == 0);
}

#[test]
fn a_failed_step_fails_the_request_that_is_to_blame_and_no_other() {
    let (engine, _) = engine(64, false);
    // At its collecting, by a panic, at its launch.
    for (bad, message) in [(98, "out of luck"), (198, "a bug"), (148, "out of luck")] {
        let others: Vec<_> = (0..6).map(|at| engine.submit(request(300 + at, 20)).expect("accepted")).collect();
        let error = tokens(engine.submit(request(bad, 10)).expect("accepted")).expect_err("fails");
        assert!(error.contains("step of this request failed") && error.contains(message), "{error}");
        for (at, stream) in (0..6).zip(others) {
            assert_eq!(tokens(stream), Ok(((301 + at..=320 + at).collect(), FinishReason::Length)), "{bad}");
        }
        assert_eq!(engine.health(), Health::Ready);
    }
    let metrics = engine.metrics();
    assert!(metrics.failed_steps.get() >= 6 && metrics.retried_steps.get() >= 3);
    eventually("all pages are free", || metrics.kv_pages_used.get() == 0);
}

#[test]
fn steps_that_fail_for_their_requests_never_count_as_a_lost_device() {
    let (engine, _) = engine(64, false);
    let bad: Vec<_> = (0..20).map(|_| engine.submit(request(100, 10)).expect("accepted")).collect();
    let good = engine.submit(request(300, 10)).expect("accepted");
    assert!(bad.into_iter().all(|stream| tokens(stream).is_err()));
    assert_eq!(tokens(good), Ok(((301..=310).collect(), FinishReason::Length)));
    assert_eq!(engine.health(), Health::Ready);
}

#[test]
fn a_lost_context_ends_the_engine_at_once() {
    let (engine, open) = engine(4, true);
    let running = engine.submit(request(459, 10)).expect("accepted");
    eventually("it runs", || engine.siblings.submissions.taken() == 0);
    let waiting: Vec<_> = (0..2).map(|_| engine.submit(request(300, 10)).expect("accepted")).collect();
    drop(open);
    for stream in std::iter::once(running).chain(waiting) {
        let error = tokens(stream).expect_err("the process must end");
        assert!(error.contains("a trap"), "{error}");
    }
    let given_up = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    given_up.block_on(engine.given_up());
    assert!(matches!(engine.health(), Health::Failed(error) if error.contains("only a new process")));
}

#[test]
fn a_lost_device_fails_what_runs_and_keeps_what_waits() {
    let (engine, open) = engine(4, true);
    let running: Vec<_> = [398, 300].map(|first| engine.submit(request(first, 10)).expect("accepted")).into();
    let open = open.expect("gated");
    open.send(()).expect("the worker lives");
    eventually("two run", || engine.siblings.submissions.taken() == 0);
    let waiting = engine.submit(request(310, 2)).expect("waits");
    drop(open);
    for stream in running {
        let error = tokens(stream).expect_err("was under way");
        assert!(error.contains("device lost"), "{error}");
    }
    assert_eq!(tokens(waiting), Ok((vec![311, 312], FinishReason::Length)));
    assert_eq!(engine.health(), Health::Ready);
}

#[test]
fn a_device_that_is_lost_at_a_launch_is_named_to_those_of_the_step_before() {
    let (engine, open) = engine(4, true);
    let first = engine.submit(request(447, 10)).expect("accepted");
    eventually("it runs", || engine.siblings.submissions.taken() == 0);
    let last_in_the_step_before = engine.submit(request(300, 1)).expect("accepted");
    drop(open);
    let error = tokens(first).expect_err("its step could not be launched");
    assert!(error.contains("step of this request failed: no launch"), "{error}");
    let error = tokens(last_in_the_step_before).expect_err("was under way");
    assert!(error.contains("the device was lost while it worked on this request: no launch"), "{error}");
}

#[test]
fn a_device_that_is_lost_twice_ends_the_engine() {
    let (engine, _) = engine(4, false);
    for message in ["device lost", "device lost"] {
        let error = tokens(engine.submit(request(399, 10)).expect("accepted")).expect_err("fails");
        assert!(error.contains(message), "{error}");
    }
    let given_up = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    given_up.block_on(engine.given_up());
    assert!(matches!(engine.health(), Health::Failed(error) if error.contains("a second time")));
    eventually("it takes nothing any more", || engine.submit(request(300, 1)).is_err());
}

#[test]
fn a_draining_engine_finishes_and_takes_nothing_new() {
    let (engine, open) = engine(4, true);
    let stream = engine.submit(request(300, 3)).expect("accepted");
    engine.drain();
    assert_eq!(engine.submit(request(300, 3)).expect_err("draining"), SubmitError::ShuttingDown);
    assert_eq!(engine.health(), Health::Draining);
    drop(open);
    assert!(tokens(stream).is_ok());
}

#[test]
fn an_engine_that_is_dropped_ends_its_streams_and_its_thread() {
    let (engine, open) = engine(4, true);
    let mut streams = vec![engine.submit(request(300, 50)).expect("accepted")];
    eventually("the first request runs", || engine.siblings.submissions.taken() == 0);
    streams.extend([310, 320].map(|first| engine.submit(request(first, 50)).expect("accepted")));
    let shared = engine.shared.clone();
    let (sender, ended) = channel();
    let dropping = std::thread::spawn(move || drop(engine));
    // The gate is still shut: no answer can be complete when the engine goes.
    eventually("the engine goes", || shared.stop.load(Ordering::Relaxed));
    drop(open);
    for stream in streams {
        let sender = sender.clone();
        std::thread::spawn(move || sender.send(tokens(stream)));
    }
    for _ in 0..3 {
        let end = ended.recv_timeout(Duration::from_secs(10)).expect("every stream ends in time");
        let error = end.expect_err("no answer was complete");
        assert!(error.contains("before the answer was complete"), "{error}");
    }
    eventually("the drop returns", || dropping.is_finished());
    dropping.join().expect("the drop does not panic");
    assert_eq!(Arc::strong_count(&shared), 1, "the engine's thread, which holds another, was joined");
}

#[test]
fn a_call_that_never_returns_is_noticed_and_the_engine_can_be_dropped_all_the_same() {
    let timeout = Duration::from_millis(40);
    let (engine, open) = engine_watched(QueueOptions::default(), true, false, timeout);
    let began = Instant::now();
    let mut stream = engine.submit(request(300, 10)).expect("accepted");
    let open = open.expect("gated");
    (0..3).for_each(|_| open.send(()).expect("the worker lives"));
    (0..3).for_each(|_| assert!(matches!(stream.next_blocking(), Some(EngineEvent::Delta(_)))));
    let waiting = engine.submit(request(300, 10)).expect("accepted");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let EngineEnd::Stuck(why) = runtime.block_on(engine.given_up()) else { panic!("it did not give up") };
    assert!(why.contains("the wait for step 4 (decode, 1 sequences, 1 tokens) has not ended"), "{why}");
    assert!(began.elapsed() < timeout * 100, "{:?}", began.elapsed());
    assert_eq!(engine.health(), Health::Failed(why.clone()));
    for stream in [stream, waiting] {
        assert_eq!(tokens(stream).expect_err("not complete"), why, "nobody waits for a thread that hangs");
    }
    assert_eq!(engine.siblings.submissions.taken() + engine.siblings.answers.taken(), 0, "nor for its places");
    assert!(matches!(engine.submit(request(300, 1)), Err(SubmitError::Stopped(_))));
    let dropping = Instant::now();
    drop(engine);
    assert!(dropping.elapsed() < STUCK_WAIT_MAX * 5, "{:?}", dropping.elapsed());
    // The call returns at last, to nobody.
    drop(open);
}

#[test]
fn an_engine_without_work_or_with_slow_work_is_not_stuck() {
    let timeout = Duration::from_millis(100);
    let (engine, open) = engine_watched(QueueOptions::default(), true, false, timeout);
    std::thread::sleep(timeout * 3);
    assert_eq!(engine.health(), Health::Ready, "it has nothing to do");
    let stream = engine.submit(request(300, 10)).expect("accepted");
    let open = open.expect("gated");
    for _ in 0..12 {
        std::thread::sleep(timeout / 4);
        let _ = open.send(());
    }
    assert!(tokens(stream).is_ok());
    assert_eq!(engine.health(), Health::Ready, "no step took long");
}

#[test]
fn lengths_and_unknown_tokens_are_checked_before_queueing() {
    let (engine, _) = engine(4, false);
    assert_eq!(
        engine.submit(request(300, 64)).expect_err("one too many"),
        SubmitError::ContextLength { prompt: 1, max_tokens: 64, context: 64 }
    );
    assert!(matches!(engine.submit(request(462, 1)), Err(SubmitError::Prompt(_))));
    let empty = GenerationRequest::greedy(Prompt::Tokens(Vec::new()));
    assert!(matches!(engine.submit(empty), Err(SubmitError::Prompt(_))));
    assert_eq!(engine.siblings.submissions.taken(), 0);
}

#[test]
fn without_a_tokenizer_ids_are_answered_with_ids_and_text_is_refused() {
    let (engine, _) = engine_with(QueueOptions::default(), false, false);
    let stream = engine.submit(request(300, 3)).expect("accepted");
    assert_eq!(tokens(stream), Ok((vec![301, 302, 303], FinishReason::Length)));
    let text = GenerationRequest::greedy(Prompt::Text("3+4".into()));
    let chat = GenerationRequest::greedy(Prompt::chat(Vec::new()));
    let stop = GenerationRequest { stop: vec!["x".into()], ..request(300, 3) };
    let logprobs = GenerationRequest { top_logprobs: Some(0), ..request(300, 3) };
    for refused in [text, chat, stop, logprobs] {
        let error = engine.submit(refused).expect_err("needs text").to_string();
        assert!(error.contains("skip_tokenizer_init"), "{error}");
    }
}

#[test]
fn a_failed_load_is_reported() {
    let failed = LocalEngine::start::<Counting, _>(|| anyhow::bail!("no weights"));
    assert!(failed.expect_err("fails").to_string().contains("no weights"));
}

#[test]
fn a_token_that_the_model_does_not_know_is_refused_in_every_prompt() {
    let engine = LocalEngine::start(|| {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        let info =
            ModelInfo { name: String::new(), created: 0, context_length: 64, vocab_size: 40, has_tokenizer: true };
        let options = LocalOptions {
            info,
            tokenizer: Some(Tokenizer::load(&dir)?),
            chat: ChatTemplate::load(&dir)?,
            eos: vec![2],
            queue: QueueOptions::default(),
            watchdog: WatchdogOptions::default(),
            prefix_cache_tokens: 128,
            settings: Value::Null,
        };
        let limits = Limits { max_running_requests: 1, chunked_prefill_size: 64, context_length: 64 };
        let scheduler = Scheduler::new(limits, PrefixCache::new(PagePool::new(4, 16), true));
        Ok((Counting { gate: None, chosen: Vec::new() }, scheduler, options))
    });
    let engine = engine.expect("starts");
    let chat = Prompt::chat(vec![bcg_models::ChatMessage::new("user", "x")]);
    for prompt in [Prompt::Tokens(vec![40]), Prompt::Text("x".to_owned()), chat] {
        let error = engine.submit(GenerationRequest::greedy(prompt)).expect_err("unknown").to_string();
        assert!(error.contains("is not in the vocabulary of 40 tokens"), "{error}");
    }
}

#[test]
fn text_makes_no_control_tokens() {
    let (engine, _) = engine(1, false);
    let chat = Prompt::chat(vec![bcg_models::ChatMessage::new("user", "<|im_end|>")]);
    let count = |tokens: Vec<u32>| tokens.into_iter().filter(|token| *token < 3).count();
    assert_eq!(count(engine.prompt_tokens(chat).expect("tokens")), 3, "those of the template");
    assert_eq!(count(engine.prompt_tokens(Prompt::Text("<|im_end|>".to_owned())).expect("tokens")), 0);
    assert_eq!(count(engine.encode("<|im_end|>", true).expect("tokens")), 0);
}
