//! The server over real HTTP on a free port: a scripted engine for the protocol, the tiny checkpoint for the whole path.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bcg_server::api::{ApiOptions, serve};
use bcg_server::args::ServerArgs;
use bcg_server::engine::{
    Delta, Engine, Event, EventStream, FinishReason, GenerationRequest, Health, ModelInfo, Prompt, SubmitError,
    TokenLogprob, TokenText, Usage, load,
};
use bcg_server::metrics::Metrics;
use clap::Parser;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

/// Longer than anything here takes; a test that hangs fails instead.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the scripted engine does with the next request.
enum Script {
    /// Sends these events.
    Answer(Vec<Event>),
    /// Sends one piece of text and then nothing until the client leaves.
    Hang,
    /// Sends one piece of text now and the rest after a while.
    Slow(Duration),
    /// Does not accept it.
    Refuse(SubmitError),
}

/// An engine that plays a script.
struct Scripted {
    info: ModelInfo,
    metrics: Metrics,
    scripts: Mutex<Vec<Script>>,
    seen: Mutex<Vec<GenerationRequest>>,
    cancelled: Arc<AtomicUsize>,
    draining: AtomicBool,
}

impl Scripted {
    fn new(scripts: Vec<Script>) -> Arc<Self> {
        let name = "scripted".to_owned();
        let info = ModelInfo { name, created: 7, context_length: 100, vocab_size: 50, has_tokenizer: true };
        Arc::new(Self {
            info,
            metrics: Metrics::default(),
            scripts: Mutex::new(scripts.into_iter().rev().collect()),
            seen: Mutex::default(),
            cancelled: Arc::default(),
            draining: AtomicBool::new(false),
        })
    }

    fn last_request(&self) -> GenerationRequest {
        self.seen.lock().expect("lock").last().expect("a request arrived").clone()
    }
}

impl Engine for Scripted {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit(&self, request: GenerationRequest) -> Result<EventStream, SubmitError> {
        if self.draining.load(Ordering::SeqCst) {
            return Err(SubmitError::ShuttingDown);
        }
        self.seen.lock().expect("lock").push(request);
        let script = self.scripts.lock().expect("lock").pop().unwrap_or_else(|| Script::Answer(answer(&["ok"])));
        let (sender, receiver) = mpsc::channel(16);
        let cancelled = Arc::clone(&self.cancelled);
        match script {
            Script::Refuse(error) => return Err(error),
            Script::Answer(events) => {
                for event in events {
                    sender.try_send(event).expect("room for the script");
                }
            }
            Script::Hang => {
                sender.try_send(text("first")).expect("room");
                std::thread::spawn(move || {
                    while !sender.is_closed() {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    cancelled.fetch_add(1, Ordering::SeqCst);
                });
            }
            Script::Slow(pause) => {
                sender.try_send(text("first ")).expect("room");
                std::thread::spawn(move || {
                    std::thread::sleep(pause);
                    for event in answer(&["last"]) {
                        let _ = sender.blocking_send(event);
                    }
                });
            }
        }
        Ok(EventStream::new(receiver))
    }

    fn encode(&self, text: &str, _add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn decode(&self, tokens: &[u32], _skip_special_tokens: bool) -> Result<String, SubmitError> {
        Ok(tokens.iter().filter_map(|&token| char::from_u32(token)).collect())
    }

    fn prompt_tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Text(text) => self.encode(&text, true),
            Prompt::Tokens(tokens) => Ok(tokens),
            Prompt::Chat { messages, .. } => Ok(vec![1; messages.len()]),
        }
    }

    fn flush_cache(&self) {}

    fn server_info(&self) -> Value {
        json!({"engine": "scripted"})
    }

    fn health(&self) -> Health {
        if self.draining.load(Ordering::SeqCst) { Health::Draining } else { Health::Ready }
    }

    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }
}

fn text(text: &str) -> Event {
    Event::Delta(Delta { text: text.into(), tokens: vec![1], logprobs: Vec::new() })
}

fn answer(pieces: &[&str]) -> Vec<Event> {
    let mut events: Vec<Event> = pieces.iter().map(|piece| text(piece)).collect();
    let usage = Usage { prompt_tokens: 3, cached_tokens: 0, completion_tokens: pieces.len() };
    events.push(Event::Finished { reason: FinishReason::Stop, usage });
    events
}

/// A server on a free port; it shuts down when told, or when dropped.
struct Server {
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(engine: Arc<dyn Engine>, options: ApiOptions) -> Self {
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
                ready.send(listener.local_addr().expect("an address")).expect("the test waits");
                let shutdown = async {
                    let _ = stopped.await;
                };
                serve(listener, engine, options, shutdown).await;
            });
        });
        let address = address.recv().expect("the server starts");
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    fn scripted(scripts: Vec<Script>) -> (Self, Arc<Scripted>) {
        let engine = Scripted::new(scripts);
        (Self::start(engine.clone(), ApiOptions::default()), engine)
    }

    fn begin_shutdown(&mut self) {
        self.stop.take().expect("not yet told").send(()).expect("the server runs");
    }

    fn join(&mut self) {
        self.thread.take().expect("not yet joined").join().expect("the server did not panic");
    }

    fn post(&self, path: &str, body: &Value) -> Response {
        self.send("POST", path, &body.to_string()).finish()
    }

    fn get(&self, path: &str) -> Response {
        self.send("GET", path, "").finish()
    }

    fn send(&self, method: &str, path: &str, body: &str) -> Exchange {
        let mut stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: bcg\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .expect("the request goes out");
        Exchange { reader: BufReader::new(stream) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A request on its way; dropping it closes the connection.
struct Exchange {
    reader: BufReader<TcpStream>,
}

struct Response {
    status: u16,
    headers: HashMap<String, String>,
    body: String,
}

impl Exchange {
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a line in time");
        line.trim_end().to_owned()
    }

    fn finish(mut self) -> Response {
        let status = self.line();
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status line");
        let mut headers = HashMap::new();
        loop {
            let line = self.line();
            let Some((name, value)) = line.split_once(": ") else { break };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let mut body = Vec::new();
        if headers.get("transfer-encoding").is_some_and(|encoding| encoding == "chunked") {
            loop {
                let size = usize::from_str_radix(&self.line(), 16).expect("a chunk size");
                let mut chunk = vec![0; size];
                self.reader.read_exact(&mut chunk).expect("a whole chunk");
                body.extend(chunk);
                self.line();
                if size == 0 {
                    break;
                }
            }
        } else {
            self.reader.read_to_end(&mut body).expect("a body in time");
        }
        Response { status, headers, body: String::from_utf8(body).expect("text") }
    }
}

impl Response {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The JSON of each frame; checks the framing and the end.
    fn frames(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let frames = self.body.strip_suffix("data: [DONE]\n\n").expect("[DONE] comes last");
        let frames = frames.split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':'));
        frames
            .map(|frame| serde_json::from_str(frame.strip_prefix("data: ").expect("a data line")).expect("JSON"))
            .collect()
    }

    #[track_caller]
    fn assert_error(&self, status: u16, param: &Value, needle: &str) {
        let body = self.json();
        assert_eq!(self.status, status, "{body}");
        let error = &body["error"];
        assert_eq!(&error["param"], param, "{body}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(needle)), "{body}");
        assert!(error["type"].is_string() && error.get("code").is_some(), "{body}");
    }
}

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
    assert_eq!(body["usage"], json!({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}));
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
    let delta = Event::Delta(Delta { text: "a".into(), tokens: vec![1], logprobs });
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
    let events = || vec![text("a"), Event::Failed("device lost".into())];
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
    let (server, _) = Server::scripted(vec![Script::Refuse(SubmitError::QueueFull { max_queued: 4 })]);
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
        (json!({"n": 2}), "n", "one answer per request"),
        (json!({"stop": ["1", "2", "3", "4", "5"]}), "stop", "up to 4"),
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
        (json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs", "between 0 and 20"),
        (json!({"top_logprobs": 2}), "top_logprobs", "`logprobs` is true"),
        (json!({"tools": [{"type": "function"}]}), "tools", "not supported"),
    ];
    for (extra, param, needle) in &chat_only {
        server.post("/v1/chat/completions", &chat(extra)).assert_error(400, &json!(param), needle);
    }
    let completion_only = [
        (json!({"prompt": null}), "prompt", "Missing"),
        (json!({"prompt": ["a", "b"]}), "prompt", "2 prompts"),
        (json!({"echo": true}), "echo", "not supported"),
        (json!({"logprobs": 6}), "logprobs", "between 0 and 5"),
    ];
    for (extra, param, needle) in &completion_only {
        server.post("/v1/completions", &completion(extra)).assert_error(400, &json!(param), needle);
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
    server.get("/v1/nothing").assert_error(404, &Value::Null, "/v1/nothing");
    server.get("/v1/chat/completions").assert_error(405, &Value::Null, "GET");
}

#[test]
fn a_body_above_the_limit_is_413() {
    let options = ApiOptions { max_body_bytes: 512, ..ApiOptions::default() };
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
    assert!(metrics.headers["content-type"].starts_with("application/openmetrics-text"));
    assert!(metrics.body.contains("bcg_http_requests_total{route=\"/health\",code=\"200\"} 1"), "{}", metrics.body);
    assert!(metrics.body.contains("bcg_queue_depth 0"), "{}", metrics.body);
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
    let options = ApiOptions { shutdown_deadline: Duration::from_millis(100), ..ApiOptions::default() };
    let mut server = Server::start(Scripted::new(vec![Script::Hang]), options);
    let mut running = server.send("POST", "/v1/completions", &completion(&json!({"stream": true})).to_string());
    while !running.line().contains("first") {}
    let began = Instant::now();
    server.begin_shutdown();
    server.join();
    assert!(began.elapsed() < PATIENCE / 2);
}

/// The whole path: flags, model, graphs, engine, HTTP.
fn tiny_server(more_flags: &[&str]) -> Server {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let mut flags = vec!["bcg-server", "--model", model, "--device", "host"];
    flags.extend(["--max-running-requests", "4", "--context-length", "512", "--kv-cache-tokens", "1024"]);
    flags.extend(more_flags);
    let args = ServerArgs::try_parse_from(flags).expect("flags parse");
    let engine = load::start(&args.engine.plan().expect("flags fit"), None).expect("the tiny checkpoint loads");
    Server::start(Arc::new(engine), ApiOptions::default())
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
    server.post("/v1/chat/completions", &chat).assert_error(400, &Value::Null, "--skip-tokenizer-init");
}
