//! What one client may hold or delay, and what another sees meanwhile.

use std::io::Read;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::harness::{CERT, Connection, KEY, PATIENCE, Server, completion};

const HEAD: &str = "POST /v1/completions HTTP/1.1\r\nHost: bcg\r\n";

/// Begins a body of `announced` bytes and sends `sent` of them.
fn begin_body(connection: &mut Connection<TcpStream>, announced: usize, sent: usize) {
    connection.write(&format!("{HEAD}Content-Length: {announced}\r\n\r\n{}", " ".repeat(sent)));
}

/// Waits for the end of a connection and returns what came.
fn rest(connection: &mut Connection<TcpStream>) -> String {
    let mut rest = Vec::new();
    let _ = connection.0.read_to_end(&mut rest);
    String::from_utf8_lossy(&rest).into_owned()
}

#[track_caller]
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < PATIENCE, "never: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn slow_heads_of_one_address_leave_connections_for_others() {
    let server = Server::start(&["--max-connections", "20", "--admin-port", "0"]);
    let status = |mut connection: Connection<TcpStream>| {
        connection.write("GET /health HTTP/1.1\r\nHost: bcg\r\n\r\n");
        connection.response()
    };
    let mut slow: Vec<_> = (0..40).map(|_| server.connect_from(2)).collect();
    slow.iter_mut().for_each(|connection| {
        // Those that are refused may be closed by now.
        let _ = std::io::Write::write_all(connection.0.get_mut(), b"GET /health HTT");
    });
    status(server.connect_from(2)).assert_error(503, "too_many_connections");
    assert_eq!(status(server.connect_from(3)).status, 200, "another address has its share");
    let admin = server.admin.expect("--admin-port");
    let on_admin = status(Connection::open(TcpStream::connect(admin).expect("it listens")));
    assert_eq!(on_admin.status, 200, "and so have operators");
    drop(slow);
    eventually("closed connections make room", || status(server.connect_from(2)).status == 200);
}

#[test]
fn a_body_that_nobody_asked_for_is_not_waited_for() {
    let server = Server::start(&["--api-key", "secret"]);
    let mut connection = server.connect();
    connection.write("POST /health HTTP/1.1\r\nHost: bcg\r\nContent-Length: 4000000\r\n\r\nx");
    // The rest never comes, and no key was shown.
    assert_eq!(connection.response().status, 405);
}

#[test]
fn operators_have_a_port_of_their_own() {
    let server = Server::start(&["--admin-port", "0", "--api-key", "secret", "--tls-cert", CERT, "--tls-key", KEY]);
    let ask = |method: &str, path: &str| {
        let stream = TcpStream::connect(server.admin.expect("--admin-port")).expect("it listens");
        let mut connection = Connection::open(stream);
        connection.send(method, path, "", "");
        connection.response()
    };
    for path in ["/health", "/health_generate", "/metrics", "/server_info", "/flush_cache"] {
        assert_eq!(ask("GET", path).status, 200, "{path}");
    }
    assert_eq!(ask("POST", "/flush_cache").status, 200);
    assert!(ask("GET", "/health").header("x-request-id").is_some());
    for path in ["/v1/models", "/v1/completions", "/generate"] {
        ask("POST", path).assert_error(404, "unknown_url");
    }
}

#[test]
fn bodies_share_a_number_of_bytes() {
    let flags = ["--max-body-bytes", "1000000", "--max-inflight-body-bytes", "1000000"];
    let server = Server::start(&flags);
    let try_body = |host: u8, bytes: usize| {
        let mut connection = server.connect_from(host);
        connection.send("POST", "/v1/completions", "", &" ".repeat(bytes));
        connection.response()
    };
    let mut announced = server.connect_from(2);
    begin_body(&mut announced, 1_000_000, 0);
    let mut held = server.connect_from(2);
    // Within the share of one client, however the bytes arrive.
    begin_body(&mut held, 950_000, 800_000);
    // Other bodies that come while these bytes arrive would take their room.
    std::thread::sleep(Duration::from_secs(1));
    eventually("the bytes are counted", || try_body(3, 900_000).status == 429);
    let refused = try_body(3, 900_000);
    refused.assert_error(429, "bodies_full");
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert_eq!(try_body(3, 60_000).status, 400, "a small body is not counted");
    assert_eq!(try_body(3, 150_000).status, 400, "what is left is for others");
    try_body(2, 150_000).assert_error(429, "bodies_full");
    drop(held);
    eventually("a connection that closed has given them back", || try_body(3, 900_000).status == 400);
    drop(announced);
}

#[test]
fn a_tls_handshake_that_does_not_come_is_ended() {
    let server = Server::start(&["--request-read-timeout", "1", "--tls-cert", CERT, "--tls-key", KEY]);
    let mut silent = server.connect();
    let mut begun = server.connect();
    std::io::Write::write_all(begun.0.get_mut(), b"\x16\x03\x01\x02\x00\x01").expect("the server reads");
    let began = Instant::now();
    assert_eq!((rest(&mut silent), rest(&mut begun)), (String::new(), String::new()));
    assert!(began.elapsed() < PATIENCE / 2);
}

#[test]
fn a_client_that_asks_first_is_told_before_it_sends_a_body() {
    let server = Server::start(&["--max-body-bytes", "1000"]);
    let mut connection = server.connect();
    let body = completion(1, false);
    connection.write(&format!("{HEAD}Expect: 100-continue\r\nContent-Length: {}\r\n\r\n", body.len()));
    assert_eq!((connection.line().trim_end(), connection.line().trim_end()), ("HTTP/1.1 100 Continue", ""));
    connection.write(&body);
    assert_eq!(connection.response().status, 200);
    let mut large = server.connect();
    large.write(&format!("{HEAD}Expect: 100-continue\r\nContent-Length: 1001\r\n\r\n"));
    large.response().assert_error(413, "request_too_large");
}

#[test]
fn requests_that_come_at_once_are_answered_in_order() {
    let server = Server::start(&[]);
    let mut connection = server.connect();
    let request = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: bcg\r\nX-Request-Id: {}\r\n\r\n", &path[1..]);
    connection.write(&["/health", "/metrics", "/health"].map(request).concat());
    for id in ["health", "metrics", "health"] {
        let response = connection.response();
        assert_eq!((response.status, response.header("x-request-id")), (200, Some(id)));
    }
}

#[test]
fn a_head_has_a_bounded_length() {
    let server = Server::start(&[]);
    for head in [format!("X: {}\r\n", "x".repeat(300_000)), "X: x\r\n".repeat(5000)] {
        let mut connection = server.connect();
        // The server may close while this is written.
        let request = format!("GET /health HTTP/1.1\r\nHost: bcg\r\n{head}\r\n");
        let _ = std::io::Write::write_all(connection.0.get_mut(), request.as_bytes());
        let answer = rest(&mut connection);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
    }
    assert_eq!(server.get("/health", "").status, 200);
}

#[test]
fn a_connection_that_is_closed_on_one_side_does_no_harm() {
    let server = Server::start(&["--request-read-timeout", "1"]);
    for body in [completion(1, false), completion(400, true)] {
        let mut half = server.connect();
        half.send("POST", "/v1/completions", "", &body);
        half.0.get_ref().shutdown(std::net::Shutdown::Write).expect("open");
        let _ = rest(&mut half);
    }
    let mut endless = server.connect();
    endless.write(&format!("{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n     \r\n"));
    endless.response().assert_error(408, "request_timeout");
    assert_eq!(server.get("/health", "").status, 200);
}
