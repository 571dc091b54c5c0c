//! Several GPUs as one: a [`World`] of ranks, each with a device and a thread of its own, in one process or in several.
//!
//! - [`communicator`]: the memory through which collectives pass data, and what a collective's kernel is told of it.
//! - [`meeting`]: where the ranks' threads wait for each other, with a bound.
//! - [`span`]: the connections between the processes of a world that has several.
//! - [`threads`]: a thread for each rank, which do the same at the same time.
//!
//! Invariants: every rank does the same forwards in the same order (law L13); a rank that fails, or does not come, ends the
//! world for all of them: it has its own error, and the others get one that names it, [`Error::RankLost`] (law L18).

pub(crate) mod communicator;
pub(crate) mod meeting;
mod span;
mod threads;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

pub use communicator::{Communicator, CommunicatorArgs, CommunicatorOptions};
pub use span::SpanOptions;
pub use threads::RankThreads;

use crate::device::host::collectives::Collectives;
use crate::device::ranks::{Lost, LostRank};
use crate::device::traits::Transport;
use crate::{Device, DeviceKind, Error, PinnedBuffer, Result};
use meeting::Meeting;
use span::Span;

/// The most ranks of a world.
pub const RANKS_MAX: usize = 8;

/// How the ranks of a world wait for each other.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct WorldOptions {
    /// How long ranks wait for one that does not come, on the host and on the device, before it counts as lost.
    pub timeout: Duration,
}

impl Default for WorldOptions {
    fn default() -> Self {
        Self { timeout: Duration::from_secs(10) }
    }
}

/// The ranks that share one model, each with a device. Cloning is cheap; all clones mean the same world.
///
/// # Example
/// ```
/// use bcg_runtime::{CommunicatorOptions, Device, Runner, RunnerOptions, World, WorldOptions};
/// let world = World::new(vec![Device::host(), Device::host()], WorldOptions::default())?;
/// let mut communicators = world.communicators(CommunicatorOptions::default())?;
/// let second = Runner::in_world(communicators.remove(1), RunnerOptions::default())?;
/// assert_eq!((second.rank(), second.world_size()), (1, 2));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone)]
pub struct World(Arc<Shared>);

struct Shared {
    devices: Vec<Device>,
    options: WorldOptions,
    lost: Arc<Lost>,
    meeting: Arc<Meeting>,
    /// Where collectives of host devices meet.
    collectives: Mutex<Vec<Arc<Collectives>>>,
    /// The words that kernels of each rank poll while they wait: see `communicator.rs`.
    abort_words: Mutex<Vec<Arc<PinnedBuffer>>>,
    is_sealed: AtomicBool,
    /// What carries data to ranks of other processes that kernels cannot reach.
    transports: Mutex<Vec<Weak<dyn Transport>>>,
    /// The other processes that have ranks of this world.
    span: Option<Arc<Span>>,
}

impl Shared {
    /// Makes all of this process leave what they wait in, once a rank is lost.
    fn spread_loss(&self) {
        for collectives in self.collectives.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            collectives.wake();
        }
        for word in self.abort_words.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            if let Err(error) = word.write_bytes_at(0, &1u32.to_ne_bytes()) {
                tracing::warn!(%error, "telling a device that its world is lost");
            }
        }
        for transport in self.transports() {
            // It may wait for kernels, and this thread may be one that others wait for.
            let abort = move || transport.abort();
            if let Err(error) = std::thread::Builder::new().name("node abort".into()).spawn(abort) {
                tracing::warn!(%error, "no thread to end what goes on between nodes");
            }
        }
    }

    fn transports(&self) -> Vec<Arc<dyn Transport>> {
        let transports = self.transports.lock().unwrap_or_else(PoisonError::into_inner);
        transports.iter().filter_map(Weak::upgrade).collect()
    }

    /// Checks that what carries data to other nodes has not failed.
    fn check_transports(&self) -> Result<()> {
        self.transports().iter().try_for_each(|transport| transport.check())
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Some(span) = &self.span {
            span.leave();
        }
        if *self.is_sealed.get_mut() {
            self.devices.iter().for_each(Device::unseal);
        }
    }
}

impl World {
    /// Makes a world with a rank on each device, in order. The devices are of one kind; several ranks may share a GPU if
    /// each has opened it for itself.
    ///
    /// # Errors
    /// [`Error::Option`] for no device, more than [`RANKS_MAX`], devices of several kinds, or one that is there twice.
    pub fn new(devices: Vec<Device>, options: WorldOptions) -> Result<Self> {
        check_devices(&devices, 1)?;
        Self::with(devices, options, Arc::default(), None)
    }

    /// Makes a world with ranks in several processes, its nodes, with a rank on each of this node's devices. Every node has
    /// as many. Waits for the other nodes.
    ///
    /// # Errors
    /// As [`World::new`]; [`Error::Nodes`] if a node does not come or was started otherwise; [`Error::Option`] for a node that
    /// is none of the number of nodes.
    pub fn spanning(devices: Vec<Device>, options: WorldOptions, span: &SpanOptions) -> Result<Self> {
        check_devices(&devices, span.num_nodes)?;
        if span.node >= span.num_nodes || span.num_nodes < 2 {
            let message = format!("node {} of {}; give a node below a number of at least 2", span.node, span.num_nodes);
            return Err(Error::Option { option: "World::spanning", message });
        }
        let lost = Arc::default();
        let rows =
            [("number of ranks on each node", devices.len().to_string()), ("kind of devices", describe(&devices[0]))];
        let joined = Span::join(span, devices.len(), options.timeout, &lost, &rows)?;
        let world = Self::with(devices, options, lost, Some(Arc::clone(&joined)))?;
        joined.start(Arc::downgrade(&world.0))?;
        Ok(world)
    }

    fn with(devices: Vec<Device>, options: WorldOptions, lost: Arc<Lost>, span: Option<Arc<Span>>) -> Result<Self> {
        let meeting = Arc::new(Meeting::new(devices.len(), options.timeout, &lost, span.is_some()));
        let (to_wake, beat) = (Arc::downgrade(&meeting), span.as_ref().map(Arc::downgrade));
        lost.wake_with(move || {
            if let Some(meeting) = to_wake.upgrade() {
                meeting.wake();
            }
            if let Some(span) = beat.as_ref().and_then(Weak::upgrade) {
                span.wake();
            }
        });
        let shared = Shared {
            devices,
            options,
            lost,
            meeting,
            collectives: Mutex::default(),
            abort_words: Mutex::default(),
            is_sealed: AtomicBool::new(false),
            transports: Mutex::default(),
            span,
        };
        Ok(Self(Arc::new(shared)))
    }

    /// Returns the number of ranks, of all nodes together.
    pub fn size(&self) -> usize {
        self.num_nodes() * self.num_local()
    }

    /// Returns the number of processes that have ranks of this world.
    pub fn num_nodes(&self) -> usize {
        self.0.span.as_ref().map_or(1, |span| span.node().1)
    }

    /// Returns this process among them.
    pub fn node(&self) -> usize {
        self.0.span.as_ref().map_or(0, |span| span.node().0)
    }

    /// Returns the number of ranks of this process.
    pub fn num_local(&self) -> usize {
        self.0.devices.len()
    }

    /// Returns the first rank of this process.
    pub fn first_rank(&self) -> usize {
        self.0.span.as_ref().map_or(0, |span| span.first_rank())
    }

    /// Returns the device of a rank of this process, counted from its first one.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn device(&self, local: usize) -> &Device {
        &self.0.devices[local]
    }

    /// Makes a communicator for each rank of this process, in order: the one through which all collectives of that rank's main stream go.
    ///
    /// # Errors
    /// [`Error::Option`] for too small a plane; [`Error::OutOfMemory`]; [`Error::NoDevice`] if a GPU cannot reach another one's
    /// memory; the driver's.
    pub fn communicators(&self, options: CommunicatorOptions) -> Result<Vec<Communicator>> {
        Communicator::for_all(self, &options)
    }

    /// Ends the allocating: from now on the ranks' devices give no memory but that of arenas. A driver's allocation may wait
    /// for every GPU that the world shares memory with, and a kernel there may wait for a rank whose thread allocates.
    ///
    /// The devices give memory again when the world's last handle is gone.
    pub fn seal(&self) {
        if !self.0.is_sealed.swap(true, Ordering::Relaxed) {
            self.0.devices.iter().for_each(Device::seal);
        }
    }

    /// Ends the world because a rank failed: kernels that wait for another rank leave, threads that wait for another rank
    /// get the error that this returns, and so does every later call. What came first counts.
    pub fn lose(&self, rank: usize, cause: &Error) -> Error {
        if let Some(error) = self.0.lost.error() {
            return error;
        }
        self.lose_at(rank, String::new(), None, cause.to_string())
    }

    /// Returns the error that ranks get, once one is lost.
    pub fn lost(&self) -> Option<Error> {
        self.0.lost.error()
    }

    /// Returns the numbers of the ranks' GPUs, in order; none of host devices.
    pub(crate) fn ordinals(&self) -> Vec<i32> {
        self.0.devices.iter().filter_map(|device| device.backend().ordinal()).collect()
    }

    /// Returns how many ranks the GPU with the most of them has; none on host devices.
    pub(crate) fn ranks_of_gpu(&self) -> usize {
        let gpus = self.ordinals();
        gpus.iter().map(|gpu| gpus.iter().filter(|other| *other == gpu).count()).max().unwrap_or(0)
    }

    /// Tells whether several ranks share a GPU.
    pub(crate) fn shares_gpus(&self) -> bool {
        self.ranks_of_gpu() > 1
    }

    /// Returns how long ranks wait for one that does not come.
    pub fn timeout(&self) -> Duration {
        self.0.options.timeout
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.0.lost.check()
    }

    pub(crate) fn lose_at(&self, rank: usize, collective: String, segment: Option<usize>, cause: String) -> Error {
        let error = self.0.lost.set(LostRank { rank, collective, segment, cause });
        self.0.spread_loss();
        error
    }

    /// Says a few bytes to all nodes and returns what all said, in the order of the nodes, who all come for the same
    /// `purpose`, at most `timeout` apart. In a world of one process they are the only ones.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub fn exchange(&self, purpose: &'static str, bytes: Vec<u8>, timeout: Duration) -> Result<Vec<Vec<u8>>> {
        match &self.0.span {
            None => Ok(vec![bytes]),
            Some(span) => span.exchange(purpose, bytes, timeout),
        }
    }

    /// Tells all other nodes what to do. Only node 0 does.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub fn command(&self, command: &[u8]) -> Result<()> {
        self.0.span.as_ref().map_or(Ok(()), |span| span.command(command))
    }

    /// Waits for what node 0 wants this node to do; nothing once node 0 has left in order, and in a world of one process.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub fn next_command(&self) -> Result<Option<Vec<u8>>> {
        self.0.span.as_ref().map_or(Ok(None), |span| span.next_command())
    }

    /// Waits for all ranks of this process. The last one calls `join` with what each gave, in the order of the ranks, and each gets its own
    /// part of what that returns. All come for the same `purpose`.
    ///
    /// # Errors
    /// [`Error::RankLost`] on every rank if one does not come in time, comes for something else, or was lost before; on the
    /// rank that called it, the error of `join`.
    pub(crate) fn meet<T: Send + 'static, R: Send + 'static>(
        &self,
        rank: usize,
        purpose: &'static str,
        value: T,
        join: impl FnOnce(Vec<T>) -> Result<Vec<R>>,
    ) -> Result<R> {
        let first = self.first_rank();
        self.0.meeting.meet(rank - first, purpose, value, join).map_err(|failed| match failed {
            meeting::Failed::Lost(error) => error,
            meeting::Failed::Late { rank, cause } => self.lose_at(first + rank, purpose.to_owned(), None, cause),
            meeting::Failed::Join(error) => {
                self.lose_at(rank, purpose.to_owned(), None, error.to_string());
                error
            }
        })
    }

    fn kind(&self) -> DeviceKind {
        self.0.devices[0].kind()
    }
}

fn check_devices(devices: &[Device], num_nodes: usize) -> Result<()> {
    let refuse = |message: String| Err(Error::Option { option: "World::new", message });
    if !(1..=RANKS_MAX).contains(&(devices.len() * num_nodes)) {
        return refuse(format!("{} ranks; give 1 to {RANKS_MAX} devices", devices.len() * num_nodes));
    }
    if let Some(other) = devices.iter().find(|device| device.kind() != devices[0].kind()) {
        let message =
            format!("{} and {} are of different kinds; give devices of one kind", devices[0].name(), other.name());
        return refuse(message);
    }
    for (rank, device) in devices.iter().enumerate() {
        if devices[..rank].iter().any(|other| other.is(device)) {
            return refuse(format!("{} is there twice; open it once for each rank", device.name()));
        }
    }
    Ok(())
}

/// What must be the same of all devices: kernels choose their grids by it.
fn describe(device: &Device) -> String {
    let arch = device.compute_capability().map_or_else(String::new, |arch| format!(" {arch}"));
    format!("{:?}{arch} with {} multiprocessors", device.kind(), device.num_multiprocessors())
}

/// A rank, as the forwards of its runner know it: one of several.
#[derive(Clone, Debug)]
pub(crate) struct Ranks {
    pub(crate) world: World,
    pub(crate) rank: usize,
}

impl Ranks {
    /// This rank among those of this process.
    pub(crate) fn local(&self) -> usize {
        self.rank - self.world.first_rank()
    }

    /// See [`World::meet`].
    pub(crate) fn meet<T: Send + 'static, R: Send + 'static>(
        &self,
        purpose: &'static str,
        value: T,
        join: impl FnOnce(Vec<T>) -> Result<Vec<R>>,
    ) -> Result<R> {
        self.world.meet(self.rank, purpose, value, join)
    }

    /// Waits for all ranks of this process.
    ///
    /// # Errors
    /// Those of [`World::meet`].
    pub(crate) fn come(&self, purpose: &'static str) -> Result<()> {
        self.meet(purpose, (), Ok)
    }

    /// Waits for all ranks, of all nodes.
    ///
    /// # Errors
    /// Those of [`World::meet`].
    pub(crate) fn come_all(&self, purpose: &'static str) -> Result<()> {
        self.max(purpose, 0).map(drop)
    }

    /// Waits for all ranks, of all nodes, and returns an error on all of them if there is one on any, or if the numbers that
    /// stand for what they did differ. The world goes on.
    ///
    /// # Errors
    /// This rank's own; [`Error::Ranks`] that names another rank; those of [`World::meet`].
    pub(crate) fn agree<R>(
        &self,
        purpose: &'static str,
        result: Result<R>,
        number: impl FnOnce(&R) -> u64,
    ) -> Result<R> {
        self.agree_through(purpose, result, number, |said| {
            let own = said.iter().fold(Vec::new(), Said::write);
            let all = self.world.exchange(purpose, own, self.world.timeout())?;
            all.iter()
                .map(|node| Said::read_all(node))
                .collect::<Option<Vec<_>>>()
                .map(|all| all.concat())
                .ok_or_else(|| Error::other(format!("what another node said at `{purpose}` cannot be read")))
        })
    }

    /// As [`Ranks::agree`], of the ranks of this process alone.
    pub(crate) fn agree_here<R>(&self, purpose: &'static str, result: Result<R>) -> Result<R> {
        self.agree_through(purpose, result, |_| 0, Ok)
    }

    /// As [`Ranks::agree`], of the ranks that `gather` makes of those of this process.
    fn agree_through<R>(
        &self,
        purpose: &'static str,
        result: Result<R>,
        number: impl FnOnce(&R) -> u64,
        gather: impl FnOnce(Vec<Said>) -> Result<Vec<Said>>,
    ) -> Result<R> {
        let said = Said(result.as_ref().map(number).map_err(Error::to_string));
        let first = self.meet(purpose, said, |said| {
            let num_local = said.len();
            let said = gather(said)?;
            let failed = said.iter().enumerate().find_map(|(rank, said)| Some((rank, said.0.clone().err()?)));
            let other = || said.iter().position(|number| *number != said[0]);
            let differs =
                || other().map(|rank| (rank, "it differs there from rank 0: all ranks do the same".to_owned()));
            Ok(vec![failed.or_else(differs); num_local])
        })?;
        match (result, first) {
            (Ok(value), None) => Ok(value),
            (Err(error), _) => Err(error),
            (Ok(_), Some((rank, message))) => {
                Err(Error::Ranks { what: purpose, message: format!("rank {rank}: {message}") })
            }
        }
    }

    /// Waits for all ranks, of all nodes, and returns the largest of their numbers.
    ///
    /// # Errors
    /// Those of [`World::meet`].
    pub(crate) fn max(&self, purpose: &'static str, number: usize) -> Result<usize> {
        self.meet(purpose, number, |numbers| {
            let own = numbers.iter().copied().max().unwrap_or(0) as u64;
            let all = self.world.exchange(purpose, own.to_le_bytes().to_vec(), self.world.timeout())?;
            let of_nodes = all.iter().map(|bytes| bytes.as_slice().try_into().map_or(0, u64::from_le_bytes));
            let max = of_nodes.max().unwrap_or(own) as usize;
            Ok(vec![max; numbers.len()])
        })
    }

    /// Ends the world if the forward of this rank failed: the others may wait for what it did not do.
    pub(crate) fn ended<R>(&self, result: Result<R>) -> Result<R> {
        result.inspect_err(|error| {
            self.world.lose(self.rank, error);
        })
    }
}

/// What a rank says when all are to agree: a number that stands for what it did, or why it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said(Result<u64, String>);

impl Said {
    /// Bytes of an error's text that other nodes get, at most.
    const TEXT_BYTES_MAX: usize = 4 << 10;

    /// Appends it to what this node says: whether it failed, the number or the length of the text, and the text.
    fn write(mut bytes: Vec<u8>, said: &Self) -> Vec<u8> {
        let text = said.0.as_ref().err().map_or("", |text| &text[..text.floor_char_boundary(Self::TEXT_BYTES_MAX)]);
        bytes.push(u8::from(said.0.is_err()));
        bytes.extend_from_slice(&said.0.as_ref().map_or(text.len() as u64, |number| *number).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
        bytes
    }

    /// Reads what the ranks of a node said.
    fn read_all(mut bytes: &[u8]) -> Option<Vec<Self>> {
        let mut all = Vec::new();
        while let Some((has_failed, rest)) = bytes.split_first() {
            let (number, rest) = rest.split_first_chunk()?;
            let number = u64::from_le_bytes(*number);
            let (text, rest) =
                rest.split_at_checked(if *has_failed == 0 { 0 } else { usize::try_from(number).ok()? })?;
            let text = String::from_utf8_lossy(text).into_owned();
            all.push(Self(if *has_failed == 0 { Ok(number) } else { Err(text) }));
            bytes = rest;
        }
        Some(all)
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("World").field(&self.0.devices).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Runner, RunnerOptions};

    #[test]
    fn a_sealed_world_gives_arena_memory_only() -> Result<()> {
        let world = World::new(vec![Device::host(), Device::host()], WorldOptions::default())?;
        let communicators = world.communicators(CommunicatorOptions::default())?;
        let runners = communicators.into_iter().map(|one| Runner::in_world(one, RunnerOptions::default()));
        let mut ranks = RankThreads::start(&world, runners.collect::<Result<Vec<_>>>()?)?;
        world.seal();
        let refused = world.device(1).empty(&[4], DType::U8).unwrap_err();
        assert!(matches!(&refused, Error::Sealed { device } if device == "host:0"), "{refused}");
        assert!(matches!(PinnedBuffer::new(world.device(0), 4), Err(Error::Sealed { .. })));
        ranks.run(|runner| runner.eager(&(), |cx| cx.empty(&[64 << 20], DType::U8).map(|_| ())))?;
        let device = world.device(1).clone();
        drop((ranks, world));
        device.empty(&[4], DType::U8).map(|_| ())
    }
}
