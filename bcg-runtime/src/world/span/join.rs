//! How nodes come together: node 0 listens, the others connect and say how they were started, and all learn whether that
//! is the same everywhere.
//!
//! Nothing is encrypted and nobody is authenticated: the network must be trusted. Node 0 listens only at the address that it
//! is told, only until all nodes are there; what does not speak as a node is dropped, within [`HELLO_TIMEOUT`].

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use super::frame::{Kind, Reader, Writer, receive, send};
use super::{PROTOCOL, SpanOptions};
use crate::{Error, Result};

/// How long a client may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Clients that node 0 listens to at once while it waits for nodes; one more is turned away.
const HELLOS_MAX: usize = 32;
/// How often node 0 looks whether somebody connects.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a node waits before it tries again to connect.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// How long one try to connect takes at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The longest name or value of what must be the same that is sent.
const ROW_BYTES_MAX: usize = 4 << 10;
/// The most names with values.
const ROWS_MAX: usize = 16;

/// Names and values that must be the same on all nodes.
pub(super) type Rows = Vec<(String, String)>;

/// What a client said, and its connection.
type Heard = (SocketAddr, std::io::Result<(TcpStream, Vec<u8>)>);

/// Connects the nodes, and returns this one's connections by node: on node 0 to all others, elsewhere to node 0.
///
/// # Errors
/// [`Error::Nodes`] names who did not come, or what is not the same.
pub(super) fn join(options: &SpanOptions, rows: &Rows) -> Result<Vec<Option<TcpStream>>> {
    let mut connections: Vec<Option<TcpStream>> = (0..options.num_nodes).map(|_| None).collect();
    if options.node == 0 {
        gather(options, rows, &mut connections)?;
    } else {
        connections[0] = Some(come(options, rows)?);
    }
    Ok(connections)
}

fn addresses(options: &SpanOptions) -> Result<Vec<SocketAddr>> {
    let resolved = options.address.to_socket_addrs();
    let wrong = |problem: String| {
        Error::Nodes(format!("`{}` is no address of node 0 ({problem}); give HOST:PORT", options.address))
    };
    Ok(resolved.map_err(|error| wrong(error.to_string()))?.collect())
}

/// Takes the other nodes in, on node 0.
fn gather(options: &SpanOptions, rows: &Rows, connections: &mut [Option<TcpStream>]) -> Result<()> {
    let refuse = |error: std::io::Error| {
        let remedy = "it must be one of this machine, and free";
        Error::Nodes(format!("node 0 cannot listen at `{}` ({error}); {remedy}", options.address))
    };
    let listener = TcpListener::bind(addresses(options)?.as_slice()).map_err(refuse)?;
    listener.set_nonblocking(true).map_err(refuse)?;
    tracing::info!(address = options.address, nodes = options.num_nodes, "waiting for the other nodes");
    let deadline = Instant::now() + options.join_timeout;
    let (sender, heard) = sync_channel(HELLOS_MAX);
    let open = Arc::new(());
    while let Some(missing) = (1..options.num_nodes).find(|node| connections[*node].is_none()) {
        if Instant::now() > deadline {
            let waited = options.join_timeout;
            return Err(Error::Nodes(format!(
                "node {missing} did not come to `{}` within {waited:?}",
                options.address
            )));
        }
        match listener.accept() {
            Ok((stream, from)) if Arc::strong_count(&open) <= HELLOS_MAX => hear(stream, from, &sender, &open),
            Ok((_, from)) => tracing::warn!(%from, "turned away: too many clients that have not said who they are"),
            Err(error) if is_passing(&error) => {}
            Err(error) => return Err(refuse(error)),
        }
        if let Some((from, client)) = next(&heard)? {
            match client {
                Ok((stream, hello)) => take_in(options, rows, connections, (from, stream, &hello))?,
                Err(error) => tracing::warn!(%from, %error, "turned away: it does not speak as a node"),
            }
        }
    }
    for (node, stream) in connections.iter_mut().enumerate() {
        if let Some(stream) = stream {
            let gone = |error| Error::Nodes(format!("node {node} left while the others came ({error})"));
            send(stream, Kind::Welcome, &[]).map_err(gone)?;
        }
    }
    Ok(())
}

/// Tells whether an error of a listener concerns one client, or none.
fn is_passing(error: &std::io::Error) -> bool {
    use ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted, WouldBlock};
    matches!(error.kind(), WouldBlock | Interrupted | ConnectionAborted | ConnectionReset)
}

fn next(heard: &Receiver<Heard>) -> Result<Option<Heard>> {
    match heard.recv_timeout(LOOK_EVERY) {
        Ok(heard) => Ok(Some(heard)),
        Err(RecvTimeoutError::Timeout) => Ok(None),
        Err(RecvTimeoutError::Disconnected) => Err(Error::other("nobody listens to the other nodes")),
    }
}

/// Listens to a client on a thread of its own, which ends in time whatever the client does.
fn hear(stream: TcpStream, from: SocketAddr, sender: &SyncSender<Heard>, open: &Arc<()>) {
    let (sender, open) = (sender.clone(), Arc::clone(open));
    let listen = move || {
        let deadline = Instant::now() + HELLO_TIMEOUT;
        let hello = stream.set_nonblocking(false).and_then(|()| receive(&mut Until { stream: &stream, deadline }));
        let hello = hello.and_then(|(kind, body)| match kind {
            Kind::Hello => Ok((stream, body)),
            kind => Err(std::io::Error::new(ErrorKind::InvalidData, format!("it began with {kind:?}"))),
        });
        if let Err(TrySendError::Full(_)) = sender.try_send((from, hello)) {
            tracing::warn!(%from, "turned away: too many clients");
        }
        drop(open);
    };
    if let Err(error) = std::thread::Builder::new().name("node hello".into()).spawn(listen) {
        tracing::warn!(%from, %error, "turned away: no thread to listen to it");
    }
}

/// Reads from a connection until a deadline, however slowly bytes come.
struct Until<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::Error::new(ErrorKind::TimedOut, "it did not say who it is in time"));
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(bytes)
    }
}

/// Gives a node its place, or says to both sides why it has none.
fn take_in(
    options: &SpanOptions,
    rows: &Rows,
    connections: &mut [Option<TcpStream>],
    (from, mut stream, hello): (SocketAddr, TcpStream, &[u8]),
) -> Result<()> {
    let Some((node, theirs)) = read_hello(hello) else {
        tracing::warn!(%from, "turned away: its hello cannot be read");
        return Ok(());
    };
    let refuse = |stream: &mut TcpStream, why: &str| {
        if let Err(error) = send(stream, Kind::Refused, &[why.as_bytes()]) {
            tracing::warn!(%from, %error, "telling a node that it is refused");
        }
    };
    if let Some(why) = difference(node, rows, &theirs) {
        refuse(&mut stream, &why);
        return Err(Error::Nodes(why));
    }
    if !(1..options.num_nodes).contains(&node) {
        let why = format!("there is no node {node} to come: the nodes are 0 to {}", options.num_nodes - 1);
        refuse(&mut stream, &why);
        return Err(Error::Nodes(why));
    }
    if connections[node].as_ref().is_some_and(is_alive) {
        let why = format!("node {node} is there already; give each process a node rank of its own");
        refuse(&mut stream, &why);
        tracing::warn!(%from, "{why}");
        return Ok(());
    }
    tracing::info!(node, %from, "a node has come");
    connections[node] = Some(stream);
    Ok(())
}

/// Tells whether the other side of a connection, which has nothing to say now, is still there.
fn is_alive(stream: &TcpStream) -> bool {
    let looked = stream.set_nonblocking(true).and_then(|()| stream.peek(&mut [0]));
    let is_open = matches!(looked, Err(error) if error.kind() == ErrorKind::WouldBlock);
    is_open && stream.set_nonblocking(false).is_ok()
}

/// Says what the first thing is that differs between a node and node 0.
fn difference(node: usize, rows: &Rows, theirs: &Rows) -> Option<String> {
    let names = rows.iter().chain(theirs).map(|(name, _)| name);
    let value = |rows: &Rows, name: &str| {
        rows.iter().find(|(known, _)| known == name).map_or_else(|| "nothing".to_owned(), |(_, value)| value.clone())
    };
    names.map(|name| (name, value(rows, name), value(theirs, name))).find(|(_, own, their)| own != their).map(
        |(name, own, their)| format!("all nodes must have the same {name}: node 0 has {own}, node {node} has {their}"),
    )
}

/// A value that is short enough to be sent, and differs if the whole one does.
pub(super) fn in_short(value: &str) -> String {
    if value.len() <= ROW_BYTES_MAX {
        return value.to_owned();
    }
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    let begin = &value[..value.floor_char_boundary(ROW_BYTES_MAX / 2)];
    format!("{begin}… ({} bytes, {:016x})", value.len(), hasher.finish())
}

fn write_hello(node: usize, rows: &[(String, String)]) -> Vec<u8> {
    let head = Writer::default().text(PROTOCOL, ROW_BYTES_MAX).u32(node as u32).u32(rows.len() as u32);
    let all = rows.iter().fold(head, |hello, (name, value)| hello.text(name, ROW_BYTES_MAX).text(value, ROW_BYTES_MAX));
    all.0
}

fn read_hello(hello: &[u8]) -> Option<(usize, Rows)> {
    let mut reader = Reader(hello);
    let (protocol, node, num_rows) = (reader.text()?, reader.u32()?, reader.u32()?);
    let mut rows = vec![("version of the protocol".to_owned(), protocol)];
    for _ in 0..(num_rows as usize).min(ROWS_MAX) {
        rows.push((reader.text()?, reader.text()?));
    }
    Some((node as usize, rows))
}

/// Connects to node 0, as often as needed, and waits until all nodes are there.
fn come(options: &SpanOptions, rows: &Rows) -> Result<TcpStream> {
    let deadline = Instant::now() + options.join_timeout;
    let hello = write_hello(options.node, &rows[1..]);
    let mut last = String::new();
    while Instant::now() < deadline {
        match try_to_come(options, &hello, deadline)? {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error.to_string(),
        }
        std::thread::sleep(RETRY_AFTER);
    }
    let (address, waited) = (&options.address, options.join_timeout);
    Err(Error::Nodes(format!("node {} did not reach node 0 at `{address}` within {waited:?} ({last})", options.node)))
}

/// One try; the inner error is one that another try may not have.
fn try_to_come(options: &SpanOptions, hello: &[u8], deadline: Instant) -> Result<std::io::Result<TcpStream>> {
    let mut last = std::io::Error::other("the name has no address");
    for address in addresses(options)? {
        let mut stream = match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
            Ok(stream) => stream,
            Err(error) => {
                last = error;
                continue;
            }
        };
        let answer =
            send(&mut stream, Kind::Hello, &[hello]).and_then(|()| receive(&mut Until { stream: &stream, deadline }));
        return match answer {
            Ok((Kind::Welcome, _)) => Ok(Ok(stream)),
            Ok((Kind::Refused, why)) => Err(Error::Nodes(String::from_utf8_lossy(&why).into_owned())),
            Ok((kind, _)) => Err(Error::Nodes(format!("`{address}` answers with {kind:?}: it is no node 0"))),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                Err(Error::Nodes(format!("what listens at `{address}` is no node 0 ({error})")))
            }
            Err(error) => Ok(Err(error)),
        };
    }
    Ok(Err(last))
}
