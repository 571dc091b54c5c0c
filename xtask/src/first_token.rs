//! Measures how long the server takes from its start to the first token of its first answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::process::{cargo, command, root, run as run_process, target};

/// What users are promised, on two cores.
const LIMIT: Duration = Duration::from_secs(2);
/// Longer than a start takes; a server that never serves ends the measurement.
const PATIENCE: Duration = Duration::from_secs(60);
const RUNS: usize = 5;

/// Times since the process was started.
struct Times {
    ready: Duration,
    first_token: Duration,
}

/// Ends the server, however the measurement ends.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs `cargo xtask first-token`.
pub(crate) fn run() -> Result<()> {
    let mut medians = Vec::new();
    for (profile, folder) in [("release", "release"), ("dev", "debug")] {
        run_process(&mut cargo(["build", "--quiet", "--profile", profile, "-p", "bcg-cli", "--bin", "bcg-server"]))?;
        for graphs in [true, false] {
            let mut all = (0..RUNS).map(|_| measure(folder, graphs)).collect::<Result<Vec<_>>>()?;
            let median = |all: &mut Vec<Times>, time: fn(&Times) -> Duration| {
                all.sort_by_key(time);
                time(&all[all.len() / 2])
            };
            let (ready, first_token) =
                (median(&mut all, |times| times.ready), median(&mut all, |times| times.first_token));
            let graphs = if graphs { "with graphs" } else { "eager" };
            println!("{profile:8} {graphs:12} serves after {ready:.2?}, first token after {first_token:.2?}");
            medians.push(first_token);
        }
    }
    ensure!(medians[0] < LIMIT, "the first token of a release build comes later than {LIMIT:?}");
    Ok(())
}

fn measure(folder: &str, graphs: bool) -> Result<Times> {
    let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut server: Command = command(target().join(folder).join("bcg-server"));
    server.arg("--model").arg(root().join("models").join("tiny-qwen3"));
    server.args(["--device", "host", "--port", &address.port().to_string()]);
    if graphs {
        server.arg("--enable-breakable-cuda-graph");
    }
    let began = Instant::now();
    let _server =
        Server(server.stderr(Stdio::null()).stdout(Stdio::null()).spawn().context("cannot start the server")?);
    while !is_ready(address) {
        ensure!(began.elapsed() < PATIENCE, "the server does not serve within {PATIENCE:?}");
        sleep(Duration::from_millis(2));
    }
    let ready = began.elapsed();
    let body = r#"{"prompt": "12+30=", "max_tokens": 4, "temperature": 0, "stream": true}"#;
    let mut answer = BufReader::new(request(address, "POST", "/v1/completions", body)?);
    let mut line = String::new();
    while !line.starts_with("data: {") {
        line.clear();
        ensure!(answer.read_line(&mut line)? > 0, "the answer ends without a token");
    }
    Ok(Times { ready, first_token: began.elapsed() })
}

fn is_ready(address: SocketAddr) -> bool {
    let mut status = [0; 12];
    let asked = request(address, "GET", "/health", "");
    asked.is_ok_and(|mut answer| answer.read_exact(&mut status).is_ok()) && status.ends_with(b" 200")
}

fn request(address: SocketAddr, method: &str, path: &str, body: &str) -> Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: bcg\r\nContent-Length: {length}\r\n\r\n{body}")?;
    Ok(stream)
}
