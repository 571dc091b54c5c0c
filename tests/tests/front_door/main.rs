//! What stands before the routes, over real sockets: key, CORS, TLS, limits, request ids and spans. The engine is the tiny
//! checkpoint on the host device.

mod bounds;
mod harness;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use bcg_cli::args::in_flags;
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Attribute;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::{Value, json};
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use self::harness::{CERT, Connection, KEY, PATIENCE, Server, completion, parse, value};

/// How soon an overloaded server must say so.
const OVERLOAD_ANSWER: Duration = Duration::from_millis(50);

const OTHER_KEY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/tls/other_key.pem");

#[test]
fn a_key_opens_every_route_but_health_and_metrics() {
    let server = Server::start(&["--api-key", "secret", "--api-key", "other"]);
    for path in ["/health", "/metrics"] {
        assert_eq!(server.get(path, "").status, 200, "{path}");
    }
    for path in ["/v1/models", "/v1/nothing", "/health_generate"] {
        let response = server.get(path, "");
        response.assert_error(401, "invalid_api_key");
        assert_eq!(response.header("www-authenticate"), Some("bearer"));
        server.get(path, "Authorization: Bearer wrong\r\n").assert_error(401, "invalid_api_key");
    }
    for path in ["/v1/models", "/health_generate"] {
        assert_eq!(server.get(path, "Authorization: Bearer secret\r\n").status, 200, "{path}");
        assert_eq!(server.get(path, "Authorization: Bearer other\r\n").status, 200, "{path}");
    }
    let mut connection = server.connect();
    connection.send("POST", "/v1/completions", "", &completion(4, false));
    connection.response().assert_error(401, "invalid_api_key");
    connection.send("POST", "/v1/completions", "Authorization: Bearer secret\r\n", &completion(4, false));
    assert_eq!(connection.response().status, 200, "the connection is as good as before");
    assert!(server.get("/metrics", "").body.contains("route=\"/v1/models\",code=\"401\"} 2"));
}

#[test]
fn pages_of_allowed_origins_may_use_the_server() {
    const PREFLIGHT: &str = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n";
    let server = Server::start(&["--cors-allow-origin", "https://chat.example.com", "--api-key", "secret"]);
    let mut connection = server.connect();
    let mut ask = |method: &str, origin: &str, more: &str| {
        connection.send(method, "/v1/chat/completions", &format!("Origin: {origin}\r\n{more}"), "");
        connection.response()
    };
    let preflight = ask("OPTIONS", "https://chat.example.com", PREFLIGHT);
    assert_eq!(preflight.status, 200, "a preflight carries no key");
    assert_eq!(preflight.header("access-control-allow-origin"), Some("https://chat.example.com"));
    assert_eq!(preflight.header("access-control-allow-headers"), Some("authorization"));
    let refused = ask("POST", "https://chat.example.com", "");
    assert_eq!(refused.status, 401);
    assert_eq!(refused.header("access-control-allow-origin"), Some("https://chat.example.com"), "a page may read it");
    assert_eq!(ask("OPTIONS", "https://other.example.com", PREFLIGHT).header("access-control-allow-origin"), None);
    let open = Server::start(&["--cors-allow-origin", "*"]);
    let any = open.get("/v1/models", "Origin: https://anything.example.com\r\n");
    assert_eq!(any.header("access-control-allow-origin"), Some("*"));
    assert_eq!(
        Server::start(&[]).get("/health", "Origin: https://a.example.com\r\n").header("access-control-allow-origin"),
        None
    );
}

fn tls_client(server: &Server) -> Connection<StreamOwned<ClientConnection, TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(CERT).expect("the test certificate")).expect("a certificate");
    let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let name = ServerName::try_from("localhost").expect("a name");
    let client = ClientConnection::new(Arc::new(config), name).expect("a client");
    Connection(BufReader::new(StreamOwned::new(client, server.connect().0.into_inner())))
}

#[test]
fn https_serves_and_drains_as_http_does() {
    let mut server = Server::start(&["--tls-cert", CERT, "--tls-key", KEY]);
    let mut client = tls_client(&server);
    client.send("GET", "/v1/models", "", "");
    assert_eq!(client.response().status, 200);
    let mut plain = server.connect();
    plain.send("GET", "/v1/models", "", "");
    let mut answer = Vec::new();
    let _ = plain.0.read_to_end(&mut answer);
    assert!(!answer.starts_with(b"HTTP"), "plain HTTP is not answered");
    client.send("POST", "/v1/completions", "", &completion(200, true));
    assert!(client.line().contains("200"));
    server.begin_shutdown();
    let mut rest = String::new();
    // A server that closes does not say so in TLS if its client has not; the stream itself says that it is whole.
    let _ = client.0.read_to_string(&mut rest);
    assert!(rest.contains("[DONE]"), "{rest}");
    server.join();
    TcpStream::connect(server.address).expect_err("nothing listens any more");
}

#[test]
fn tls_files_that_cannot_work_are_named() {
    let missing = "/nonexistent/cert.pem";
    for (cert, key, flag, needle) in [
        (missing, KEY, "--tls-cert", missing),
        (KEY, KEY, "--tls-cert", "holds no certificate"),
        (CERT, missing, "--tls-key", missing),
        (CERT, CERT, "--tls-key", "private key"),
        (CERT, OTHER_KEY, "--tls-cert", "do not go together"),
    ] {
        let args = parse(&["--tls-cert", cert, "--tls-key", key]);
        let error = args.http.options().check().expect_err("cannot work");
        let error = in_flags(&format!("{:#}", anyhow::Error::from(error)));
        assert!(error.starts_with(flag) && error.contains(needle), "{error}");
    }
}

#[test]
fn a_connection_too_many_is_told_so_at_once() {
    for flags in [&["--max-connections", "2"][..], &["--max-connections", "2", "--tls-cert", CERT, "--tls-key", KEY]] {
        let server = Server::start(flags);
        let ask = || {
            let began = Instant::now();
            let response = if flags.len() > 2 {
                let mut client = tls_client(&server);
                client.send("POST", "/v1/completions", "", &completion(4, false));
                client.response()
            } else {
                let mut client = server.connect();
                client.send("POST", "/v1/completions", "", &completion(4, false));
                client.response()
            };
            (response, began.elapsed())
        };
        let held = [server.connect(), server.connect()];
        // The machine that runs this may be busy; the server must not be what makes it slow.
        let answers: Vec<_> = (0..5).map(|_| ask()).collect();
        for (response, _) in &answers {
            response.assert_error(503, "too_many_connections");
            assert_eq!((response.header("retry-after"), response.header("connection")), (Some("1"), Some("close")));
        }
        let soonest = answers.iter().map(|(_, took)| *took).min().expect("five answers");
        assert!(soonest < OVERLOAD_ANSWER, "{soonest:?}");
        drop(held);
        let began = Instant::now();
        while ask().0.status != 200 {
            assert!(began.elapsed() < PATIENCE, "closed connections make room");
        }
    }
}

#[test]
fn a_request_that_drips_in_is_ended() {
    let server = Server::start(&["--request-read-timeout", "1", "--max-body-bytes", "1000"]);
    let mut head = server.connect();
    head.write("POST /v1/completions HTTP/1.1\r\nHost: bcg\r\n");
    let mut body = server.connect();
    body.write("POST /v1/completions HTTP/1.1\r\nHost: bcg\r\nContent-Length: 900\r\n\r\n");
    let mut idle = server.connect();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let mut writer = body.0.get_ref().try_clone().expect("a second handle");
        // One byte at a time: each comes soon, and all of them never.
        scope.spawn(move || {
            while began.elapsed() < PATIENCE && writer.write_all(b" ").is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let response = body.response();
        response.assert_error(408, "request_timeout");
        assert!(response.header("x-request-id").is_some());
        drop(body);
    });
    for connection in [&mut head, &mut idle] {
        let mut rest = Vec::new();
        let _ = connection.0.read_to_end(&mut rest);
        assert!(!rest.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&rest));
    }
    let took = began.elapsed();
    assert!((Duration::from_millis(900)..PATIENCE / 2).contains(&took), "{took:?}");
    let mut large = server.connect();
    large.write("POST /v1/completions HTTP/1.1\r\nHost: bcg\r\nContent-Length: 1001\r\n\r\n");
    large.response().assert_error(413, "request_too_large");
    let mut chunked = server.connect();
    let chunk = "x".repeat(600);
    chunked.write("POST /v1/completions HTTP/1.1\r\nHost: bcg\r\nTransfer-Encoding: chunked\r\n\r\n");
    chunked.write(&format!("258\r\n{chunk}\r\n258\r\n{chunk}\r\n0\r\n\r\n"));
    chunked.response().assert_error(413, "request_too_large");
    assert_eq!(server.get("/health", "").status, 200);
}

/// Log lines of this process.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.lock().expect("lock").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn every_answer_and_its_log_line_name_the_request() {
    tracing_subscriber::fmt().json().with_writer(|| Log).init();
    let mut server = Server::start(&[]);
    for path in ["/health", "/v1/models", "/v1/nothing", "/v1/completions"] {
        let (given, made) = (server.get(path, "X-Request-Id: mine-7\r\n"), server.get(path, ""));
        assert_eq!(given.header("x-request-id"), Some("mine-7"), "{path}");
        assert_eq!(made.header("x-request-id").map(str::len), Some(32), "{path}");
        assert!(made.header("server").is_some_and(|server| server.starts_with("bcg/")), "{path}");
    }
    server.begin_shutdown();
    server.join();
    let log = String::from_utf8(LOG.lock().expect("lock").clone()).expect("text");
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let named: Vec<Value> = lines.filter(|line| line["span"]["id"] == "mine-7").collect();
    let paths: Vec<&Value> = named.iter().map(|line| &line["span"]["path"]).collect();
    assert_eq!(paths, ["/v1/models", "/v1/nothing", "/v1/completions"], "{log}");
    assert_eq!((&named[1]["fields"]["status"], &named[1]["fields"]["message"]), (&json!(404), &json!("answered")));
}

/// Answers everything with 200 and passes on the bodies that come to `/v1/traces`.
fn collector() -> (String, mpsc::Receiver<Vec<u8>>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    let (sender, bodies) = mpsc::channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.expect("a connection"));
            let (mut head, mut line) = (String::new(), String::new());
            while line != "\r\n" {
                line.clear();
                reader.read_line(&mut line).expect("a line");
                head += &line.to_ascii_lowercase();
            }
            let length = value(&head, "content-length").and_then(|length| length.parse().ok()).expect("a length");
            let mut body = vec![0; length];
            reader.read_exact(&mut body).expect("a body");
            assert!(
                head.starts_with("post /v1/traces ") && head.contains("content-type: application/x-protobuf"),
                "{head}"
            );
            sender.send(body).expect("the test waits");
            reader
                .get_mut()
                .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                .expect("an answer");
        }
    });
    (url, bodies)
}

fn attribute(span: &Span, name: &str) -> Option<Attribute> {
    span.attributes.iter().find(|attribute| attribute.key == name)?.value.as_ref()?.value.clone()
}

#[test]
fn a_request_is_a_span_of_its_clients_trace() {
    let (url, bodies) = collector();
    let mut server = Server::start(&["--otlp-endpoint", &url]);
    let parent = "Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n";
    let mut client = server.connect();
    client.send("POST", "/v1/completions", parent, &completion(5, true));
    assert!(client.response().body.contains("[DONE]"));
    client.send("POST", "/v1/chat/completions", "", "{}");
    assert_eq!(client.response().status, 400);
    assert_eq!(server.get("/health", "").status, 200);
    let mut leaving = server.connect();
    leaving.send(
        "POST",
        "/v1/chat/completions",
        "",
        &json!({
        "messages": [{"role": "user", "content": "hi"}], "stream": true, "ignore_eos": true, "max_tokens": 400})
        .to_string(),
    );
    while !leaving.line().contains("\"content\"") {}
    drop(leaving);
    server.begin_shutdown();
    server.join();
    let mut spans: Vec<Span> = Vec::new();
    while let Ok(body) = bodies.try_recv() {
        let export = ExportTraceServiceRequest::decode(body.as_slice()).expect("an export");
        let resource = export.resource_spans[0].resource.as_ref().expect("a resource");
        assert!(resource.attributes.iter().any(|attribute| attribute.key == "service.name"));
        spans.extend(
            export.resource_spans.into_iter().flat_map(|spans| spans.scope_spans).flat_map(|spans| spans.spans),
        );
    }
    assert_eq!(spans.len(), 3, "health makes no span: {spans:#?}");
    let named = |name: &str, of: &str, value: &Attribute| {
        let mut found = spans.iter().filter(|span| span.name == name && attribute(span, of).as_ref() == Some(value));
        found.next().unwrap_or_else(|| panic!("no {name} with {of} {value:?} in {spans:#?}"))
    };
    let (text, int) = (|text: &str| Attribute::StringValue(text.to_owned()), Attribute::IntValue);
    let answered = named("POST /v1/completions", "http.response.status_code", &int(200));
    assert_eq!(answered.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    assert_eq!(answered.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
    assert_eq!(attribute(answered, "http.route"), Some(text("/v1/completions")));
    assert_eq!(attribute(answered, "gen_ai.request.model"), Some(text("tiny-qwen3")));
    assert_eq!(attribute(answered, "gen_ai.operation.name"), Some(text("text_completion")));
    assert_eq!(attribute(answered, "gen_ai.usage.output_tokens"), Some(int(5)));
    assert!(matches!(attribute(answered, "gen_ai.usage.input_tokens"), Some(Attribute::IntValue(1..))));
    let Some(Attribute::DoubleValue(first)) = attribute(answered, "gen_ai.server.time_to_first_token") else {
        panic!("{answered:#?}");
    };
    let whole = (answered.end_time_unix_nano - answered.start_time_unix_nano) as f64 / 1e9;
    assert!(first > 0.0 && first <= whole, "{first} s of {whole} s");
    let refused = named("POST /v1/chat/completions", "http.response.status_code", &int(400));
    assert_eq!((refused.parent_span_id.len(), attribute(refused, "gen_ai.usage.output_tokens")), (0, None));
    named("POST /v1/chat/completions", "error.type", &text("client_left"));
}

#[test]
fn a_collector_that_is_not_there_changes_no_answer() {
    let mut server = Server::start(&["--otlp-endpoint", "http://127.0.0.1:9"]);
    let mut client = server.connect();
    client.send("POST", "/v1/completions", "", &completion(3, false));
    assert_eq!(client.response().status, 200);
    let began = Instant::now();
    server.begin_shutdown();
    server.join();
    assert!(began.elapsed() < PATIENCE / 2);
}
