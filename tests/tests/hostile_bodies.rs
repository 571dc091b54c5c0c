//! Bodies at the limit that cost as much as they can: what they take of the server's memory, and what another client sees
//! meanwhile. A process of its own, because its memory is measured.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bcg_cli::args::ServerArgs;
use bcg_engine::{Engine, load};
use bcg_server::serve;
use clap::Parser;

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of one body.
const BODY_BYTES: usize = 3 << 20;
/// Bodies at once.
const BODIES: usize = 8;
/// Memory that the bodies may take, as a multiple of their bytes.
const MEMORY_PER_BYTE: usize = 8;
/// How long `/health` may take meanwhile: the dependencies of this test are not optimised, and other tests run beside it.
const HEALTH_MAX: Duration = Duration::from_secs(2);

/// Starts a server that runs as long as the process.
fn start() -> SocketAddr {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");
    let bytes = BODY_BYTES.to_string();
    let flags = ["bcg-server", "--model", model, "--device", "host", "--max-body-bytes", bytes.as_str()];
    let args = ServerArgs::try_parse_from(flags).expect("flags parse");
    let engine: Arc<dyn Engine> = Arc::new(load::start(&args.engine.options(), |_| ()).expect("the model loads"));
    let (ready, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
            ready.send(listener.local_addr().expect("an address")).expect("the test waits");
            serve(engine, listener, &args.http.options(), std::future::pending()).await.expect("the options fit");
        });
    });
    address.recv().expect("the server starts")
}

/// Sends a request and returns the status of its answer.
fn ask(address: SocketAddr, method: &str, path: &str, body: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).expect("the server listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let length = body.len();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: bcg\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body)).expect("the server reads");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an answer");
    String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap_or_default().to_owned()
}

/// A body of the size of the limit: `head`, as many of `unit` as fit, separated by commas, and `tail`.
fn filled(head: &str, unit: &str, tail: &str) -> Vec<u8> {
    let room = BODY_BYTES - head.len() - tail.len();
    let units = vec![unit; room / (unit.len() + 1)].join(",");
    format!("{head}{units}{tail}").into_bytes()
}

/// Routes and bodies, with the status that each must get.
fn bodies() -> Vec<(&'static str, &'static str, Vec<u8>, &'static str)> {
    const CHAT: &str = "/v1/chat/completions";
    let user = r#"{"messages":[{"role":"user","content":"hi"#;
    let extra = format!("{user}\",\"x\":[");
    let budget = filled(&extra, r#"{"":[0]}"#, "]}],\"max_tokens\":1}");
    vec![
        ("messages", CHAT, filled(r#"{"messages":["#, r#"{"role":"user"}"#, "]}"), "400"),
        ("content parts", CHAT, filled(r#"{"messages":[{"role":"user","content":["#, r#"{"type":""}"#, "]}]}"), "400"),
        ("empty arrays", CHAT, filled(&extra, "[]", "]}]}"), "400"),
        ("small objects", CHAT, budget, "400"),
        ("tools", CHAT, filled(r#"{"tools":["#, "{}", "]}"), "400"),
        ("biases", "/v1/completions", filled(r#"{"prompt":"a","logit_bias":{"#, r#""1":1"#, "}}"), "400"),
        ("unknown fields", CHAT, filled("{", r#""a":0"#, "}"), "400"),
        ("nesting", CHAT, [b"{\"a\":".as_slice(), &b"[".repeat(BODY_BYTES - 5)].concat(), "400"),
        (
            "one text",
            CHAT,
            filled(&format!("{user}\"}},{{\"role\":\"user\",\"content\":\""), "a b c d", "\"}]}"),
            "400",
        ),
        ("escapes", CHAT, filled(&format!("{user}\"}},{{\"role\":\"user\",\"content\":\""), "\\u00e9", "\"}]}"), "400"),
        ("token ids", "/v1/completions", filled(r#"{"prompt":["#, "7", "]}"), "400"),
        ("prompts", "/v1/completions", filled(r#"{"prompt":["#, "[]", "]}"), "400"),
        ("a text to count", "/tokenize", filled(r#"{"prompt":""#, "a b c d", "\"}"), "400"),
        ("tokens to spell", "/detokenize", filled(r#"{"tokens":["#, "7", "]}"), "400"),
        ("stop strings", "/v1/completions", filled(r#"{"prompt":"a","stop":["#, "\"a\"", "]}"), "400"),
        ("a schema", CHAT, filled(r#"{"messages":[],"response_format":{"a":["#, "0", "]}}"), "400"),
    ]
}

/// A line of `/proc/self/status`, in bytes.
fn status_bytes(name: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a line");
    line.trim_start_matches(':').trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

#[test]
fn hostile_bodies_cost_little_and_delay_nobody() {
    let address = start();
    assert_eq!(ask(address, "POST", "/v1/completions", br#"{"prompt":"hi","max_tokens":2}"#), "200");
    let bodies = bodies();
    // What an earlier kind of body leaves behind counts for the later ones too.
    let idle = status_bytes("VmRSS");
    for (what, path, body, expected) in bodies {
        assert!(body.len() > BODY_BYTES - 20 && body.len() <= BODY_BYTES, "{what}: {}", body.len());
        // Forgets the highest size so far.
        std::fs::write("/proc/self/clear_refs", "5").expect("Linux");
        let done = AtomicBool::new(false);
        let slowest = std::thread::scope(|scope| {
            let watch = scope.spawn(|| {
                let mut slowest = Duration::ZERO;
                while !done.load(Ordering::SeqCst) {
                    let began = Instant::now();
                    assert_eq!(ask(address, "GET", "/health", b""), "200", "{what}");
                    slowest = slowest.max(began.elapsed());
                    std::thread::sleep(Duration::from_millis(5));
                }
                slowest
            });
            let senders: Vec<_> = (0..BODIES).map(|_| scope.spawn(|| ask(address, "POST", path, &body))).collect();
            for sender in senders {
                let status = sender.join().expect("an answer");
                // A client's share of all bodies may be used up.
                assert!(status == expected || status == "429", "{what}: {status}");
            }
            done.store(true, Ordering::SeqCst);
            watch.join().expect("/health answers")
        });
        let peak = status_bytes("VmHWM").saturating_sub(idle);
        let multiple = peak as f64 / (BODIES * body.len()) as f64;
        println!("{what}: {multiple:.2} times the bytes, /health within {slowest:?}");
        assert!(peak <= MEMORY_PER_BYTE * BODIES * body.len(), "{what}: {multiple:.1} times the bytes");
        assert!(slowest < HEALTH_MAX, "{what}: {slowest:?}");
    }
}
