//! A server whose model is divided among ranks, one of which is lost under load.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bcg_cli::args::ServerArgs;
use bcg_engine::{Engine, Health, load};
use bcg_models::ModelRunner;
use clap::Parser;
use serde_json::{Value, json};

use crate::client::{Response, Server, options};
use crate::eventually;

/// Requests at once, of which a step holds `RUNNING`.
const REQUESTS: usize = 6;
const RUNNING: usize = 4;

/// The error that ended an answer, as a whole body or as the last frame of a stream; `None` for a complete answer.
fn error_of(response: &Response) -> Option<String> {
    let is_stream = response.headers["content-type"] == "text/event-stream";
    let body = if is_stream {
        let frames: Vec<&str> = response.body.split("\n\n").filter(|frame| frame.starts_with("data: ")).collect();
        let errors = frames.iter().filter(|frame| frame.contains("\"error\"")).count();
        assert!(errors <= 1 && frames.last() == Some(&"data: [DONE]"), "it ends once: {}", response.body);
        match frames.iter().find(|frame| frame.contains("\"error\"")) {
            Some(frame) => serde_json::from_str(frame.trim_start_matches("data: ")).expect("JSON"),
            None => Value::Null,
        }
    } else {
        response.json()
    };
    body["error"]["message"].as_str().map(str::to_owned)
}

#[test]
fn a_rank_that_panics_under_load_fails_what_runs_and_the_engine_comes_back_once() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let flags = ["bcg-server", "--model", model, "--device", "host", "--tp", "2", "--context-length", "512"];
    let more = ["--max-running-requests", "4", "--enable-breakable-cuda-graph", "--cuda-graph-sizes", "8,32"];
    let args = ServerArgs::try_parse_from(flags.iter().chain(&more)).expect("flags parse");
    let (loads, control) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(None)));
    let (counted, of_second) = (Arc::clone(&loads), Arc::clone(&control));
    let engine = load::start_with(
        &args.engine.options(),
        |_| (),
        move |runner: ModelRunner| {
            counted.fetch_add(1, Ordering::SeqCst);
            *of_second.lock().expect("no panic") = runner.world().device(1).host_control().cloned();
            Ok(runner)
        },
    );
    let engine = Arc::new(engine.expect("starts"));
    let server = Server::start(engine.clone(), options());
    let request = |at: usize| {
        let prompt: Vec<usize> = (0..10 + at).map(|token| 8 + 7 * token).collect();
        json!({"prompt": prompt, "temperature": 0, "max_tokens": 40, "ignore_eos": true, "stream": at.is_multiple_of(2)})
    };
    let ask = |at| server.post("/v1/completions", &request(at));
    let before = ask(1).json()["choices"][0]["text"].clone();

    let answers: Vec<Response> = std::thread::scope(|scope| {
        let (steps, ask) = (engine.num_steps(), &ask);
        let threads: Vec<_> = (0..REQUESTS).map(|at| scope.spawn(move || ask(at))).collect();
        eventually("all that can run do", || engine.metrics().running.get() == RUNNING as i64);
        eventually("steps under load", || engine.num_steps() > steps + 4);
        let control = control.lock().expect("no panic").take().expect("a host device");
        control.inject("panic:cuLaunchKernel:3").expect("a fault");
        threads.into_iter().map(|thread| thread.join().expect("an answer")).collect()
    });
    let errors: Vec<String> = answers.iter().filter_map(error_of).collect();
    assert_eq!(errors.len(), RUNNING, "those that ran fail, those that waited do not: {errors:?}");
    for error in &errors {
        assert!(error.contains("rank 1 is lost") && error.contains("the panic that was asked for"), "{error}");
    }
    assert_eq!(loads.load(Ordering::SeqCst), 2, "the model is loaded again, once");
    assert_eq!(engine.health(), Health::Ready);
    assert_eq!(ask(1).json()["choices"][0]["text"], before, "the new world answers as the old one");
    let metrics = server.get("/metrics").body;
    for line in ["bcg_ranks 2", "bcg_lost_ranks_total{rank=\"1\"} 1", "bcg_rank_memory_bytes{rank=\"1\"} "] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }
}
