//! A model whose ranks live in two processes: one that serves, and one that follows it.

use std::io::Write;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::Report;
use crate::client::{Reply, post};
use crate::process::{Server, free_address, signal};

/// Small, so that it loads at once, with two ranks.
const SMALL: [&str; 8] = ["--tp", "2", "--context-length", "512", "--kv-cache-tokens", "2048", "--shutdown-grace", "0"];
const LAZY: [&str; 3] = ["--enable-breakable-cuda-graph", "--capture", "lazy"];
const GRAPHS: [&str; 3] = ["--enable-breakable-cuda-graph", "--cuda-graph-sizes", "8,32"];
/// How soon the loss of a node is told to whom it concerns.
const TOLD: Duration = Duration::from_secs(2);
/// How long a process may take to end on its own, or to load once more, on a loaded machine.
const END: Duration = Duration::from_secs(20);

const LONG: &str = r#"{"prompt": "Once", "max_tokens": 400, "ignore_eos": true}"#;
const PROMPTS: [&str; 2] = [
    r#"{"prompt": "1+1=", "max_tokens": 24, "ignore_eos": true, "temperature": 0}"#,
    r#"{"prompt": "Once upon a time", "max_tokens": 24, "ignore_eos": true, "temperature": 1, "seed": 3}"#,
];

/// Runs all rows.
pub(crate) fn run(report: &mut Report) {
    report.row("nodes", "answers are those of one process", same_answers);
    report.row("nodes", "a follower that is killed under load, and its successor", killed_follower);
    report.row("nodes", "a leader that is killed", killed_leader);
    report.row("nodes", "strangers at the port, then another model and another number of nodes", refused);
}

/// Starts a process of a world of `nodes`, which is not ready before the others come.
fn node(rank: &str, nodes: &str, at: &str, flags: &[&str]) -> Server {
    let own = ["--nnodes", nodes, "--node-rank", rank, "--dist-init-addr", at];
    Server::spawn(Server::TINY, &[&SMALL[..], &own, flags].concat(), &[])
}

/// Two nodes that serve.
fn two(flags: &[&str]) -> Result<(Server, Server, String), String> {
    let at = free_address().to_string();
    let mut leader = node("0", "2", &at, flags);
    let follower = node("1", "2", &at, flags);
    match leader.until_ready_or_ended() {
        true => Ok((leader, follower, at)),
        false => Err(format!("it does not serve: {} {}", leader.log(), follower.log())),
    }
}

fn answer(server: &Server, prompt: &str) -> Result<String, String> {
    let reply = post(server.address, "/v1/completions", prompt)?;
    let text = reply.body.split("\"text\":").nth(1).and_then(|rest| rest.split("\"logprobs\"").next());
    match (reply.status, text) {
        (200, Some(text)) => Ok(text.to_owned()),
        _ => Err(format!("{} {}", reply.status, reply.body)),
    }
}

fn answers(server: &Server) -> Result<Vec<String>, String> {
    PROMPTS.iter().map(|prompt| answer(server, prompt)).collect()
}

fn ended(server: &mut Server, ok: bool, why: &str) -> Result<(), String> {
    match server.wait(END) {
        Some(status) if status.success() == ok && server.log().contains(why) => Ok(()),
        Some(status) => Err(format!("ended with {status}, expected {why}: {}", server.log())),
        None => Err(format!("still there after {END:?}: {}", server.log())),
    }
}

fn same_answers() -> Result<(), String> {
    let alone = answers(&Server::start(&SMALL, &[]))?;
    for flags in [&LAZY, &GRAPHS] {
        let (mut leader, mut follower, _) = two(flags)?;
        let together = answers(&leader)?;
        if together != alone {
            return Err(format!("{together:?}, not {alone:?}"));
        }
        signal(leader.pid(), "TERM");
        ended(&mut leader, true, "stopped")?;
        ended(&mut follower, true, "node 0 has stopped")?;
    }
    Ok(())
}

fn killed_follower() -> Result<(), String> {
    let (leader, follower, at) = two(&GRAPHS)?;
    let before = answers(&leader)?;
    let address = leader.address;
    let running: Vec<_> = (0..3).map(|_| std::thread::spawn(move || post(address, "/v1/completions", LONG))).collect();
    std::thread::sleep(Duration::from_millis(400));
    signal(follower.pid(), "KILL");
    let began = Instant::now();
    let replies: Vec<Reply> = running.into_iter().map(|one| one.join().expect("no panic")).collect::<Result<_, _>>()?;
    let took = began.elapsed();
    for reply in &replies {
        if reply.status != 500 || !reply.body.contains("rank 1 is lost: node 1: its process has ended") {
            return Err(format!("{} {}", reply.status, reply.body));
        }
    }
    while leader.health()?.status == 200 {
        if began.elapsed() > TOLD {
            return Err(format!("healthy {TOLD:?} after the loss: {}", leader.log()));
        }
    }
    if took > TOLD {
        return Err(format!("told after {took:?}: {}", leader.log()));
    }
    // The leader loads the model anew, and waits for a process in the place of the one that is lost.
    let successor = node("1", "2", &at, &GRAPHS);
    let deadline = Instant::now() + END;
    while leader.health()?.status != 200 {
        if Instant::now() > deadline {
            return Err(format!("it does not serve again: {}", leader.log()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let after = answers(&leader)?;
    if after != before {
        return Err(format!("{after:?}, not {before:?}"));
    }
    // Lost while nothing runs, and so soon again that the leader ends.
    signal(successor.pid(), "KILL");
    let began = Instant::now();
    while matches!(leader.health(), Ok(reply) if reply.status == 200) {
        if began.elapsed() > TOLD {
            return Err(format!("healthy {TOLD:?} after the loss of an idle node: {}", leader.log()));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn killed_leader() -> Result<(), String> {
    let (leader, mut follower, _) = two(&[])?;
    signal(leader.pid(), "KILL");
    let began = Instant::now();
    ended(&mut follower, false, "node 1 ends: rank 0 is lost: node 0: its process has ended")?;
    if began.elapsed() < TOLD { Ok(()) } else { Err(format!("it ended after {:?}", began.elapsed())) }
}

fn refused() -> Result<(), String> {
    for (nodes, flags, why) in [
        ("4", &["--tp", "4"][..], "all nodes must have the same number of nodes: node 0 has 2, node 1 has 4"),
        ("2", &["--max-running-requests", "3"], "all nodes must have the same options"),
    ] {
        let at = free_address().to_string();
        let mut leader = node("0", "2", &at, &[]);
        let deadline = Instant::now() + END;
        let connect = || loop {
            match TcpStream::connect(&at) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > deadline => return Err(error.to_string()),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let (_mute, mut web) = (connect()?, connect()?);
        web.write_all(b"GET /health HTTP/1.1\r\n\r\n").map_err(|error| error.to_string())?;
        let flags: Vec<&str> = flags.to_vec();
        let own = ["--nnodes", nodes, "--node-rank", "1", "--dist-init-addr", &at];
        let small = &SMALL[if flags[0] == "--tp" { 2 } else { 0 }..];
        let mut follower = Server::spawn(Server::TINY, &[small, &own, &flags].concat(), &[]);
        ended(&mut leader, false, why)?;
        ended(&mut follower, false, why)?;
        if !leader.log().contains("it does not speak as a node") {
            return Err(format!("the stranger is not in the log: {}", leader.log()));
        }
    }
    Ok(())
}
