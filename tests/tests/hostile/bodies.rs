//! Eight of the largest bodies at once.

use std::time::{Duration, Instant};

use crate::Report;
use crate::client::{exchange, get};
use crate::process::Server;
use crate::requests::rows;

/// How many come at once.
const AT_ONCE: usize = 8;
/// Bytes of memory for each byte of the bodies.
const BYTES_PER_BYTE: usize = 8;
/// How long `/health` may take: 100 ms on a machine that does nothing else, and this where it runs all tests.
const HEALTH_TIME: Duration = Duration::from_millis(500);

/// Sends the largest bodies of the table, eight of each kind at once.
pub(crate) fn run(report: &mut Report) {
    let mut server = None;
    for row in rows().into_iter().filter(|row| row.bytes.len() > (7 << 20)) {
        report.row("eight at once", row.name, || {
            let server = server.get_or_insert_with(|| Server::start(&["--context-length", "512"], &[]));
            check(server, &row.bytes, row.expect)
        });
    }
}

fn check(server: &Server, bytes: &[u8], expect: &[u16]) -> Result<(), String> {
    let before = server.resident_bytes();
    server.forget_peak();
    let address = server.address;
    let (replies, slowest) = std::thread::scope(|scope| {
        let senders: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(|| exchange(address, bytes))).collect();
        let mut slowest = Duration::ZERO;
        while senders.iter().any(|sender| !sender.is_finished()) {
            let began = Instant::now();
            let _ = get(address, "/health");
            slowest = slowest.max(began.elapsed());
            std::thread::sleep(Duration::from_millis(5));
        }
        (senders.into_iter().map(|sender| sender.join().expect("no panic")).collect::<Vec<_>>(), slowest)
    });
    for reply in replies {
        let reply = reply?;
        if reply.status != 429 && !expect.contains(&reply.status) {
            return Err(format!("got {} {}", reply.status, reply.body.chars().take(300).collect::<String>()));
        }
    }
    let grown = server.peak_bytes().saturating_sub(before);
    let most = AT_ONCE * bytes.len() * BYTES_PER_BYTE;
    if grown > most || slowest > HEALTH_TIME {
        return Err(format!(
            "took {} MiB of memory, at most {} are right; /health took {slowest:?}",
            grown >> 20,
            most >> 20
        ));
    }
    Ok(())
}
