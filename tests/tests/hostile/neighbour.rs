//! Another user of the same server, who must notice nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::client::{get, post};

/// How long the neighbour waits between two calls.
const PAUSE: Duration = Duration::from_millis(20);

/// What the neighbour saw.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) calls: usize,
    /// The longest time until an answer of 4 tokens was complete.
    pub(crate) slowest_answer: Duration,
    /// The longest time until `/health` answered.
    pub(crate) slowest_health: Duration,
}

/// Asks short questions until it is told to stop, on threads of its own.
pub(crate) struct Neighbour {
    stop: Arc<AtomicBool>,
    threads: [JoinHandle<Result<Seen, String>>; 2],
}

impl Neighbour {
    pub(crate) fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let ask = || post(address, "/v1/completions", r#"{"prompt": "1+1=", "max_tokens": 4}"#);
                let (calls, slowest_answer) = repeat(&stop, ask)?;
                Ok(Seen { calls, slowest_answer, ..Seen::default() })
            })
        };
        let probes = {
            let stop = stop.clone();
            std::thread::spawn(move || {
                let (calls, slowest_health) = repeat(&stop, || get(address, "/health"))?;
                Ok(Seen { calls, slowest_health, ..Seen::default() })
            })
        };
        Self { stop, threads: [answers, probes] }
    }

    /// Stops, and returns what it saw since it started.
    ///
    /// # Errors
    /// What one of its calls got instead of an answer.
    pub(crate) fn stop(self) -> Result<Seen, String> {
        self.stop.store(true, Ordering::Relaxed);
        let [answers, probes] = self.threads.map(|thread| thread.join().expect("no panic"));
        let (answers, probes) = (answers?, probes?);
        Ok(Seen { calls: answers.calls + probes.calls, slowest_health: probes.slowest_health, ..answers })
    }
}

fn repeat(
    stop: &AtomicBool,
    call: impl Fn() -> Result<crate::client::Reply, String>,
) -> Result<(usize, Duration), String> {
    let (mut calls, mut slowest) = (0, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) || calls == 0 {
        let began = Instant::now();
        let reply = call()?;
        if reply.status != 200 {
            return Err(format!("the neighbour got {} {}", reply.status, reply.body));
        }
        slowest = slowest.max(began.elapsed());
        calls += 1;
        std::thread::sleep(PAUSE);
    }
    Ok((calls, slowest))
}
