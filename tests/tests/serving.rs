//! The engine under many requests at once gives each the tokens that it gives it alone: with and without the prefix cache, in
//! chunks, in mixed batches, and when sequences are preempted.

use std::path::PathBuf;

use bcg_cli::args::ServerArgs;
use bcg_engine::local::LocalEngine;
use bcg_engine::metrics::PhaseLabel;
use bcg_engine::{Engine, EngineEvent, EventStream, GenerationRequest, Prompt, load};
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

fn engine(flags: &[&str]) -> LocalEngine {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let line = ["bcg-server", "--model", model, "--device", "host", "--context-length", "640"];
    let args = ServerArgs::try_parse_from(line.iter().chain(flags)).expect("flags parse");
    load::start(&args.engine.options(), |_| ()).expect("starts")
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

fn all_at_once(engine: &LocalEngine) -> Vec<Vec<u32>> {
    let streams: Vec<_> = prompts().iter().map(|prompt| submit(engine, prompt)).collect();
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
        assert_eq!(all_at_once(&engine), expected, "{flags:?}");
        let metrics = engine.metrics();
        let cached = metrics.cached_prompt_tokens.get();
        assert_eq!(cached > 0, !flags.contains(&"--disable-radix-cache"), "{flags:?}: {cached} tokens were cached");
        assert_eq!(metrics.preemptions.get() > 0, flags.contains(&"--kv-cache-tokens"), "{flags:?}");
        let mixed = metrics.step_time.get(&PhaseLabel { phase: "mixed" }).is_some();
        assert!(mixed, "{flags:?}: prompts ran beside answers");
    }
}
