//! A server on a free port and a client that sees every byte of its answers.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use bcg_engine::Engine;
use bcg_server::{HttpOptions, serve};
use serde_json::Value;
use tokio::sync::oneshot;

use crate::PATIENCE;
use crate::scripted::{Script, Scripted};

/// Options of a server that ends as soon as it can.
pub(crate) fn options() -> HttpOptions {
    let mut options = HttpOptions::default();
    options.shutdown_grace = Duration::ZERO;
    options
}

/// A server on a free port; it shuts down when told, or when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(engine: Arc<dyn Engine>, options: HttpOptions) -> Self {
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
                serve(engine, listener, &options, shutdown).await.expect("the options fit");
            });
        });
        let address = address.recv().expect("the server starts");
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn scripted(scripts: Vec<Script>) -> (Self, Arc<Scripted>) {
        let engine = Scripted::new(scripts);
        (Self::start(engine.clone(), options()), engine)
    }

    pub(crate) fn begin_shutdown(&mut self) {
        self.stop.take().expect("not yet told").send(()).expect("the server runs");
    }

    pub(crate) fn join(&mut self) {
        self.thread.take().expect("not yet joined").join().expect("the server did not panic");
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        self.send("POST", path, &body.to_string()).finish()
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        self.send("GET", path, "").finish()
    }

    pub(crate) fn send(&self, method: &str, path: &str, body: &str) -> Exchange {
        self.send_with(method, path, "", body)
    }

    /// `headers` are lines that end with CR LF.
    pub(crate) fn send_with(&self, method: &str, path: &str, headers: &str, body: &str) -> Exchange {
        let mut stream = TcpStream::connect(self.address).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: bcg\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n{headers}\r\n{body}"
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
pub(crate) struct Exchange {
    pub(crate) reader: BufReader<TcpStream>,
}

pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HashMap<String, String>,
    pub(crate) body: String,
}

impl Exchange {
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).expect("a line in time");
        line.trim_end().to_owned()
    }

    pub(crate) fn finish(mut self) -> Response {
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
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The JSON of each frame; checks the framing and the end.
    pub(crate) fn frames(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.body);
        assert_eq!(self.headers["content-type"], "text/event-stream");
        let frames = self.body.strip_suffix("data: [DONE]\n\n").expect("[DONE] comes last");
        let frames = frames.split("\n\n").filter(|frame| !frame.is_empty() && !frame.starts_with(':'));
        frames
            .map(|frame| serde_json::from_str(frame.strip_prefix("data: ").expect("a data line")).expect("JSON"))
            .collect()
    }

    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, param: &Value, needle: &str) {
        let body = self.json();
        assert_eq!(self.status, status, "{body}");
        let error = &body["error"];
        assert_eq!(&error["param"], param, "{body}");
        assert!(error["message"].as_str().is_some_and(|message| message.contains(needle)), "{body}");
        assert!(error["type"].is_string() && error.get("code").is_some(), "{body}");
    }
}
