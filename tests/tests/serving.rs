//! The engine under many requests at once gives each the tokens that it gives it alone: with and without the prefix cache, in
//! chunks, in mixed batches, when sequences are preempted, and when a step fails because of one of them. A client that asks
//! for little waits a few steps beside one that asks for much, and a device that hangs is noticed.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bcg_cli::args::ServerArgs;
use bcg_engine::local::LocalEngine;
use bcg_engine::metrics::PhaseLabel;
use bcg_engine::model::{GraphCounters, StepError, StepModel};
use bcg_engine::{
    ClientId, Engine, EngineEnd, EngineEvent, EngineOptions, EventStream, GenerationRequest, Health, Prompt,
    RequestError, SamplingParams, Submission, load,
};
use bcg_models::{ModelRunner, PendingStep, SampledToken, SequenceInput};
use bcg_runtime::HostControl;
use clap::Parser;
use serde_json::Value;

const PROBLEMS: usize = 20;

fn data(file: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data").join(file);
    std::fs::read_to_string(path).expect("the data is there")
}

/// Five examples and a question, which all problems but for the question share.
fn prompts() -> Vec<String> {
    let text = |value: &Value, field: &str| value[field].as_str().expect("text").to_owned();
    let shots: Vec<Value> = serde_json::from_str(&data("mini_gsm_shots.json")).expect("JSON");
    let shots: String = shots
        .iter()
        .map(|shot| format!("Question: {}\nAnswer: {}\n\n", text(shot, "question"), text(shot, "answer")))
        .collect();
    let problems = data("mini_gsm_test.jsonl");
    let problems = problems.lines().take(PROBLEMS).map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    problems.map(|problem| format!("{shots}Question: {}\nAnswer: ", text(&problem, "question"))).collect()
}

fn options(flags: &[&str]) -> EngineOptions {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let line = ["bcg-server", "--model", model, "--device", "host", "--context-length", "640"];
    ServerArgs::try_parse_from(line.iter().chain(flags)).expect("flags parse").engine.options()
}

fn engine(flags: &[&str]) -> LocalEngine {
    load::start(&options(flags), |_| ()).expect("starts")
}

fn submit(engine: &LocalEngine, prompt: &str) -> EventStream {
    let mut request = GenerationRequest::greedy(Prompt::Text(prompt.to_owned()));
    (request.max_tokens, request.stop) = (Some(40), vec!["\n".to_owned()]);
    engine.submit(request).expect("accepted")
}

fn tokens(mut stream: EventStream) -> Vec<u32> {
    let mut tokens = Vec::new();
    loop {
        match stream.next_blocking().expect("a last event") {
            EngineEvent::Delta(delta) => tokens.extend(delta.tokens),
            EngineEvent::Finished { .. } => return tokens,
            EngineEvent::Failed(message) => panic!("{message}"),
        }
    }
}

fn all_at_once(engine: &LocalEngine, prompts: &[String]) -> Vec<Vec<u32>> {
    let streams: Vec<_> = prompts.iter().map(|prompt| submit(engine, prompt)).collect();
    streams.into_iter().map(tokens).collect()
}

#[test]
fn many_at_once_have_the_tokens_of_one_at_a_time() {
    let alone = engine(&["--disable-radix-cache"]);
    let expected: Vec<Vec<u32>> = prompts().iter().map(|prompt| tokens(submit(&alone, prompt))).collect();
    assert!(expected.iter().all(|tokens| tokens.len() > 5));
    drop(alone);
    let graphs = "--enable-breakable-cuda-graph";
    for flags in [
        &[][..],
        &["--disable-radix-cache", graphs],
        &["--chunked-prefill-size", "64", graphs, "--capture", "lazy"],
        &["--kv-cache-tokens", "704", "--page-size", "4"],
    ] {
        let engine = engine(flags);
        assert_eq!(all_at_once(&engine, &prompts()), expected, "{flags:?}");
        let metrics = engine.metrics();
        let cached = metrics.cached_prompt_tokens.get();
        assert_eq!(cached > 0, !flags.contains(&"--disable-radix-cache"), "{flags:?}: {cached} tokens were cached");
        assert_eq!(metrics.preemptions.get() > 0, flags.contains(&"--kv-cache-tokens"), "{flags:?}");
        let mixed = metrics.step_time.get(&PhaseLabel { phase: "mixed" }).is_some();
        assert!(mixed, "{flags:?}: prompts ran beside answers");
    }
}

/// With the model divided among two ranks: one plan a step, and the same tokens on both.
#[test]
fn many_at_once_have_the_tokens_of_one_at_a_time_with_two_ranks() {
    let (graphs, prompts) = ("--enable-breakable-cuda-graph", &prompts()[..5]);
    let alone = engine(&["--tp", "2", "--disable-radix-cache"]);
    let expected: Vec<Vec<u32>> = prompts.iter().map(|prompt| tokens(submit(&alone, prompt))).collect();
    drop(alone);
    let engine = engine(&["--tp", "2", "--chunked-prefill-size", "128", graphs, "--capture", "lazy"]);
    assert_eq!(all_at_once(&engine, prompts), expected);
    assert_eq!((engine.metrics().ranks.get(), engine.metrics().failed_steps.get()), (2, 0));
    assert_eq!(engine.server_info()["settings"]["tp"], 2);
}

/// With the layers divided among two stages, and steps under way in both: the tokens of one device, for one request at a time
/// and for many, in chunks, and where pages are few.
#[test]
fn many_at_once_have_the_tokens_of_one_at_a_time_with_a_pipeline() {
    let (graphs, prompts) = ("--enable-breakable-cuda-graph", &prompts()[..5]);
    let alone = engine(&["--disable-radix-cache"]);
    let expected: Vec<Vec<u32>> = prompts.iter().map(|prompt| tokens(submit(&alone, prompt))).collect();
    drop(alone);
    for flags in [
        &["--pp", "2", "--chunked-prefill-size", "128", graphs, "--capture", "lazy"][..],
        &["--pp", "2", "--kv-cache-tokens", "704", "--page-size", "4"],
    ] {
        let engine = engine(flags);
        assert_eq!(tokens(submit(&engine, &prompts[0])), expected[0], "{flags:?}");
        assert_eq!(all_at_once(&engine, prompts), expected, "{flags:?}");
        let metrics = engine.metrics();
        assert_eq!((metrics.ranks.get(), metrics.failed_steps.get()), (2, 0));
        assert_eq!(
            (&engine.server_info()["settings"]["pp"], metrics.cached_prompt_tokens.get() > 0),
            (&2.into(), true)
        );
    }
}

/// Fails each step with this token in it.
const POISON: u32 = 460;

/// A model that fails on purpose and counts its steps.
struct Watched {
    runner: ModelRunner,
    /// Steps that were collected.
    num_steps: Arc<AtomicU64>,
}

impl StepModel for Watched {
    type Pending = (PendingStep, bool);

    fn launch(&mut self, batch: &[SequenceInput<'_>]) -> Result<Self::Pending, StepError> {
        let is_poisoned = batch.iter().any(|sequence| sequence.tokens.contains(&POISON));
        Ok((StepModel::launch(&mut self.runner, batch)?, is_poisoned))
    }

    fn collect(&mut self, (step, is_poisoned): Self::Pending) -> Result<Vec<SampledToken>, StepError> {
        let sampled = StepModel::collect(&mut self.runner, step)?;
        self.num_steps.fetch_add(1, Ordering::SeqCst);
        if is_poisoned { Err(StepError::harmless("poisoned")) } else { Ok(sampled) }
    }

    fn stats(&self) -> GraphCounters {
        StepModel::stats(&self.runner)
    }
}

/// An engine whose steps are counted, and the controls of its device.
fn watched(flags: &[&str]) -> (LocalEngine, Arc<AtomicU64>, HostControl) {
    let (steps, device) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(None)));
    let (num_steps, control) = (Arc::clone(&steps), Arc::clone(&device));
    let engine = load::start_with(
        &options(flags),
        |_| (),
        move |runner: ModelRunner| {
            *control.lock().expect("no panic") = runner.device().host_control().cloned();
            Ok(Watched { runner, num_steps: Arc::clone(&num_steps) })
        },
    );
    let engine = engine.expect("starts");
    let control = device.lock().expect("no panic").take().expect("a host device");
    (engine, steps, control)
}

/// A request whose tokens are drawn at random, from its seed.
fn drawn(prompt: Vec<u32>, seed: u64) -> GenerationRequest {
    let sampling = SamplingParams { temperature: 1.0, ..SamplingParams::greedy() };
    let request = GenerationRequest::greedy(Prompt::Tokens(prompt));
    GenerationRequest { sampling, seed: Some(seed), max_tokens: Some(24), ignore_eos: true, ..request }
}

fn outcome(mut stream: EventStream) -> Result<Vec<u32>, RequestError> {
    let mut tokens = Vec::new();
    loop {
        match stream.next_blocking().expect("a last event") {
            EngineEvent::Delta(delta) => tokens.extend(delta.tokens),
            EngineEvent::Finished { .. } => return Ok(tokens),
            EngineEvent::Failed(error) => return Err(error),
        }
    }
}

#[test]
fn a_poisoned_request_fails_alone_and_others_have_the_tokens_that_they_have_without_it() {
    // Tokens are drawn, so the state of each sequence's random numbers counts too.
    let good = |at: u64| drawn((0..20 + at as u32).map(|token| 8 + (7 * token + at as u32) % 400).collect(), at);
    for flags in [&[][..], &["--disable-radix-cache", "--chunked-prefill-size", "64"]] {
        let (engine, _, _) = watched(flags);
        let submit = |request| engine.submit(request).expect("accepted");
        let expected: Vec<_> = (0..12).map(|at| outcome(submit(good(at))).expect("an answer")).collect();
        let mut streams: Vec<_> = (0..6).map(|at| submit(good(at))).collect();
        // In the prompt, where it poisons one chunk, and twice among the rest.
        let bad: Vec<_> = [70, 3, 3].map(|at| drawn([vec![9; at], vec![POISON; 1], vec![9; 3]].concat(), 0)).into();
        let bad: Vec<_> = bad.into_iter().map(submit).collect();
        streams.extend((6..12).map(|at| submit(good(at))));
        for stream in bad {
            let error = outcome(stream).expect_err("poisoned").to_string();
            assert!(error.contains("step of this request failed: poisoned"), "{error}");
        }
        for (stream, expected) in streams.into_iter().zip(expected) {
            assert_eq!(outcome(stream).expect("an innocent request"), expected, "{flags:?}");
        }
        assert_eq!(engine.health(), Health::Ready);
        let metrics = engine.metrics();
        let [failed, retried] = [metrics.failed_steps.get(), metrics.retried_steps.get()];
        assert!(failed > 3 && retried < 60, "{failed} steps failed, {retried} were tried again");
    }
}

/// Steps, and time, from a short request to its first token.
fn first_token(engine: &LocalEngine, steps: &AtomicU64, at: u32) -> (u64, Duration) {
    let mut request = GenerationRequest::greedy(Prompt::Tokens((0..30).map(|token| 8 + at + token).collect()));
    request.max_tokens = Some(2);
    let (before, began) = (steps.load(Ordering::SeqCst), Instant::now());
    let submission = Submission { client: ClientId::new("few"), ..Submission::one(request) };
    let mut stream = engine.submit_all(submission).expect("accepted").remove(0);
    stream.next_blocking().expect("a token");
    let took = began.elapsed();
    while stream.next_blocking().is_some() {}
    (steps.load(Ordering::SeqCst) - before, took)
}

#[test]
fn a_client_with_short_requests_waits_no_more_than_three_steps_beside_one_with_500_long_ones() {
    let (engine, steps, _) = watched(&["--max-queued-requests", "640", "--chunked-prefill-size", "256"]);
    let median = |mut measured: Vec<(u64, Duration)>| {
        measured.sort_unstable();
        measured[measured.len() / 2]
    };
    let alone = median((0..9).map(|at| first_token(&engine, &steps, at)).collect());
    let long = |at: u32| drawn((0..100).map(|token| 8 + (token * (at + 3) + at) % 400).collect(), u64::from(at));
    let client = ClientId::new("many");
    let flood: Vec<_> = (0..500)
        .map(|at| {
            let request = GenerationRequest { max_tokens: Some(200), ..long(at) };
            engine.submit_all(Submission { client: client.clone(), ..Submission::one(request) }).expect("accepted")
        })
        .collect();
    let beside = median((0..9).map(|at| first_token(&engine, &steps, 100 + at)).collect());
    println!("steps and time to the first token: alone {alone:?}, beside 500 long requests {beside:?}");
    // The two steps that were under way when it came, its own, and the one that its second token was launched in.
    assert!(beside.0 <= 3 * alone.0, "alone {alone:?}, beside 500 long requests {beside:?}");
    assert!(engine.metrics().queue_depth.get() > 400, "they wait all the while");
    drop(flood);
}

#[test]
fn a_device_that_hangs_is_noticed_and_named() {
    let (engine, steps, control) = watched(&["--watchdog-timeout", "1"]);
    let request = GenerationRequest { max_tokens: Some(600), ..drawn(vec![9; 20], 1) };
    let stream = engine.submit(request).expect("accepted");
    // It is not the first step of its size, which may take longer.
    while steps.load(Ordering::SeqCst) < 8 {
        std::thread::sleep(Duration::from_millis(1));
    }
    control.inject("hang:cuEventSynchronize:1").expect("a fault");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let end = runtime.block_on(engine.given_up());
    // The driver waits for an event at a launch too, before it uses a buffer again.
    assert!(matches!(&end, EngineEnd::Stuck(why) if why.contains("(decode, 1 sequences, 1 tokens)")), "{end:?}");
    assert!(matches!(engine.health(), Health::Failed(_)));
    control.clear_faults();
    outcome(stream).expect_err("its answer is not complete");
}
