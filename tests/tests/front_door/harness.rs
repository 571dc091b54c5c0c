//! A server with the tiny checkpoint on a free port, and a client that sees every byte of its answers.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use bcg_cli::args::ServerArgs;
use bcg_engine::{Engine, load};
use bcg_server::{Listeners, serve};
use clap::Parser;
use serde_json::{Value, json};
use tokio::sync::oneshot;

/// Longer than anything here takes; a test that hangs fails instead.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) const CERT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tls/cert.pem");
pub(crate) const KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tls/key.pem");
pub(crate) fn parse(flags: &[&str]) -> ServerArgs {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let line = ["bcg-server", "--model", model, "--device", "host", "--context-length", "512"];
    ServerArgs::try_parse_from(line.iter().chain(&["--kv-cache-tokens", "2048", "--shutdown-grace", "0"]).chain(flags))
        .expect("flags parse")
}

/// A server on a free port; it shuts down when told, or when dropped.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    /// The port of operators, with `--admin-port`.
    pub(crate) admin: Option<SocketAddr>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(flags: &[&str]) -> Self {
        let args = parse(flags);
        let engine = load::start(&args.engine.options(), |_| ()).expect("the tiny checkpoint loads");
        let engine: Arc<dyn Engine> = Arc::new(engine);
        let (stop, stopped) = oneshot::channel();
        let (ready, address) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let options = args.http.options();
                let bind = || async { tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port") };
                let public = bind().await;
                let admin = if args.admin_port.is_some() { Some(bind().await) } else { None };
                let address = |listener: &tokio::net::TcpListener| listener.local_addr().expect("an address");
                ready.send((address(&public), admin.as_ref().map(address))).expect("the test waits");
                let shutdown = async {
                    let _ = stopped.await;
                };
                serve(engine, Listeners { public, admin }, &options, shutdown).await.expect("the options fit");
            });
        });
        let (address, admin) = address.recv().expect("the server starts");
        Self { address, admin, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn connect(&self) -> Connection<TcpStream> {
        Connection::open(TcpStream::connect(self.address).expect("the server listens"))
    }

    /// Connects from 127.0.0.`host`, which is another client for each.
    pub(crate) fn connect_from(&self, host: u8) -> Connection<TcpStream> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
        let stream = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
            socket.bind(SocketAddr::from(([127, 0, 0, host], 0))).expect("an address of this machine");
            socket.connect(self.address).await.expect("the server listens").into_std().expect("a stream")
        });
        stream.set_nonblocking(false).expect("a socket option");
        Connection::open(stream)
    }

    pub(crate) fn get(&self, path: &str, headers: &str) -> Response {
        let mut connection = self.connect();
        connection.send("GET", path, headers, "");
        connection.response()
    }

    pub(crate) fn begin_shutdown(&mut self) {
        self.stop.take();
    }

    pub(crate) fn join(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server did not panic");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.begin_shutdown();
        self.join();
    }
}

pub(crate) struct Connection<S: Read>(pub(crate) BufReader<S>);

pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Connection<TcpStream> {
    pub(crate) fn open(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self(BufReader::new(stream))
    }
}

impl<S: Read + Write> Connection<S> {
    pub(crate) fn write(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).expect("the server reads");
    }

    /// Sends a whole request; `headers` are lines that end with CR LF.
    pub(crate) fn send(&mut self, method: &str, path: &str, headers: &str, body: &str) {
        let length = body.len();
        self.write(&format!(
            "{method} {path} HTTP/1.1\r\nHost: bcg\r\nContent-Length: {length}\r\n{headers}\r\n{body}"
        ));
    }

    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a line in time");
        line
    }

    /// Reads an answer, in chunks or of a known length.
    pub(crate) fn response(&mut self) -> Response {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            let line = self.line();
            assert!(!line.is_empty(), "the connection ended within the head: {head:?}");
            head += &line;
        }
        let head = head.to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).expect("a status");
        let mut body = Vec::new();
        let mut read = |connection: &mut Self, size: usize| {
            let from = body.len();
            body.resize(from + size, 0);
            connection.0.read_exact(&mut body[from..]).expect("a body in time");
        };
        match value(&head, "content-length") {
            Some(length) => read(self, length.parse().expect("a number")),
            None => loop {
                let size = usize::from_str_radix(self.line().trim(), 16).expect("a chunk size");
                read(self, size);
                self.line();
                if size == 0 {
                    break;
                }
            },
        }
        Response { status, head, body: String::from_utf8(body).expect("text") }
    }
}

pub(crate) fn value<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

impl Response {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        value(&self.head, name)
    }

    #[track_caller]
    pub(crate) fn assert_error(&self, status: u16, code: &str) {
        assert_eq!(self.status, status, "{}{}", self.head, self.body);
        let body: Value = serde_json::from_str(&self.body).expect("JSON");
        assert_eq!(body["error"]["code"], code, "{body}");
        assert!(body["error"]["message"].is_string() && body["error"]["type"].is_string(), "{body}");
    }
}

pub(crate) fn completion(tokens: usize, stream: bool) -> String {
    json!({"prompt": "hi", "max_tokens": tokens, "ignore_eos": true, "stream": stream, "temperature": 0}).to_string()
}
