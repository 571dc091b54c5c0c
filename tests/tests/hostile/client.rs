//! A client that sends bytes as they are, so that it can send what no HTTP library would.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A client that waits longer gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of a body that are read at most.
const BODY_BYTES_MAX: u64 = 64 << 20;

/// What came back.
#[derive(Debug)]
pub(crate) struct Reply {
    /// 0 if the connection was closed without an answer.
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
    pub(crate) took: Duration,
}

/// Sends these bytes on a connection of their own and reads one answer.
pub(crate) fn exchange(address: SocketAddr, bytes: &[u8]) -> Result<Reply, String> {
    let began = Instant::now();
    let mut stream = TcpStream::connect(address).map_err(|error| format!("connect: {error}"))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
    stream.set_write_timeout(Some(PATIENCE)).map_err(|error| error.to_string())?;
    // A server that has heard enough may close while this end still writes; its answer then waits here.
    let _ = stream.write_all(bytes);
    let mut reply = read_reply(&mut BufReader::new(stream))?;
    reply.took = began.elapsed();
    Ok(reply)
}

/// Reads one answer.
pub(crate) fn read_reply(reader: &mut impl BufRead) -> Result<Reply, String> {
    let mut head = String::new();
    loop {
        let from = head.len();
        match reader.read_line(&mut head) {
            Ok(0) => break,
            Ok(_) if head[from..].trim().is_empty() => break,
            Ok(_) => {}
            Err(error) if head.is_empty() && is_closed(&error) => break,
            Err(error) => return Err(format!("no answer: {error}")),
        }
    }
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or(0);
    let length = header(&head, "content-length").and_then(|length| length.parse().ok());
    let mut body = Vec::new();
    // Chunks are not taken apart: what they hold can be searched as it is.
    let read = match length {
        Some(length) => reader.take(length).read_to_end(&mut body),
        None if status == 0 => Ok(0),
        None => read_chunks(reader, &mut body),
    };
    read.map_err(|error| format!("no whole answer: {error}"))?;
    Ok(Reply { status, head, body: String::from_utf8_lossy(&body).into_owned(), took: Duration::ZERO })
}

fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> std::io::Result<usize> {
    let mut reader = reader.take(BODY_BYTES_MAX);
    loop {
        let from = body.len();
        if reader.read_until(b'\n', body)? == 0 || &body[from..] == b"0\r\n" {
            return Ok(body.len());
        }
    }
}

fn is_closed(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset)
}

/// The value of a header, by its name in small letters.
pub(crate) fn header(head: &str, name: &str) -> Option<String> {
    let mut lines = head.lines().filter_map(|line| line.split_once(':'));
    let value = lines.find(|(known, _)| known.eq_ignore_ascii_case(name))?.1;
    Some(value.trim().to_owned())
}

/// A whole request with a body and its length.
pub(crate) fn request(method: &str, path: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: bcg\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

pub(crate) fn get(address: SocketAddr, path: &str) -> Result<Reply, String> {
    exchange(address, &request("GET", path, "Connection: close\r\n", b""))
}

pub(crate) fn post(address: SocketAddr, path: &str, body: &str) -> Result<Reply, String> {
    exchange(address, &request("POST", path, "Connection: close\r\n", body.as_bytes()))
}
