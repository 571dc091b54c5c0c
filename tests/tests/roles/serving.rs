//! The engine with prefill apart from decode gives the tokens of one engine, whatever moves with a request, and comes back
//! when a role is lost.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bcg_cli::args::ServerArgs;
use bcg_engine::local::LocalEngine;
use bcg_engine::{Engine, EngineEvent, EngineOptions, EventStream, GenerationRequest, Grammar, Health, Prompt, load};
use bcg_models::ModelRunner;
use bcg_runtime::HostControl;
use clap::Parser;
use serde_json::Value;

const PROBLEMS: usize = 8;
/// What a busy machine needs to notice: a role ends the step that it is in first.
const SOON: Duration = Duration::from_secs(20);
const GRAPHS: &str = "--enable-breakable-cuda-graph";

/// Two examples and a question, which all problems but for the question share.
fn prompts() -> Vec<String> {
    let data = |file: &str| {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data").join(file);
        std::fs::read_to_string(path).expect("the data is there")
    };
    let text = |value: &Value, field: &str| value[field].as_str().expect("text").to_owned();
    let shots: Vec<Value> = serde_json::from_str(&data("mini_gsm_shots.json")).expect("JSON");
    let shots: String = shots
        .iter()
        .take(2)
        .map(|shot| format!("Question: {}\nAnswer: {}\n\n", text(shot, "question"), text(shot, "answer")))
        .collect();
    let problems = data("mini_gsm_test.jsonl");
    let problems = problems.lines().take(PROBLEMS).map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    problems.map(|problem| format!("{shots}Question: {}\nAnswer: ", text(&problem, "question"))).collect()
}

fn options(model: &str, flags: &[&str]) -> EngineOptions {
    let folder = format!("{}/../models/{model}", env!("CARGO_MANIFEST_DIR"));
    let line = ["bcg-server", "--model", &folder, "--device", "host", "--context-length", "320"];
    ServerArgs::try_parse_from(line.iter().chain(flags)).expect("flags parse").engine.options()
}

/// An engine in two roles whose devices run late, in an order of their own.
fn roles(model: &str, flags: &[&str]) -> LocalEngine {
    let flags = [flags, &["--disaggregation", "prefill:0", "decode:1"]].concat();
    let seeds = AtomicUsize::new(5);
    let started = load::start_with(
        &options(model, &flags),
        |_| (),
        move |runner: ModelRunner| {
            let seed = seeds.fetch_add(1, Ordering::Relaxed);
            runner.device().host_control().expect("a host device").reseed(seed as u64);
            Ok(runner)
        },
    );
    started.expect("starts")
}

fn request(prompt: &str) -> GenerationRequest {
    let mut request = GenerationRequest::greedy(Prompt::Text(prompt.to_owned()));
    (request.max_tokens, request.stop) = (Some(16), vec!["\n".to_owned()]);
    request
}

fn tokens(mut stream: EventStream) -> Result<Vec<u32>, String> {
    let mut tokens = Vec::new();
    loop {
        match stream.next_blocking().expect("a last event") {
            EngineEvent::Delta(delta) => tokens.extend(delta.tokens),
            EngineEvent::Finished { .. } => return Ok(tokens),
            EngineEvent::Failed(error) => return Err(error.to_string()),
        }
    }
}

fn all_at_once(engine: &LocalEngine, requests: &[GenerationRequest]) -> Vec<Vec<u32>> {
    let streams: Vec<_> = requests.iter().map(|request| engine.submit(request.clone()).expect("accepted")).collect();
    streams.into_iter().map(|stream| tokens(stream).expect("an answer")).collect()
}

/// What one engine answers to each alone.
fn alone(model: &str, requests: &[GenerationRequest]) -> Vec<Vec<u32>> {
    let engine = load::start(&options(model, &[]), |_| ()).expect("starts");
    requests.iter().flat_map(|request| all_at_once(&engine, std::slice::from_ref(request))).collect()
}

#[test]
fn many_at_once_have_the_tokens_of_one_engine() {
    let requests: Vec<_> = prompts().iter().map(|prompt| request(prompt)).collect();
    let expected = alone("tiny-qwen3", &requests);
    for flags in [
        &[GRAPHS, "--cuda-graph-sizes", "16,64,256"][..],
        &["--chunked-prefill-size", "64", GRAPHS, "--capture", "lazy"],
        &["--kv-cache-tokens", "320", "--page-size", "4"],
    ] {
        let engine = roles("tiny-qwen3", flags);
        assert_eq!(all_at_once(&engine, &requests), expected, "{flags:?}");
        let metrics = engine.metrics();
        assert_eq!((metrics.moved_requests.get(), metrics.failed_steps.get()), (PROBLEMS as u64, 0));
        assert!(metrics.cached_prompt_tokens.get() > 0 && metrics.moved_bytes.get() > 0, "{flags:?}");
        assert_eq!(engine.server_info()["settings"]["roles"]["decode"]["device"], "host:1");
    }
}

/// Latents, experts and states move as keys and values do.
#[test]
fn every_family_has_the_tokens_of_one_engine() {
    let requests: Vec<_> = prompts()[..2].iter().map(|prompt| request(prompt)).collect();
    for model in ["tiny-qwen3-moe", "tiny-deepseek-v3", "tiny-nemotron-h"] {
        let engine = roles(model, &[GRAPHS, "--cuda-graph-sizes", "16,96", "--chunked-prefill-size", "96"]);
        assert_eq!(all_at_once(&engine, &requests), alone(model, &requests), "{model}");
        assert_eq!(engine.metrics().moved_requests.get(), 2, "{model}");
    }
}

/// What was chosen so far decides what may come: a grammar, penalties and the seed of a draw go on where they were.
#[test]
fn a_request_moves_with_its_grammar_its_penalties_and_its_seed() {
    let prompt = "Question: Ann has 3 apples and 4 plums.\nAnswer: ";
    let mut requests = vec![request(prompt); 4];
    requests[0].grammar = Some(Arc::new(Grammar::Regex("[0-9]{3}-[a-c]{4}(x|y)".to_owned())));
    (requests[1].presence_penalty, requests[1].frequency_penalty) = (1.5, 0.7);
    (requests[2].seed, requests[2].sampling.temperature) = (Some(17), 2.0);
    (requests[3].logit_bias, requests[3].top_logprobs) = (vec![(40, 2.5)], Some(2));
    requests.iter_mut().for_each(|request| (request.max_tokens, request.stop) = (Some(24), Vec::new()));
    let expected = alone("tiny-qwen3", &requests);
    assert!(expected[0].len() > 4 && expected[1..].iter().all(|tokens| *tokens != expected[0]));
    let engine = roles("tiny-qwen3", &[GRAPHS, "--cuda-graph-sizes", "32"]);
    assert_eq!(all_at_once(&engine, &requests), expected);
    assert_eq!(engine.metrics().moved_requests.get(), 4);
}

#[test]
fn an_answer_that_ends_with_its_first_token_never_moves() {
    let one = GenerationRequest { max_tokens: Some(1), ..request("Question: ") };
    let engine = roles("tiny-qwen3", &[]);
    let first = all_at_once(&engine, std::slice::from_ref(&one));
    let stop = GenerationRequest { stop_token_ids: vec![first[0][0]], ..request("Question: ") };
    tokens(engine.submit(stop).expect("accepted")).expect("an end");
    assert_eq!(engine.metrics().moved_requests.get(), 0);
    assert_eq!(all_at_once(&engine, &[request("Question: ")])[0][0], first[0][0]);
    assert_eq!(engine.metrics().moved_requests.get(), 1);
}

/// A device that fails in either role ends what runs in both, at once; then both are there again.
#[test]
fn a_device_that_fails_in_either_role_is_replaced_in_both() {
    let requests: Vec<_> = prompts()[..4].iter().map(|prompt| request(prompt)).collect();
    let expected = alone("tiny-qwen3", &requests);
    for role in 0..2 {
        let controls: Arc<Mutex<Vec<HostControl>>> = Arc::default();
        let kept = Arc::clone(&controls);
        let flags = ["--disaggregation", "prefill:0,decode:1", "--max-running-requests", "2"];
        let engine = load::start_with(
            &options("tiny-qwen3", &flags),
            |_| (),
            move |runner: ModelRunner| {
                kept.lock().expect("lock").extend(runner.device().host_control().cloned());
                Ok(runner)
            },
        );
        let engine = engine.expect("starts");
        let streams: Vec<_> =
            requests.iter().map(|request| engine.submit(request.clone()).expect("accepted")).collect();
        while engine.metrics().moved_requests.get() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        controls.lock().expect("lock")[role].inject("fail:cuLaunchKernel:20").expect("a fault");
        let begun = Instant::now();
        let answers: Vec<_> = std::thread::scope(|scope| {
            let read = |stream| scope.spawn(move || (tokens(stream), begun.elapsed()));
            let threads: Vec<_> = streams.into_iter().map(read).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let mut num_errors = 0;
        for ((answer, took), expected) in answers.iter().zip(&expected) {
            match answer {
                Ok(tokens) => assert_eq!(tokens, expected),
                Err(error) => {
                    num_errors += 1;
                    assert!(error.contains("cuLaunchKernel") && *took < SOON, "{took:?}: {error}");
                }
            }
        }
        assert!(num_errors > 0, "some ran");
        assert_eq!(all_at_once(&engine, &requests), expected, "role {role} is there again");
        assert_eq!((engine.health(), controls.lock().expect("lock").len()), (Health::Ready, 4), "both, once");
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    let refused = |flags: &[&str]| {
        let error = load::start(&options("tiny-qwen3", flags), |_| ()).expect_err("these options cannot work");
        format!("{error:#}")
    };
    let pair = ["--disaggregation", "prefill:0,decode:1"];
    assert!(refused(&["--disaggregation", "prefill:0"]).contains("give prefill:0,decode:1"));
    assert!(refused(&["--disaggregation", "prefill:0,prefill:1"]).contains("each of two roles"));
    let of_tp = refused(&[&pair[..], &["--tp", "2"]].concat());
    assert!(of_tp.contains("`tp`") && of_tp.contains("`disaggregation`"), "{of_tp}");
    let error = load::load_runner(&options("tiny-qwen3", &pair), &mut |_| ()).expect_err("one model alone");
    assert!(error.to_string().contains("`disaggregation`"), "{error}");
}
