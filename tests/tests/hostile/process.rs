//! A server in a process of its own, and what can be seen of it from outside.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::client::{Reply, get};

/// The first argument of this executable when it is the server.
pub(crate) const SERVE: &str = "serve";

/// How long a server may take until it serves; a loaded machine with an unoptimised build needs some of it.
const START: Duration = Duration::from_secs(60);

/// How long the last lines of a process that has ended may take.
const LAST_LINES: Duration = Duration::from_secs(2);

/// A `bcg-server`, which is this executable once more.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<String>>,
    /// Reads what the process and those that it started write.
    reader: JoinHandle<()>,
}

impl Server {
    /// The folder of the tiny Qwen3.
    pub(crate) const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny-qwen3");

    /// Starts the tiny Qwen3 with these flags, and waits until it serves.
    pub(crate) fn start(flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let server = Self::spawn(Self::TINY, flags, environment);
        server.wait_ready();
        server
    }

    /// Starts a server for the checkpoint in `model`, whatever becomes of it.
    pub(crate) fn spawn(model: &str, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let command = Command::new(std::env::current_exe().expect("this executable has a path"));
        Self::spawn_by(command, model, flags, environment)
    }

    /// The same with a bound on its address space, in KiB.
    pub(crate) fn spawn_within(kib: usize, model: &str, flags: &[&str]) -> Self {
        let mut command = Command::new("bash");
        command.args(["-c", "ulimit -v \"$1\" && shift && exec \"$@\"", "bash", &kib.to_string()]);
        command.arg(std::env::current_exe().expect("this executable has a path"));
        Self::spawn_by(command, model, flags, &[])
    }

    fn spawn_by(mut command: Command, model: &str, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let address = free_address();
        command.arg(SERVE).args(["--model", model, "--device", "host", "--port", &address.port().to_string()]);
        command.args(flags).envs(environment.iter().copied()).env("RUST_LOG", "info");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("a process starts");
        let log = Arc::new(Mutex::new(String::new()));
        let (sink, lines) = (log.clone(), BufReader::new(child.stderr.take().expect("it is piped")));
        let reader = std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let mut log = sink.lock().expect("no panic");
                log.push_str(&line);
                log.push('\n');
            }
        });
        Self { child, address, log, reader }
    }

    fn wait_ready(&self) {
        let deadline = Instant::now() + START;
        while Instant::now() < deadline {
            if get(self.address, "/health").is_ok_and(|reply| reply.status == 200) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("the server is not ready: {}", self.log());
    }

    /// Waits until it serves, or has ended: then `false`.
    pub(crate) fn until_ready_or_ended(&mut self) -> bool {
        let deadline = Instant::now() + START;
        while Instant::now() < deadline && self.child.try_wait().expect("it is a child").is_none() {
            if get(self.address, "/health").is_ok_and(|reply| reply.status == 200) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Everything that it wrote to standard error so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().expect("no panic").clone()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Processes that it started.
    pub(crate) fn children(&self) -> Vec<u32> {
        let file = format!("/proc/{0}/task/{0}/children", self.pid());
        let text = fs::read_to_string(file).unwrap_or_default();
        text.split_whitespace().map(|pid| pid.parse().expect("a process id")).collect()
    }

    pub(crate) fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).expect("the server listens")
    }

    pub(crate) fn health(&self) -> Result<Reply, String> {
        get(self.address, "/health")
    }

    /// Bytes of memory that it holds now.
    pub(crate) fn resident_bytes(&self) -> usize {
        status_bytes(self.pid(), "VmRSS")
    }

    /// The most bytes that it held since [`Server::forget_peak`].
    pub(crate) fn peak_bytes(&self) -> usize {
        status_bytes(self.pid(), "VmHWM")
    }

    pub(crate) fn forget_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.pid()), "5").expect("the peak can be reset");
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self, patience: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                self.read_to_the_end();
                return Some(status);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        None
    }

    /// Waits for the last lines of the log; a worker that lives on holds it open.
    fn read_to_the_end(&self) {
        let deadline = Instant::now() + LAST_LINES;
        while !self.reader.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal by its name, such as `TERM`.
pub(crate) fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status().expect("kill runs");
    assert!(status.success(), "signal {name} to {pid}");
}

fn status_bytes(pid: u32, field: &str) -> usize {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the server lives");
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).expect("a known field");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

pub(crate) fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}
