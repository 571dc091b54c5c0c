//! The server over real HTTP on a free port: a scripted engine for the protocol, the tiny checkpoint for the whole path.

mod answers;
mod client;
mod clients;
mod native;
mod ranks;
mod replicas;
mod scripted;
mod tools;
mod whole;

use std::io::Read;
use std::net::TcpStream;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bcg_engine::{Delta, Engine, EngineEvent, Health, RequestError, SubmitError, TokenLogprob, TokenText};
use serde_json::{Value, json};

use self::client::{Server, options};
use self::scripted::{Script, Scripted, answer, text};

/// Longer than anything here takes; a test that hangs fails instead.
const PATIENCE: Duration = Duration::from_secs(30);

fn chat(extra: &Value) -> Value {
    let mut body = json!({"model": "scripted", "messages": [{"role": "user", "content": "hi"}]});
    merge(&mut body, extra);
    body
}

fn completion(extra: &Value) -> Value {
    let mut body = json!({"model": "scripted", "prompt": "hi"});
    merge(&mut body, extra);
    body
}

fn merge(body: &mut Value, extra: &Value) {
    for (name, value) in extra.as_object().expect("an object") {
        body[name] = value.clone();
    }
}

#[track_caller]
fn eventually(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_chat_answer_has_the_openai_shape() {
    let (server, engine) = Server::scripted(vec![Script::Answer(answer(&["Hel", "lo"]))]);
    let options = json!({"temperature": 0.5, "seed": 3, "stop": "x", "max_tokens": 9, "top_k": 4, "min_p": 0.25});
    let response = server.post("/v1/chat/completions", &chat(&options));
    let body = response.json();
    assert_eq!((response.status, &body["object"]), (200, &json!("chat.completion")));
    assert_eq!(body["choices"][0]["message"]["content"], "Hello");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let details = json!({"cached_tokens": 1});
    let usage =
        json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "prompt_tokens_details": details});
    assert_eq!(body["usage"], usage);
    let request = engine.last_request();
    assert_eq!((request.seed, request.max_tokens, request.stop), (Some(3), Some(9), vec!["x".to_owned()]));
    assert_eq!((request.sampling.temperature, request.sampling.top_k, request.sampling.min_p), (0.5, Some(4), 0.25));
}

#[test]
fn a_chat_stream_opens_with_the_role_and_ends_with_the_usage() {
    let (server, _) = Server::scripted(vec![Script::Answer(answer(&["a\n", "b"]))]);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let frames = server.post("/v1/chat/completions", &chat(&options)).frames();
    assert_eq!(frames.len(), 5);
    assert_eq!(frames[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(frames[1]["choices"][0]["delta"]["content"], "a\n");
    assert_eq!(frames[3]["choices"][0]["finish_reason"], "stop");
    assert_eq!(frames[4]["choices"], json!([]));
    assert_eq!(frames[4]["usage"]["total_tokens"], 5);
    assert!(frames.iter().all(|frame| frame["id"] == frames[0]["id"]));
}

#[test]
fn a_completion_streams_text_and_log_probabilities() {
    let token = TokenText { text: "a".into(), logprob: -0.5 };
    let top = vec![token.clone(), TokenText { text: "b".into(), logprob: -1.5 }];
    let logprobs = vec![TokenLogprob { token, top, text_offset: 0 }];
    let delta = EngineEvent::Delta(Delta { text: "a".into(), tokens: vec![1], logprobs });
    let mut events = answer(&[]);
    events.insert(0, delta);
    let (server, engine) = Server::scripted(vec![Script::Answer(events.clone()), Script::Answer(events)]);
    let whole = server.post("/v1/completions", &completion(&json!({"logprobs": 2}))).json();
    let frames = server.post("/v1/completions", &completion(&json!({"logprobs": 2, "stream": true}))).frames();
    for logprobs in [&whole["choices"][0]["logprobs"], &frames[0]["choices"][0]["logprobs"]] {
        assert_eq!(logprobs["tokens"], json!(["a"]));
        assert_eq!(logprobs["token_logprobs"], json!([-0.5]));
        assert_eq!(logprobs["top_logprobs"], json!([{"a": -0.5, "b": -1.5}]));
    }
    assert_eq!(engine.last_request().top_logprobs, Some(2));
    assert_eq!(engine.last_request().max_tokens, Some(16));
}

#[test]
fn a_failure_in_a_stream_is_an_error_frame() {
    let events = || vec![text("a"), EngineEvent::Failed(RequestError::Engine("device lost".into()))];
    let (server, _) = Server::scripted(vec![Script::Answer(events()), Script::Answer(events())]);
    let frames = server.post("/v1/chat/completions", &chat(&json!({"stream": true}))).frames();
    assert_eq!(frames.last().expect("a frame")["error"]["message"], "device lost");
    server.post("/v1/chat/completions", &chat(&json!({}))).assert_error(500, &Value::Null, "device lost");
}

#[test]
fn a_client_that_leaves_cancels_its_request() {
    let (server, engine) = Server::scripted(vec![Script::Hang, Script::Hang]);
    let mut streaming = server.send("POST", "/v1/chat/completions", &chat(&json!({"stream": true})).to_string());
    while !streaming.line().contains("first") {}
    assert_eq!(engine.cancelled.load(Ordering::SeqCst), 0);
    drop(streaming);
    eventually("the stream is cancelled", || engine.cancelled.load(Ordering::SeqCst) == 1);
    let waiting = server.send("POST", "/v1/chat/completions", &chat(&json!({})).to_string());
    eventually("the request arrives", || engine.seen.lock().expect("lock").len() == 2);
    drop(waiting);
    eventually("the request is cancelled", || engine.cancelled.load(Ordering::SeqCst) == 2);
}

#[test]
fn a_full_queue_is_429_with_a_time_to_retry() {
    let (server, _) = Server::scripted(vec![Script::Refuse(SubmitError::QueueFull { max_queued_requests: 4 })]);
    let response = server.post("/v1/chat/completions", &chat(&json!({"stream": true})));
    response.assert_error(429, &Value::Null, "queue of 4 requests is full");
    assert_eq!(response.headers["retry-after"], "1");
    assert_eq!(server.post("/v1/chat/completions", &chat(&json!({}))).status, 200);
}

#[test]
fn a_context_overflow_names_the_lengths() {
    let refused = SubmitError::ContextLength { prompt: 90, max_tokens: 20, context: 100 };
    let (server, _) = Server::scripted(vec![Script::Refuse(refused)]);
    let response = server.post("/v1/chat/completions", &chat(&json!({})));
    assert_eq!(response.json()["error"]["code"], "context_length_exceeded");
    response.assert_error(400, &Value::Null, "110 tokens (90 in the prompt, 20 in the completion)");
}

#[test]
fn bad_requests_name_their_field() {
    let (server, _) = Server::scripted(Vec::new());
    let cases = [
        (json!({"temperature": "hot"}), "temperature", "temperature"),
        (json!({"temperature": 3}), "temperature", "between 0 and 2"),
        (json!({"n": 129}), "n", "between 1 and 128"),
        (json!({"n": 2, "best_of": 3}), "best_of", "value of `n`"),
        (json!({"logit_bias": {"50": 1}}), "logit_bias", "vocabulary of 50"),
        (json!({"logit_bias": {"5": 101}}), "logit_bias", "between -100 and 100"),
        (json!({"presence_penalty": 3}), "presence_penalty", "between -2 and 2"),
        (json!({"frequency_penalty": "much"}), "frequency_penalty", "invalid type"),
        (json!({"repetition_penalty": 1.2}), "repetition_penalty", "set it to 1"),
        (json!({"stop_token_ids": [1, 50]}), "stop_token_ids", "token id 50"),
        (json!({"response_format": {"type": "xml"}}), "response_format", "json_schema"),
        (json!({"response_format": {"type": "json_schema", "json_schema": {}}}), "response_format", "an object"),
        (json!({"temperature": "x".repeat(5000)}), "temperature", "xxx…"),
        (json!({"stop": ["1", "2", "3", "4", "5"]}), "stop", "up to 4"),
        (json!({"stop": "x".repeat(1025)}), "stop", "at most 1024 bytes"),
        (json!({"model": null, "logit_bias": vec![0; 70_000]}), "logit_bias", "an object"),
        (json!({"stop_token_ids": vec![1; 129]}), "stop_token_ids", "more than 128 entries"),
        (json!({"max_tokens": 0}), "max_tokens", "between 1"),
        (json!({"stream_options": {"include_usage": true}}), "stream_options", "only allowed when `stream`"),
    ];
    for (extra, param, needle) in &cases {
        server.post("/v1/chat/completions", &chat(extra)).assert_error(400, &json!(param), needle);
        server.post("/v1/completions", &completion(extra)).assert_error(400, &json!(param), needle);
    }
    let chat_only = [
        (json!({"messages": []}), "messages", "at least one"),
        (json!({"messages": null}), "messages", "Missing"),
        (json!({"messages": vec![json!({"role": "user"}); 4097]}), "messages", "more than 4096 messages"),
        (json!({"messages": [{"role": "User", "content": "hi"}]}), "messages", "one of `system`, `developer`, `user`"),
        (json!({"messages": [{"role": "user", "x": vec![0; 70_000]}]}), "messages", "65536 JSON values"),
        (json!({"tools": vec![json!({}); 129]}), "tools", "more than 128 entries"),
        (json!({"chat_template_kwargs": [1]}), "chat_template_kwargs", "an object"),
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "between 0 and 20"),
        (json!({"top_logprobs": 2}), "top_logprobs", "`logprobs` is true"),
        (json!({"tools": [{"type": "function"}]}), "tools", "needs a name"),
        (json!({"tool_choice": "required"}), "tool_choice", "`tools` is empty"),
        (json!({"functions": [{"name": "f"}]}), "functions", "use `tools`"),
        (json!({"modalities": ["text", "audio"]}), "modalities", "[\"text\"]"),
        (json!({"audio": {"voice": "alloy"}}), "audio", "leave it out"),
    ];
    for (extra, param, needle) in &chat_only {
        server.post("/v1/chat/completions", &chat(extra)).assert_error(400, &json!(param), needle);
    }
    let completion_only = [
        (json!({"prompt": null}), "prompt", "Missing"),
        (json!({"prompt": ["a", 1]}), "prompt", "no prompt"),
        (json!({"prompt": vec![json!([]); 1025]}), "prompt", "more than 1024 prompts"),
        (json!({"prompt": vec!["a"; 9], "n": 128}), "prompt", "more than 1024 answers"),
        (json!({"echo": true, "logprobs": 1}), "echo", "`logprobs`"),
        (json!({"suffix": "end"}), "suffix", "leave it out"),
        (json!({"logprobs": 6}), "logprobs", "between 0 and 5"),
    ];
    for (extra, param, needle) in &completion_only {
        server.post("/v1/completions", &completion(extra)).assert_error(400, &json!(param), needle);
    }
}

#[test]
fn any_body_gets_an_answer() {
    let (server, _) = Server::scripted(Vec::new());
    let deep = format!("{{\"messages\": {}1{}}}", "[".repeat(5000), "]".repeat(5000));
    let nested = format!("{{\"tools\": {}1{}}}", "{\"a\": ".repeat(100), "}".repeat(100));
    let huge = r#"{"prompt": "a", "text": "a", "max_tokens": 1e308, "seed": 99999999999999999999, "n": 1e400}"#;
    let large = r#"{"prompt": [4294967296], "text": [1e3], "tokens": [-1], "messages": [{"role": 1}]}"#;
    for body in [deep.as_str(), &nested, huge, large, "null", "7", "\"a\"", "\u{0}", "{\"model\": [[]]}", "{}"] {
        for path in ["/v1/chat/completions", "/v1/completions", "/generate", "/tokenize", "/detokenize"] {
            let response = server.send("POST", path, body).finish();
            assert_eq!(response.status, 400, "{path} {body:.60}: {}", response.body);
            assert!(response.json()["error"]["message"].is_string(), "{}", response.body);
            assert!(response.body.len() < 1000, "{}", response.body);
        }
    }
}

#[test]
fn bad_json_and_unknown_things_have_the_openai_shape() {
    let (server, _) = Server::scripted(Vec::new());
    let broken = server.send("POST", "/v1/chat/completions", "{\"messages\": [").finish();
    broken.assert_error(400, &Value::Null, "not valid JSON");
    let model = server.post("/v1/chat/completions", &chat(&json!({"model": "gpt-7"})));
    assert_eq!(model.json()["error"]["code"], "model_not_found");
    model.assert_error(404, &json!("model"), "gpt-7");
    for route in ["/v1/nothing", "/v1/responses", "/v1/images/generations"] {
        server.get(route).assert_error(404, &Value::Null, route);
    }
    server.get("/v1/chat/completions").assert_error(405, &Value::Null, "GET");
}

#[test]
fn a_body_above_the_limit_is_413() {
    let mut options = options();
    options.max_body_bytes = 512;
    let server = Server::start(Scripted::new(Vec::new()), options);
    let long = "x".repeat(600);
    server.post("/v1/completions", &completion(&json!({"prompt": long}))).assert_error(413, &Value::Null, "512 bytes");
    assert_eq!(server.post("/v1/completions", &completion(&json!({}))).status, 200);
}

#[test]
fn models_health_and_metrics_answer() {
    let (server, _) = Server::scripted(Vec::new());
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "scripted");
    assert_eq!(server.get("/v1/models/scripted").json()["object"], "model");
    server.get("/v1/models/other").assert_error(404, &json!("model"), "other");
    assert_eq!(server.get("/health").status, 200);
    let metrics = server.get("/metrics");
    assert!(metrics.headers["content-type"].starts_with("text/plain; version=0.0.4"));
    assert!(metrics.body.contains("bcg_http_requests_total{route=\"/health\",code=\"200\"} 1"), "{}", metrics.body);
    assert!(metrics.body.contains("bcg_queue_depth 0"), "{}", metrics.body);
    let accept = "Accept: application/openmetrics-text;version=1.0.0,text/plain;q=0.5\r\n";
    let metrics = server.send_with("GET", "/metrics", accept, "").finish();
    assert!(metrics.headers["content-type"].starts_with("application/openmetrics-text"));
    assert!(metrics.body.ends_with("# EOF\n"), "{}", metrics.body);
}

#[test]
fn a_shutdown_lets_running_requests_finish() {
    let (mut server, engine) = Server::scripted(vec![Script::Slow(Duration::from_millis(300))]);
    let mut running = server.send("POST", "/v1/completions", &completion(&json!({"stream": true})).to_string());
    let status = running.line();
    assert!(status.contains("200"), "{status}");
    server.begin_shutdown();
    eventually("the engine drains", || engine.health() == Health::Draining);
    let mut rest = String::new();
    running.reader.read_to_string(&mut rest).expect("the stream ends in time");
    assert!(rest.contains("last") && rest.contains("[DONE]"), "{rest}");
    server.join();
    assert!(TcpStream::connect(server.address).is_err(), "nothing listens any more");
}

#[test]
fn a_shutdown_gives_up_at_its_deadline() {
    let mut options = options();
    options.shutdown_deadline = Duration::from_millis(100);
    let mut server = Server::start(Scripted::new(vec![Script::Hang]), options);
    let mut running = server.send("POST", "/v1/completions", &completion(&json!({"stream": true})).to_string());
    while !running.line().contains("first") {}
    let began = Instant::now();
    server.begin_shutdown();
    server.join();
    assert!(began.elapsed() < PATIENCE / 2);
}
