//! Signals, and faults of the device that a process must notice: it ends, or its supervisor replaces it.

use std::time::{Duration, Instant};

use crate::Report;
use crate::client::{Reply, post};
use crate::process::{Server, signal};

/// The bounds of the server in these rows, in seconds.
const DEADLINE: &str = "3";
const WATCHDOG: &str = "2";
/// How long a process may take to end on its own: the deadline, what the hard end adds, and a loaded machine.
const END: Duration = Duration::from_secs(20);
/// A call of the device, in a step some time after the load.
const CALL: &str = "cuEventSynchronize:60";
/// Small, so that it loads at once.
const SMALL: [&str; 4] = ["--context-length", "512", "--kv-cache-tokens", "2048"];

const LONG: &str = r#"{"prompt": "Once", "max_tokens": 400, "ignore_eos": true}"#;
const SHORT: &str = r#"{"prompt": "1+1=", "max_tokens": 4}"#;

fn start(flags: &[&str], fault: &str) -> Server {
    let bounds = [["--shutdown-deadline", DEADLINE], ["--watchdog-timeout", WATCHDOG]];
    let bounds = bounds.iter().filter(|bound| !flags.contains(&bound[0])).flatten();
    let flags: Vec<&str> = SMALL.iter().chain(bounds).chain(flags).copied().collect();
    let faults = [("BCG_HOST_FAULT", fault)];
    Server::start(&flags, if fault.is_empty() { &[] } else { &faults })
}

/// Runs all rows.
pub(crate) fn run(report: &mut Report) {
    ends(report);
    faults(report);
    supervised(report);
    seen_from_outside(report);
}

fn ended(server: &mut Server, within: Duration, code: Option<i32>) -> Result<(), String> {
    match server.wait(within) {
        Some(status) if status.code() == code => Ok(()),
        Some(status) => Err(format!("ended with {status}: {}", server.log())),
        None => Err(format!("still there after {within:?}: {}", server.log())),
    }
}

fn ends(report: &mut Report) {
    report.row("signal", "TERM to an idle server", || {
        let mut server = start(&[], "");
        signal(server.pid(), "TERM");
        ended(&mut server, END, Some(0))
    });
    report.row("signal", "INT to an idle server", || {
        let mut server = start(&[], "");
        signal(server.pid(), "INT");
        ended(&mut server, END, Some(0))
    });
    report.row("signal", "TERM while an answer is written", || finishes(&[]));
    report.row("signal", "a worker that is stopped and goes on", || {
        let server = start(&["--supervise"], "");
        let worker = *server.children().first().ok_or("no worker")?;
        signal(worker, "STOP");
        std::thread::sleep(Duration::from_millis(200));
        signal(worker, "CONT");
        answers(&server, Duration::from_secs(5))
    });
}

/// An answer that is written when the server is told to end is complete, and then the server ends.
fn finishes(flags: &[&str]) -> Result<(), String> {
    let mut server = start(&[flags, &["--shutdown-deadline", "30"]].concat(), "");
    let address = server.address;
    let answer = std::thread::spawn(move || post(address, "/v1/completions", LONG));
    std::thread::sleep(Duration::from_millis(300));
    signal(server.pid(), "TERM");
    let reply = answer.join().expect("no panic")?;
    if reply.status != 200 {
        return Err(format!("the answer was cut: {} {}", reply.status, reply.body));
    }
    ended(&mut server, END, Some(0))
}

fn faults(report: &mut Report) {
    let hang = format!("hang:{CALL}");
    report.row("fault", "a device that hangs is noticed, told and left", || {
        let mut server = start(&[], &hang);
        let address = server.address;
        let _answer = std::thread::spawn(move || post(address, "/v1/completions", LONG));
        let reason = until_unhealthy(&server, Duration::from_secs(10))?;
        if !reason.body.contains("step") {
            return Err(format!("the reason does not name the step: {}", reason.body));
        }
        ended(&mut server, END, Some(1))?;
        if server.log().contains("the engine is stuck") {
            Ok(())
        } else {
            Err(format!("no stuck call: {}", server.log()))
        }
    });
    report.row("fault", "TERM while the device hangs", || {
        let mut server = start(&["--watchdog-timeout", "0"], &hang);
        let address = server.address;
        let _answer = std::thread::spawn(move || post(address, "/v1/completions", LONG));
        std::thread::sleep(Duration::from_secs(1));
        signal(server.pid(), "TERM");
        // In order at the deadline, or by force soon after.
        ended(&mut server, END, Some(0)).or_else(|_| ended(&mut server, END, Some(1)))
    });
    report.row("fault", "a slow device is none that hangs", || {
        let server = start(&[], "slow:cuEventSynchronize:60:150");
        for _ in 0..3 {
            answers(&server, Duration::from_secs(8))?;
        }
        let health = server.health()?;
        if health.status == 200 { Ok(()) } else { Err(health.body) }
    });
    report.row("fault", "a device that is lost for good ends the process", || {
        let mut server = start(&[], &format!("lost:{CALL}"));
        let reply = post(server.address, "/v1/completions", LONG)?;
        if reply.status != 500 && reply.status != 0 {
            return Err(format!("{} {}", reply.status, reply.body));
        }
        ended(&mut server, END, Some(1))
    });
    report.row("fault", "one failed call costs no answer of another request", || {
        let server = start(&[], "fail:cuLaunchKernel:2000");
        let replies: Vec<_> = (0..20).map(|_| post(server.address, "/v1/completions", SHORT)).collect();
        let good = replies.iter().filter(|reply| reply.as_ref().is_ok_and(|reply| reply.status == 200)).count();
        if good >= 19 { Ok(()) } else { Err(format!("{good} of 20 answers: {replies:?}")) }
    });
}

fn supervised(report: &mut Report) {
    report.row("supervisor", "a killed worker is replaced", || {
        let server = start(&["--supervise"], "");
        let worker = *server.children().first().ok_or("no worker")?;
        signal(worker, "KILL");
        let began = Instant::now();
        until_healthy(&server, Duration::from_secs(15))?;
        println!("supervisor: a killed worker was replaced within {:?}", began.elapsed());
        answers(&server, Duration::from_secs(5))
    });
    report.row("supervisor", "a worker whose device is lost is replaced", || {
        let file = fault_file("lost", &format!("lost:{CALL}"));
        let server = start(&["--supervise"], &file);
        let _ = post(server.address, "/v1/completions", LONG);
        until_unhealthy(&server, Duration::from_secs(10))?;
        until_healthy(&server, Duration::from_secs(15))?;
        answers(&server, Duration::from_secs(5))
    });
    report.row("supervisor", "a worker whose device hangs is replaced", || {
        let file = fault_file("hang", &format!("hang:{CALL}"));
        let server = start(&["--supervise"], &file);
        let address = server.address;
        let _answer = std::thread::spawn(move || post(address, "/v1/completions", LONG));
        until_unhealthy(&server, Duration::from_secs(10))?;
        until_healthy(&server, Duration::from_secs(30))?;
        answers(&server, Duration::from_secs(5))
    });
    report.row("supervisor", "it gives up after so many workers", || {
        let mut server = start(&["--supervise", "--max-restarts", "1"], "");
        for _ in 0..2 {
            until_healthy(&server, Duration::from_secs(15))?;
            signal(*server.children().first().ok_or("no worker")?, "KILL");
            std::thread::sleep(Duration::from_millis(100));
        }
        ended(&mut server, END, Some(1))?;
        if server.log().contains("--max-restarts") { Ok(()) } else { Err(server.log()) }
    });
}

/// What clients and operators see of a supervisor.
fn seen_from_outside(report: &mut Report) {
    report.row("supervisor", "a request in the meantime is told when to come back", || {
        let server = start(&["--supervise"], "");
        signal(*server.children().first().ok_or("no worker")?, "KILL");
        let began = Instant::now();
        while began.elapsed() < Duration::from_secs(10) {
            let reply = post(server.address, "/v1/completions", SHORT)?;
            match reply.status {
                503 if reply.head.to_ascii_lowercase().contains("retry-after: ") => return Ok(()),
                0 | 200 => {}
                _ => return Err(format!("{} {}", reply.head, reply.body)),
            }
        }
        Err("never a 503".into())
    });
    report.row("supervisor", "TERM drains through it", || finishes(&["--supervise"]));
    report.row("supervisor", "a worker does not outlive it, though it answers", || {
        let server = start(&["--supervise", "--shutdown-deadline", "60"], "");
        let worker = *server.children().first().ok_or("no worker")?;
        let address = server.address;
        let _answer = std::thread::spawn(move || post(address, "/v1/completions", LONG));
        std::thread::sleep(Duration::from_millis(100));
        signal(server.pid(), "KILL");
        gone(worker)
    });
    report.row("supervisor", "TERM twice ends it and its worker at once", || {
        let mut server = start(&["--supervise", "--shutdown-deadline", "60"], "");
        let worker = *server.children().first().ok_or("no worker")?;
        let address = server.address;
        let _answer = std::thread::spawn(move || post(address, "/v1/completions", LONG));
        std::thread::sleep(Duration::from_millis(100));
        signal(server.pid(), "TERM");
        std::thread::sleep(Duration::from_millis(100));
        signal(server.pid(), "TERM");
        ended(&mut server, Duration::from_secs(5), Some(130))?;
        gone(worker)
    });
    report.row("supervisor", "TERM while the model is loaded", || {
        let hang = [("BCG_HOST_FAULT", "hang:any:20")];
        let mut server = Server::spawn(Server::TINY, &["--supervise", "--shutdown-deadline", "60"], &hang);
        while server.children().is_empty() {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(500));
        signal(server.pid(), "TERM");
        ended(&mut server, Duration::from_secs(5), Some(0))
    });
    report.row("supervisor", "a model that cannot load ends it at once", || {
        let mut server = Server::spawn("/nowhere", &["--supervise"], &[]);
        ended(&mut server, END, Some(1))
    });
}

/// Waits until a worker is gone; far less than its deadline.
fn gone(worker: u32) -> Result<(), String> {
    let began = Instant::now();
    while std::path::Path::new(&format!("/proc/{worker}")).exists() {
        if began.elapsed() > Duration::from_secs(5) {
            signal(worker, "KILL");
            return Err("the worker lives on".into());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A fault that only the first worker has: the file is gone after it was read.
fn fault_file(name: &str, fault: &str) -> String {
    let file = std::env::temp_dir().join(format!("bcg-hostile-fault-{}-{name}", std::process::id()));
    std::fs::write(&file, fault).expect("a file");
    format!("@{}", file.display())
}

fn until_healthy(server: &Server, patience: Duration) -> Result<(), String> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if server.health().is_ok_and(|reply| reply.status == 200) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(format!("not healthy after {patience:?}: {}", server.log()))
}

fn until_unhealthy(server: &Server, patience: Duration) -> Result<Reply, String> {
    let deadline = Instant::now() + patience;
    while Instant::now() < deadline {
        if let Ok(reply) = server.health()
            && reply.status == 503
        {
            return Ok(reply);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Err(format!("healthy for {patience:?}: {}", server.log()))
}

fn answers(server: &Server, within: Duration) -> Result<(), String> {
    let reply = post(server.address, "/v1/completions", SHORT)?;
    match reply {
        Reply { status: 200, took, .. } if took <= within => Ok(()),
        reply => Err(format!("{reply:?}")),
    }
}
