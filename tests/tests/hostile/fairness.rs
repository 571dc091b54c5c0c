//! One client that asks for very much beside one that asks for little.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::Report;
use crate::client::{get, header, request};
use crate::process::Server;

/// Requests of the heavy client.
const HEAVY: usize = 500;
/// Questions of the light one, on an idle server and beside the heavy one.
const LIGHT: usize = 20;
/// How many times as long as on an idle server its first token may take.
const RATIO_MAX: f64 = 3.0;
/// What a first token may take in any case: machines that run other tests as well are this uneven. Behind the queue of the
/// heavy client it would be seconds.
const FIRST_TOKEN_FLOOR: Duration = Duration::from_millis(200);
/// Connections for all, and steps that the host device, which computes row by row, makes about as fast as a GPU does.
const FLAGS: [&str; 4] = ["--max-connections", "2048", "--max-running-requests", "4"];

const HEAVY_KEY: &str = "Authorization: Bearer heavy\r\n";
const LIGHT_KEY: &str = "Authorization: Bearer light\r\n";

/// Times first tokens with keys and without; without them, clients are told apart by their addresses.
pub(crate) fn run(report: &mut Report) {
    report.row("fairness", "clients with keys", || {
        let server = Server::start(&[&FLAGS[..], &["--api-key", "heavy", "--api-key", "light"]].concat(), &[]);
        check(&server, HEAVY_KEY, LIGHT_KEY, "127.0.0.1")
    });
    report.row("fairness", "clients with addresses", || {
        let server = Server::start(&FLAGS, &[]);
        check(&server, "", "", "127.0.0.2")
    });
}

fn check(server: &Server, heavy_key: &str, light_key: &str, light_address: &str) -> Result<(), String> {
    let light = || first_tokens(server.address, light_key, light_address);
    let idle = light()?;
    let body = r#"{"prompt": "Once upon a time", "max_tokens": 400, "ignore_eos": true, "stream": true}"#;
    let bytes = request("POST", "/v1/completions", heavy_key, body.as_bytes());
    let mut streams = Vec::new();
    for _ in 0..HEAVY {
        let mut stream = server.connect();
        stream.write_all(&bytes).map_err(|error| error.to_string())?;
        streams.push(stream);
    }
    wait_busy(server)?;
    let busy = light()?;
    drop(streams);
    let most = idle.mul_f64(RATIO_MAX).max(FIRST_TOKEN_FLOOR);
    println!("fairness: first token {idle:?} on an idle server, {busy:?} beside {HEAVY} long requests");
    if busy > most { Err(format!("a first token took {busy:?}, and {idle:?} on an idle server")) } else { Ok(()) }
}

fn wait_busy(server: &Server) -> Result<(), String> {
    for _ in 0..500 {
        let metrics = get(server.address, "/metrics")?.body;
        let running = metrics.lines().find_map(|line| line.strip_prefix("bcg_running_requests ")?.parse::<f64>().ok());
        if running.ok_or("no metric bcg_running_requests")? >= 4.0 {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err("the heavy client never had 4 requests running".into())
}

/// The median time to a first token.
fn first_tokens(address: SocketAddr, key: &str, from: &str) -> Result<Duration, String> {
    let mut times = (0..LIGHT).map(|at| first_token(address, key, from, at)).collect::<Result<Vec<_>, _>>()?;
    times.sort();
    Ok(times[times.len() / 2])
}

fn first_token(address: SocketAddr, key: &str, from: &str, at: usize) -> Result<Duration, String> {
    let body = format!(r#"{{"prompt": "{at}+1=", "max_tokens": 4, "stream": true}}"#);
    let mut stream = connect_from(from, address)?;
    let began = Instant::now();
    let bytes = request("POST", "/v1/completions", &format!("{key}Connection: close\r\n"), body.as_bytes());
    stream.write_all(&bytes).map_err(|error| error.to_string())?;
    let mut head = String::new();
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).map_err(|error| error.to_string())? == 0 {
            return Err(format!("no first token: {head}"));
        }
        if line.starts_with("data: {") {
            break;
        }
        head += &line;
    }
    let first = began.elapsed();
    if header(&head, "content-type").is_none_or(|kind| !kind.starts_with("text/event-stream")) {
        return Err(format!("no stream: {head}"));
    }
    // The rest is read, so that the next question finds the server as this one did.
    while reader.read_line(&mut head).map_err(|error| error.to_string())? > 0 {}
    Ok(first)
}

/// A connection from another of this machine's own addresses.
fn connect_from(from: &str, to: SocketAddr) -> Result<std::net::TcpStream, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let socket = runtime.block_on(async {
        let socket = tokio::net::TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(from.parse().expect("an address"), 0))?;
        socket.connect(to).await?.into_std()
    });
    let stream = socket.map_err(|error| error.to_string())?;
    stream.set_nonblocking(false).map_err(|error| error.to_string())?;
    Ok(stream)
}
