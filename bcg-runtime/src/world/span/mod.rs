//! Worlds of several processes: the connections between their nodes.
//!
//! A *node* is a process with some of the ranks. Node 0 is connected to all others, which speak through it.
//! - [`join`]: how nodes come together; [`frame`]: what they send each other; [`exchange`]: where they meet.
//! - A thread for each connection reads what comes. Another one says every [`BEAT`] that this node lives, and tells the others
//!   and its own ranks when a rank is lost.
//!
//! Invariants: no wait is longer than the world's timeout, but that of a node for its next command, which ends when node 0
//! does; a node that leaves, says nothing or says what it must not is a lost rank: the first one of that node.

mod exchange;
mod frame;
mod join;

use std::collections::VecDeque;
use std::fmt;
use std::io::{BufReader, ErrorKind};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use super::Shared;
use crate::device::host::collectives::{Called, Collectives, Elsewhere};
use crate::device::ranks::{Lost, LostRank};
use crate::{Dims, Error, Result};
use exchange::{Exchange, Said};
use frame::{Kind, Reader, Writer};

/// What both sides of a connection must speak.
const PROTOCOL: &str = "bcg nodes 1";
/// How often a node says that it lives, and at least four times within the world's timeout.
const BEAT: Duration = Duration::from_secs(1);
/// Commands that a node has not begun, at most: node 0 waits for the results of its steps.
const COMMANDS_MAX: usize = 64;
/// How long a node may still work on what node 0 wanted done before that one left.
const LAST_STEP: Duration = Duration::from_secs(5);
/// Why a node is lost whose connection is closed.
const GONE: &str = "its process has ended";
/// Bytes of a text that is sent, at most.
const TEXT_BYTES_MAX: usize = 4 << 10;

/// How a process finds the others of its world.
///
/// The network between nodes must be trusted: nothing is encrypted, and whoever reaches the address while nodes come
/// together may be one of them.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SpanOptions {
    /// The number of nodes, at least 2.
    pub num_nodes: usize,
    /// This node, below that. Node 0 has the first ranks, node 1 those after them.
    pub node: usize,
    /// Where node 0 listens until all nodes are there: `HOST:PORT`.
    pub address: String,
    /// Names and values that must be the same on all nodes, such as the options that a model is loaded with.
    pub same: Vec<(String, String)>,
    /// How long nodes wait until all are there.
    pub join_timeout: Duration,
}

impl SpanOptions {
    /// Makes the options of a node, which waits 5 minutes for the others.
    pub fn new(num_nodes: usize, node: usize, address: impl Into<String>) -> Self {
        let join_timeout = Duration::from_secs(300);
        Self { num_nodes, node, address: address.into(), same: Vec::new(), join_timeout }
    }
}

/// The connections of one node.
pub(crate) struct Span {
    node: usize,
    num_nodes: usize,
    /// The ranks of each node.
    num_local: usize,
    timeout: Duration,
    lost: Arc<Lost>,
    /// By node: on node 0 to all others, elsewhere to node 0.
    links: Vec<Option<Mutex<TcpStream>>>,
    exchange: Exchange,
    commands: Mutex<Commands>,
    commanded: Condvar,
    /// Where what other nodes' ranks give goes, in the order in which all nodes make them.
    collectives: Mutex<Vec<Weak<Collectives>>>,
    /// This node leaves.
    is_over: AtomicBool,
    beat: OnceLock<Thread>,
}

#[derive(Default)]
struct Commands {
    waiting: VecDeque<Vec<u8>>,
    /// Node 0 has left in order.
    is_over: bool,
    /// This node knows it, and waits for nothing more.
    is_done: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_gone(error: &std::io::Error) -> bool {
    use ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

impl Span {
    /// Comes together with the other nodes. `rows` must be the same on all of them too.
    pub(super) fn join(
        options: &SpanOptions,
        num_local: usize,
        timeout: Duration,
        lost: &Arc<Lost>,
        rows: &[(&str, String)],
    ) -> Result<Arc<Self>> {
        let own =
            [("version of the protocol", PROTOCOL.to_owned()), ("number of nodes", options.num_nodes.to_string())];
        let own = own.iter().chain(rows).map(|(name, value)| ((*name).to_owned(), value.clone()));
        let same = options.same.iter().map(|(name, value)| (name.clone(), join::in_short(value)));
        let connections = join::join(options, &own.chain(same).collect())?;
        for stream in connections.iter().flatten() {
            let prepared = stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(timeout)));
            prepared.and_then(|()| stream.set_write_timeout(Some(timeout))).map_err(Error::other)?;
        }
        Ok(Arc::new(Self {
            node: options.node,
            num_nodes: options.num_nodes,
            num_local,
            timeout,
            lost: Arc::clone(lost),
            links: connections.into_iter().map(|stream| stream.map(Mutex::new)).collect(),
            exchange: Exchange::new(options.num_nodes),
            commands: Mutex::default(),
            commanded: Condvar::new(),
            collectives: Mutex::default(),
            is_over: AtomicBool::new(false),
            beat: OnceLock::new(),
        }))
    }

    /// Starts the threads.
    pub(super) fn start(self: &Arc<Self>, world: Weak<Shared>) -> Result<()> {
        for (node, link) in self.links.iter().enumerate() {
            let Some(link) = link else { continue };
            let (span, stream) = (Arc::clone(self), lock(link).try_clone().map_err(Error::other)?);
            let read = move || span.read(node, stream);
            std::thread::Builder::new().name(format!("node {node}")).spawn(read).map_err(Error::other)?;
        }
        let span = Arc::clone(self);
        let beat = std::thread::Builder::new().name("node beat".into()).spawn(move || span.beat(&world));
        self.beat.get_or_init(|| beat.as_ref().map_or_else(|_| std::thread::current(), |beat| beat.thread().clone()));
        beat.map(drop).map_err(Error::other)
    }

    /// The first rank of this node.
    pub(super) fn first_rank(&self) -> usize {
        self.node * self.num_local
    }

    /// This node, and their number.
    pub(super) fn node(&self) -> (usize, usize) {
        (self.node, self.num_nodes)
    }

    /// Makes the threads see that a rank is lost, or that this node leaves.
    pub(super) fn wake(&self) {
        if let Some(beat) = self.beat.get() {
            beat.unpark();
        }
    }

    /// Tells the others that this node leaves, or which rank is lost, and ends the threads.
    pub(super) fn leave(&self) {
        self.is_over.store(true, Ordering::Release);
        match self.lost.rank() {
            Some(lost) => self.tell_all(Kind::Lost, &[&write_lost(lost)], None),
            None => self.tell_all(Kind::Bye, &[], None),
        }
        for link in self.links.iter().flatten() {
            // What was sent still arrives; the readers end when the other side has closed too.
            let _ = lock(link).shutdown(Shutdown::Write);
        }
        self.wake();
    }

    /// Adds the meeting place of a communicator, and returns its number.
    pub(super) fn add(&self, collectives: &Arc<Collectives>) {
        lock(&self.collectives).push(Arc::downgrade(collectives));
    }

    /// The number that the next communicator gets.
    pub(super) fn num_communicators(&self) -> usize {
        lock(&self.collectives).len()
    }

    /// Sends to all nodes but `except`; one that cannot be reached is lost.
    fn tell_all(&self, kind: Kind, parts: &[&[u8]], except: Option<usize>) {
        for (node, link) in self.links.iter().enumerate().filter(|(node, _)| Some(*node) != except) {
            if let Some(link) = link
                && let Err(error) = frame::send(&mut *lock(link), kind, parts)
            {
                let cause = if is_gone(&error) { GONE.to_owned() } else { format!("it cannot be reached ({error})") };
                self.lose(node, &cause);
            }
        }
    }

    /// Loses a node, by its first rank.
    fn lose(&self, node: usize, cause: &str) -> Error {
        let cause = format!("node {node}: {cause}");
        self.lost.set(LostRank { rank: node * self.num_local, collective: String::new(), segment: None, cause })
    }

    /// Says a few bytes to all nodes and returns what all said, in the order of the nodes. All come for the same `purpose`.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub(super) fn exchange(&self, purpose: &str, bytes: Vec<u8>, timeout: Duration) -> Result<Vec<Vec<u8>>> {
        self.lost.check()?;
        let said = Said { purpose: purpose.to_owned(), bytes };
        if self.node == 0 {
            self.say(0, said);
        } else {
            let head = Writer::default().text(purpose, TEXT_BYTES_MAX).bytes(&said.bytes);
            self.tell_all(Kind::Meet, &[&head.0], None);
        }
        self.exchange.wait(timeout, || self.lost.error().is_some()).map_err(|missing| {
            let cause = || format!("it did not come to `{purpose}` within {timeout:?}");
            let late = missing.map(|node| self.lose(node, &cause()));
            late.or_else(|| self.lost.error()).unwrap_or_else(|| Error::other("a meeting of the nodes has no end"))
        })
    }

    /// Notes what a node says, on node 0, and tells all if it is the last one.
    fn say(&self, node: usize, said: Said) {
        match self.exchange.say(node, said) {
            Ok(None) => {}
            Ok(Some(all)) => {
                let body = all.iter().fold(Writer::default(), |body, bytes| body.bytes(bytes));
                self.tell_all(Kind::Met, &[&body.0], None);
            }
            Err((node, cause)) => {
                self.lose(node, &cause);
            }
        }
    }

    /// Tells all other nodes what to do, on node 0.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub(super) fn command(&self, command: &[u8]) -> Result<()> {
        self.lost.check()?;
        self.tell_all(Kind::Command, &[command], None);
        self.lost.check()
    }

    /// Waits for what node 0 wants done; nothing once it has left in order.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub(super) fn next_command(&self) -> Result<Option<Vec<u8>>> {
        let mut commands = lock(&self.commands);
        loop {
            if let Some(command) = commands.waiting.pop_front() {
                return self.lost.check().map(|()| Some(command));
            }
            if commands.is_over {
                commands.is_done = true;
                self.commanded.notify_all();
                return Ok(None);
            }
            self.lost.check()?;
            commands = self.commanded.wait(commands).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Says that this node lives, until it leaves, and once which rank is lost.
    fn beat(&self, world: &Weak<Shared>) {
        let every = BEAT.min(self.timeout / 4);
        let mut has_told = false;
        while !self.is_over.load(Ordering::Acquire) {
            match self.lost.rank() {
                Some(lost) if !has_told => {
                    has_told = true;
                    self.exchange.wake();
                    drop(lock(&self.commands));
                    self.commanded.notify_all();
                    if let Some(world) = world.upgrade() {
                        world.spread_loss();
                    }
                    self.tell_all(Kind::Lost, &[&write_lost(lost)], None);
                }
                Some(_) => {}
                None => {
                    self.tell_all(Kind::Alive, &[], None);
                    if let Some(Err(error)) = world.upgrade().map(|world| world.check_transports()) {
                        self.lose(self.node, &error.to_string());
                    }
                }
            }
            if has_told || self.lost.rank().is_none() {
                std::thread::park_timeout(every);
            }
        }
    }

    /// Takes what a node sends, until it leaves or is lost.
    fn read(&self, node: usize, stream: TcpStream) {
        let mut stream = BufReader::new(stream);
        loop {
            let cause = match frame::receive(&mut stream) {
                Ok((kind, body)) => match self.take(node, kind, &body) {
                    Some(()) => continue,
                    None => format!("it sent {kind:?} of {} bytes, which cannot be read", body.len()),
                },
                Err(error) if is_gone(&error) => GONE.to_owned(),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    format!("it said nothing for {:?}", self.timeout)
                }
                Err(error) => format!("its connection broke ({error})"),
            };
            if !self.is_over.load(Ordering::Acquire) && !self.ends_in_order() {
                self.lose(node, &cause);
            }
            return;
        }
    }

    /// Tells whether node 0 has left in order, once this node has done what that one wanted done. All that it needs for it
    /// has come.
    fn ends_in_order(&self) -> bool {
        let commands = lock(&self.commands);
        let is_busy = |commands: &mut Commands| commands.is_over && !commands.is_done;
        let waited = self.commanded.wait_timeout_while(commands, self.timeout.min(LAST_STEP), is_busy);
        waited.unwrap_or_else(PoisonError::into_inner).0.is_done
    }

    /// Takes one frame; `None` if a node sends no such thing.
    fn take(&self, node: usize, kind: Kind, body: &[u8]) -> Option<()> {
        let mut reader = Reader(body);
        match kind {
            Kind::Alive => {}
            Kind::Give => {
                self.take_given(node, body)?;
                if self.node == 0 {
                    self.tell_all(Kind::Give, &[body], Some(node));
                }
            }
            Kind::Meet if self.node == 0 => {
                let said = Said { purpose: reader.text()?, bytes: reader.bytes()?.to_vec() };
                self.say(node, said);
            }
            Kind::Met if node == 0 => {
                let all = (0..self.num_nodes).map(|_| reader.bytes().map(<[u8]>::to_vec));
                self.exchange.end(all.collect::<Option<_>>()?);
            }
            Kind::Command if node == 0 => {
                let mut commands = lock(&self.commands);
                if commands.waiting.len() == COMMANDS_MAX {
                    return None;
                }
                commands.waiting.push_back(body.to_vec());
                self.commanded.notify_all();
            }
            Kind::Lost => {
                let lost = read_lost(body).filter(|lost| lost.rank < self.num_nodes * self.num_local)?;
                self.lost.set(lost);
            }
            Kind::Bye if node == 0 => {
                lock(&self.commands).is_over = true;
                self.commanded.notify_all();
            }
            Kind::Bye => {
                self.lose(node, "it left its world");
            }
            _ => return None,
        }
        Some(())
    }

    /// Takes what a rank of another node gives to a collective.
    fn take_given(&self, node: usize, body: &[u8]) -> Option<()> {
        let mut reader = Reader(body);
        let (communicator, rank, kernel) = (reader.u32()? as usize, reader.u32()? as usize, reader.text()?);
        let mut three = || Some([reader.u32()?, reader.u32()?, reader.u32()?]);
        let (grid, block) = (three()?, three()?);
        let dims = Dims { grid, block, shared_bytes: reader.u32()? };
        let segment = reader.u32()?.checked_sub(1).map(|segment| segment as usize);
        // Node 0 passes on what the others give.
        let is_of_node = if node == 0 { rank / self.num_local != self.node } else { rank / self.num_local == node };
        if !is_of_node || rank >= self.num_nodes * self.num_local {
            return None;
        }
        let collectives = lock(&self.collectives).get(communicator)?.upgrade();
        if let Some(collectives) = collectives {
            // An error is that of a lost world, which all learn of.
            let _ = collectives.give_from_afar(rank, &Called { kernel: kernel.into(), dims, segment }, reader.0);
        }
        Some(())
    }
}

impl Elsewhere for Span {
    fn give(&self, communicator: usize, rank: usize, called: &Called, gave: &[u8]) {
        let Dims { grid, block, shared_bytes } = called.dims;
        let head = Writer::default().u32(communicator as u32).u32(rank as u32).text(&called.kernel, TEXT_BYTES_MAX);
        let head = grid.iter().chain(&block).chain([&shared_bytes]).fold(head, |head, number| head.u32(*number));
        let head = head.u32(called.segment.map_or(0, |segment| segment as u32 + 1));
        self.tell_all(Kind::Give, &[&head.0, gave], None);
    }
}

fn write_lost(lost: &LostRank) -> Vec<u8> {
    let LostRank { rank, collective, segment, cause } = lost;
    let segment = segment.map_or(0, |segment| segment as u32 + 1);
    Writer::default().u32(*rank as u32).u32(segment).text(collective, TEXT_BYTES_MAX).text(cause, TEXT_BYTES_MAX).0
}

fn read_lost(body: &[u8]) -> Option<LostRank> {
    let mut reader = Reader(body);
    let (rank, segment) = (reader.u32()? as usize, reader.u32()?.checked_sub(1).map(|segment| segment as usize));
    Some(LostRank { rank, segment, collective: reader.text()?, cause: reader.text()? })
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Span").field("node", &self.node).field("num_nodes", &self.num_nodes).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
