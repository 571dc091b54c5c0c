//! Who a client is, and how much one may hold of the server.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bcg_engine::ClientId;
use serde_json::json;

use crate::client::{Server, options};
use crate::scripted::{Script, Scripted, text};
use crate::{PATIENCE, chat, completion, eventually};

#[test]
fn a_client_is_its_key_or_else_its_address() {
    let (server, engine) = Server::scripted(Vec::new());
    assert_eq!(server.post("/v1/completions", &completion(&json!({}))).status, 200);
    assert_eq!(engine.clients(), [(ClientId::new("127.0.0.1"), 0)]);
    let mut options = options();
    options.api_key = ["one", "two"].map(|key| key.parse().expect("a key")).into();
    let engine = Scripted::new(Vec::new());
    let server = Server::start(engine.clone(), options);
    for key in ["two", "one", "two"] {
        let header = format!("Authorization: Bearer {key}\r\n");
        let body = completion(&json!({})).to_string();
        assert_eq!(server.send_with("POST", "/v1/completions", &header, &body).finish().status, 200);
    }
    let clients: Vec<ClientId> = engine.clients().into_iter().map(|(client, _)| client).collect();
    assert!(clients[0] == clients[2] && clients[0] != clients[1], "{clients:?}");
    assert!(clients.iter().all(|client| !client.to_string().contains("two")), "a name is no secret");
}

#[test]
fn a_priority_reaches_the_engine() {
    let (server, engine) = Server::scripted(Vec::new());
    server.post("/v1/completions", &completion(&json!({"priority": 7})));
    server.post("/v1/chat/completions", &chat(&json!({"priority": -1000})));
    server.post("/generate", &json!({"text": "hi", "priority": 3}));
    let priorities: Vec<i32> = engine.clients().into_iter().map(|(_, priority)| priority).collect();
    assert_eq!(priorities, [7, -1000, 3]);
    server.post("/v1/completions", &completion(&json!({"priority": 1001}))).assert_error(
        400,
        &json!("priority"),
        "between -1000 and 1000",
    );
}

#[test]
fn a_stream_that_is_never_read_is_cancelled() {
    let mut options = options();
    options.response_write_timeout = Duration::from_millis(300);
    let engine = Scripted::new(vec![Script::Flood, Script::Slow(Duration::from_secs(1))]);
    let server = Server::start(engine.clone(), options);
    let unread = server.send("POST", "/v1/completions", &completion(&json!({"stream": true})).to_string());
    let slow = server.post("/v1/completions", &completion(&json!({"stream": true})));
    assert!(slow.body.contains("last"), "an answer that pauses is not cut off: {}", slow.body);
    eventually("the answer that nobody reads is cancelled", || engine.cancelled.load(Ordering::SeqCst) == 1);
    drop(unread);
}

#[test]
fn health_generate_is_satisfied_by_any_step() {
    let engine = Scripted::new(vec![Script::Hang]);
    let server = Server::start(engine.clone(), options());
    std::thread::scope(|scope| {
        let waiting: Vec<_> = (0..4).map(|_| scope.spawn(|| server.get("/health_generate").status)).collect();
        eventually("the engine is asked", || !engine.requests().is_empty());
        std::thread::sleep(Duration::from_millis(100));
        assert!(waiting.iter().all(|thread| !thread.is_finished()), "a first piece of text is not the end");
        engine.num_steps.store(5, Ordering::SeqCst);
        assert!(waiting.into_iter().all(|thread| thread.join().expect("an answer") == 200));
    });
    assert_eq!(engine.requests().len(), 1, "all waited for the same token");
    eventually("the token is not wanted any more", || engine.cancelled.load(Ordering::SeqCst) == 1);
}

#[test]
fn probes_hear_of_a_drain_until_it_ends() {
    let mut options = options();
    options.shutdown_grace = Duration::from_millis(500);
    let engine = Scripted::new(vec![Script::Slow(Duration::from_secs(1))]);
    let mut server = Server::start(engine.clone(), options);
    let running = server.send("POST", "/v1/completions", &completion(&json!({"stream": true})).to_string());
    eventually("it runs", || !engine.requests().is_empty());
    let began = Instant::now();
    server.begin_shutdown();
    eventually("the drain begins", || engine.draining.load(Ordering::SeqCst));
    let mut told = 0;
    let answer = std::thread::scope(|scope| {
        let running = scope.spawn(|| running.finish());
        while !running.is_finished() {
            let health = server.get("/health");
            if running.is_finished() {
                break;
            }
            assert_eq!((health.status, &health.json()["status"]), (503, &json!("draining")));
            let refused = server.post("/v1/completions", &completion(&json!({})));
            assert_eq!((refused.status, &refused.json()["error"]["code"]), (503, &json!("shutting_down")));
            assert_eq!(
                (refused.headers["connection"].as_str(), refused.headers["retry-after"].as_str()),
                ("close", "1")
            );
            told += 1;
            std::thread::sleep(Duration::from_millis(50));
            if told >= 3 {
                break;
            }
        }
        running.join().expect("an answer")
    });
    assert!(told > 0 && answer.body.contains("last") && answer.body.contains("[DONE]"), "{told} {}", answer.body);
    server.join();
    assert!(began.elapsed() < PATIENCE / 2);
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nothing listens any more");
}

#[test]
fn an_idle_server_answers_probes_for_its_grace() {
    let mut options = options();
    options.shutdown_grace = Duration::from_millis(500);
    let mut server = Server::start(Scripted::new(Vec::new()), options);
    let began = Instant::now();
    server.begin_shutdown();
    eventually("probes are told", || server.get("/health").status == 503);
    server.join();
    assert!(began.elapsed() >= Duration::from_millis(450), "{:?}", began.elapsed());
}

#[test]
fn failures_of_accepted_requests_have_their_status() {
    use bcg_engine::{EngineEvent, RequestError};
    let failed = |error: RequestError| Script::Answer(vec![text("a"), EngineEvent::Failed(error)]);
    let refused = || failed(RequestError::Refused("the format allows nothing here".into()));
    let late = || failed(RequestError::QueueTimeout { seconds: 9 });
    let (server, _) = Server::scripted(vec![refused(), late(), refused(), late()]);
    let whole = |needle: &str| {
        let response = server.post("/v1/completions", &completion(&json!({})));
        assert!(response.body.contains(needle), "{}", response.body);
        (response.status, response.headers.get("retry-after").cloned())
    };
    assert_eq!(whole("allows nothing"), (400, None));
    assert_eq!(whole("waited 9 seconds"), (503, Some("1".to_owned())));
    for code in [json!(null), json!("queue_timeout")] {
        let frames = server.post("/v1/completions", &completion(&json!({"stream": true}))).frames();
        assert_eq!(frames.last().expect("a frame")["error"]["code"], code);
    }
}
