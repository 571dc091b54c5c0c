//! The whole path: flags, model, graphs, engine, HTTP.

use std::sync::Arc;

use bcg_cli::args::ServerArgs;
use bcg_engine::load;
use clap::Parser;
use serde_json::{Value, json};

use crate::client::{Server, options};
use crate::merge;

fn tiny_server(more_flags: &[&str]) -> Server {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let mut flags = vec!["bcg-server", "--model", model, "--device", "host"];
    flags.extend(["--max-running-requests", "4", "--context-length", "512", "--kv-cache-tokens", "1024"]);
    flags.extend(more_flags);
    let args = ServerArgs::try_parse_from(flags).expect("flags parse");
    let engine = load::start(&args.engine.options(), |_| ()).expect("the tiny checkpoint loads");
    Server::start(Arc::new(engine), options())
}

#[test]
fn the_tiny_checkpoint_answers_the_same_with_and_without_graphs() {
    const QUESTION: &str =
        "Max has 62 shells, finds 70 more and then gives away 49. How many shells does Max have now?";
    let request = json!({
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0, "max_tokens": 64, "logprobs": true, "top_logprobs": 2,
    });
    let eager = tiny_server(&[]);
    let graphs = tiny_server(&["--enable-breakable-cuda-graph", "--cuda-graph-sizes", "1,2,4,32,64"]);
    let (first, second) = (eager.post("/v1/chat/completions", &request), graphs.post("/v1/chat/completions", &request));
    let (first, second) = (first.json(), second.json());
    let content = &first["choices"][0]["message"]["content"];
    assert_eq!(content, "62+70=132 132-49=83 #### 83", "{first}");
    assert_eq!(&second["choices"][0]["message"]["content"], content);
    assert_eq!(first["choices"][0]["finish_reason"], "stop");
    let tokens = first["choices"][0]["logprobs"]["content"].as_array().expect("log probabilities").len();
    assert_eq!(first["usage"]["completion_tokens"], tokens + 1, "the end token is counted and not shown");
    let mut stopped = request;
    merge(&mut stopped, &json!({"stop": [" ####"], "logprobs": false, "top_logprobs": null}));
    let stopped = graphs.post("/v1/chat/completions", &stopped).json();
    assert_eq!(stopped["choices"][0]["message"]["content"], "62+70=132 132-49=83");
    let metrics = graphs.get("/metrics").body;
    let replays = metrics.lines().find_map(|line| line.strip_prefix("bcg_graph_replays_total "));
    assert!(replays.is_some_and(|count| count != "0"), "{metrics}");
}

#[test]
fn without_a_tokenizer_token_ids_are_answered_with_token_ids() {
    let server = tiny_server(&["--load-format", "dummy", "--skip-tokenizer-init"]);
    let mut request = json!({"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 4, "ignore_eos": true});
    let whole = server.post("/v1/completions", &request).json();
    let ids = whole["choices"][0]["token_ids"].as_array().expect("token ids").clone();
    assert_eq!((ids.len(), &whole["choices"][0]["text"]), (4, &json!("")), "{whole}");
    merge(&mut request, &json!({"stream": true}));
    let frames = server.post("/v1/completions", &request).frames();
    let streamed = frames.iter().flat_map(|frame| frame["choices"][0]["token_ids"].as_array().expect("token ids"));
    assert_eq!(streamed.cloned().collect::<Vec<_>>(), ids);
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    server.post("/v1/chat/completions", &chat).assert_error(400, &Value::Null, "skip_tokenizer_init");
}
