//! Bodies of requests to a real server: each gets a whole answer, and none is the server's fault.

use std::cell::RefCell;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use bcg_engine::Metrics;
use bcg_engine::{
    Delta, Engine, EngineEvent, EventStream, FinishReason, GenerationRequest, Health, ModelInfo, Prompt, Submission,
    SubmitError, TokenLogprob, TokenText, Usage,
};
use bcg_server::{HttpOptions, serve};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::campaign;
use super::chat::chats;
use super::document::documents;

const PATIENCE: Duration = Duration::from_secs(10);

/// An engine that answers with what it was asked, so that answers are odd too.
struct Echo {
    info: ModelInfo,
    metrics: Metrics,
}

impl Echo {
    fn answer(&self, request: &GenerationRequest) -> Result<EventStream, SubmitError> {
        let text = match &request.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Tokens(tokens) => self.decode(tokens, false)?,
            Prompt::Chat { messages, .. } => match messages.last().and_then(|message| message.content.as_ref()) {
                Some(content) => content.text().map_err(|error| SubmitError::Prompt(error.to_string()))?,
                None => String::new(),
            },
        };
        let tokens = self.encode(&text, true)?;
        let of = |text: &str| TokenText { text: text.to_owned(), logprob: -1.5 };
        let top = |n: usize| TokenLogprob { token: of(&text), top: vec![of("a"); n], text_offset: 0 };
        let logprobs = request.top_logprobs.map(top).into_iter().collect();
        let usage = Usage { prompt_tokens: tokens.len(), cached_tokens: 0, completion_tokens: 1 };
        let (sender, receiver) = mpsc::channel(2);
        let events = [
            EngineEvent::Delta(Delta { text, tokens: vec![1], logprobs }),
            EngineEvent::Finished { reason: FinishReason::Stop, usage },
        ];
        events.into_iter().for_each(|event| sender.try_send(event).expect("room for two"));
        Ok(EventStream::new(receiver))
    }
}

impl Engine for Echo {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn submit_all(&self, submission: Submission) -> Result<Vec<EventStream>, SubmitError> {
        let Submission { requests, n, .. } = submission;
        requests.iter().flat_map(|request| (0..n).map(|_| self.answer(request))).collect()
    }

    fn probe(&self) -> Result<EventStream, SubmitError> {
        self.answer(&GenerationRequest::greedy(Prompt::Tokens(vec![0])))
    }

    fn num_steps(&self) -> u64 {
        0
    }

    fn encode(&self, text: &str, _add_special_tokens: bool) -> Result<Vec<u32>, SubmitError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn decode(&self, tokens: &[u32], _skip_special_tokens: bool) -> Result<String, SubmitError> {
        let text = tokens.iter().map(|token| char::from_u32(*token)).collect::<Option<String>>();
        text.ok_or_else(|| SubmitError::Prompt("an unknown token".to_owned()))
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
        json!({"engine": "echo"})
    }

    fn health(&self) -> Health {
        Health::Ready
    }

    fn replica_metrics(&self) -> Vec<&Metrics> {
        vec![&self.metrics]
    }

    fn drain(&self) {}
}

/// Starts a server that runs as long as the process.
fn server() -> SocketAddr {
    let info =
        ModelInfo { name: "echo".to_owned(), created: 7, context_length: 4096, vocab_size: 300, has_tokenizer: true };
    let engine = Arc::new(Echo { info, metrics: Metrics::default() });
    let (ready, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            ready.send(listener.local_addr().expect("an address")).expect("the test waits");
            serve(engine, listener, &HttpOptions::default(), std::future::pending()).await.expect("the options fit");
        });
    });
    address.recv().expect("the server starts")
}

/// What valid requests send to each route that takes a body, and to routes that are refused whole.
fn requests() -> Vec<(&'static str, Value)> {
    let mut requests = Vec::new();
    for chat in chats() {
        let (messages, tools) = (&chat["messages"], &chat["tools"]);
        let plain = json!({"model": "echo", "messages": messages, "max_tokens": 9, "temperature": 0.5, "seed": 3});
        let full = json!({
            "model": "echo", "messages": messages, "tools": tools, "tool_choice": "auto", "stream": true,
            "stream_options": {"include_usage": true}, "logprobs": true, "top_logprobs": 2, "stop": ["x", "yy"],
            "n": 1, "max_completion_tokens": 5, "presence_penalty": 0.0, "frequency_penalty": 0.0, "top_p": 0.9,
            "top_k": 5, "min_p": 0.1, "ignore_eos": true, "user": "me", "logit_bias": {},
            "response_format": {"type": "text"}, "chat_template_kwargs": {"enable_thinking": false},
        });
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
        let shaped = json!({
            "messages": messages, "n": 2, "logit_bias": {"5": -100, "7": 1.5}, "presence_penalty": 1.5,
            "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": true}},
        });
        requests.extend([plain, full, shaped].map(|body| ("/v1/chat/completions", body)));
    }
    requests.extend([
        ("/v1/completions", json!({"model": "echo", "prompt": "Once", "max_tokens": 5, "logprobs": 3, "echo": false})),
        ("/v1/completions", json!({"prompt": ["Once", "upon"], "stream": true, "stop": "a", "suffix": null, "n": 1})),
        ("/v1/completions", json!({"prompt": [1, 2, 3], "best_of": 1, "seed": -1, "temperature": 0})),
        ("/v1/completions", json!({"prompt": [[1, 2], [3]], "stream": true, "logprobs": 0})),
        ("/v1/embeddings", json!({"model": "echo", "input": "text"})),
        ("/tokenize", json!({"prompt": "Once", "add_special_tokens": true})),
        ("/tokenize", json!({"messages": [{"role": "user", "content": "Once"}], "add_generation_prompt": true})),
        ("/detokenize", json!({"tokens": [65, 66]})),
        (
            "/generate",
            json!({"text": "Once", "stream": true, "sampling_params": {"max_new_tokens": 4,
            "temperature": 0.0, "stop": ["x"], "json_schema": "{\"type\": \"object\"}", "ignore_eos": true, "n": 1}}),
        ),
        (
            "/generate",
            json!({"input_ids": [[1, 2], [3]], "return_logprob": true,
            "sampling_params": {"regex": "a+", "top_p": 0.5, "n": 2}}),
        ),
        ("/flush_cache", json!({})),
    ]);
    requests
}

/// A connection that serves many requests.
struct Connection {
    stream: BufReader<TcpStream>,
}

/// An answer's status, the type of its body, and whether the connection goes on.
struct Answer {
    status: u16,
    content_type: String,
    body: Vec<u8>,
    is_last: bool,
}

impl Connection {
    fn open(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.set_nodelay(true).expect("a socket option");
        Self { stream: BufReader::new(stream) }
    }

    fn post(&mut self, path: &str, body: &[u8]) -> std::io::Result<Answer> {
        let len = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: bcg\r\nContent-Type: application/json\r\nContent-Length: {len}\r\n\r\n"
        );
        self.stream.get_mut().write_all(&[head.as_bytes(), body].concat())?;
        let status = self.line()?;
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok());
        let mut answer = Answer {
            status: status.ok_or_else(|| std::io::Error::other("no status line"))?,
            content_type: String::new(),
            body: Vec::new(),
            is_last: false,
        };
        let mut len = None;
        loop {
            let line = self.line()?.to_ascii_lowercase();
            match line.split_once(": ") {
                Some(("content-length", value)) => len = value.parse().ok(),
                Some(("content-type", value)) => value.clone_into(&mut answer.content_type),
                Some(("connection", value)) => answer.is_last = value == "close",
                Some(_) => {}
                None => break,
            }
        }
        match len {
            Some(len) => {
                answer.body.resize(len, 0);
                self.stream.read_exact(&mut answer.body)?;
            }
            None => self.read_chunks(&mut answer.body)?,
        }
        Ok(answer)
    }

    fn line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        if line.is_empty() {
            return Err(std::io::Error::other("the connection was closed"));
        }
        Ok(line.trim_end().to_owned())
    }

    fn read_chunks(&mut self, body: &mut Vec<u8>) -> std::io::Result<()> {
        loop {
            let size = usize::from_str_radix(&self.line()?, 16).map_err(std::io::Error::other)?;
            let start = body.len();
            body.resize(start + size, 0);
            self.stream.read_exact(&mut body[start..])?;
            if self.line().is_ok_and(|line| !line.is_empty()) {
                return Err(std::io::Error::other("a chunk is longer than it says"));
            }
            if size == 0 {
                return Ok(());
            }
        }
    }
}

impl Answer {
    /// Says what is wrong with an answer to a request that may be anything.
    fn check(&self) -> Result<(), String> {
        let text = std::str::from_utf8(&self.body).map_err(|error| error.to_string())?;
        let wrong = |what: &str| Err(format!("{what}: {} {} {text}", self.status, self.content_type));
        let json = |text: &str| serde_json::from_str::<Value>(text);
        match (self.status, self.content_type.as_str()) {
            (200, "application/json") if json(text).is_ok() => Ok(()),
            (200, "text/event-stream") => {
                let Some(frames) = text.strip_suffix("data: [DONE]\n\n") else { return wrong("no end") };
                let mut frames = frames.split_terminator("\n\n");
                let is_json = |frame: &str| frame.strip_prefix("data: ").is_some_and(|data| json(data).is_ok());
                if frames.all(is_json) { Ok(()) } else { wrong("a frame that is not JSON") }
            }
            (200, kind) if kind.starts_with("text/plain") => Ok(()),
            (400..500, "application/json") => {
                let message = json(text).map_err(|error| error.to_string())?;
                if message["error"]["message"].is_string() { Ok(()) } else { wrong("no message") }
            }
            _ => wrong("no answer that a client expects"),
        }
    }
}

#[test]
fn any_body_gets_an_answer() {
    let address = server();
    let requests = requests();
    let bodies = requests.iter().map(|(_, body)| body.clone()).collect();
    for (path, body) in requests.iter().filter(|(path, _)| *path != "/v1/embeddings") {
        let answer = Connection::open(address).post(path, body.to_string().as_bytes()).expect("an answer");
        assert_eq!(answer.status, 200, "{path} {body}: {}", answer.body.escape_ascii());
    }
    let kept = RefCell::new(None);
    campaign::run("http", &documents(bodies), |body| {
        let path = requests[body.origin].0;
        // The server may close a connection between requests, so only a new one shows that an answer is missing.
        let mut connection = kept.take().unwrap_or_else(|| Connection::open(address));
        let answer = connection.post(path, &body.bytes).or_else(|_| {
            connection = Connection::open(address);
            connection.post(path, &body.bytes)
        });
        let answer = answer.map_err(|error| format!("{path}: {error}"))?;
        if !answer.is_last {
            kept.replace(Some(connection));
        }
        answer.check().map_err(|wrong| format!("{path}: {wrong}"))?;
        Ok(answer.status == 200)
    });
}
