//! A communicator: the memory through which the collectives of one rank's stream pass data to the other ranks.
//!
//! - The *plane* of a rank is memory that all ranks can write. A collective pushes what it has into its place in the planes
//!   of the others, and reads what they pushed into its own. So nothing is registered, and no rank reads another's tensors
//!   (law L14).
//! - Nothing that the host passes to a collective changes from call to call: epochs live in device memory and the kernels
//!   advance them (law L15).
//! - While a kernel waits it polls a word of page-locked memory, which the host sets to make it leave, and leaves by itself
//!   after a bound; it then says in that memory which rank it waited for (law L18).

use std::fmt;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use super::{RANKS_MAX, Ranks, World};
use crate::device::host::collectives::Collectives;
use crate::device::traits::Transport;
use crate::device::{Allocation, Reservation, map_for};
use crate::launch::{PlaneId, SEGMENT_AT};
use crate::{Device, DeviceKind, DevicePtr, Error, KernelArgs, PinnedBuffer, Result};

/// The blocks of a collective's grid, at most: each has an epoch of its own. See [`OpStream::collective_blocks_max`] for how
/// many fit into the GPUs at hand.
///
/// [`OpStream::collective_blocks_max`]: crate::OpStream::collective_blocks_max
pub const COLLECTIVE_BLOCKS_MAX: usize = 256;

/// Blocks of a collective that fit into a multiprocessor: they have up to 512 threads.
const BLOCKS_OF_MULTIPROCESSOR: usize = 2;

/// The smallest plane: some packs of 16 bytes for each rank, in each half.
const PLANE_BYTES_MIN: usize = 64 << 10;

/// Halves of a plane: a collective uses the one that the parity of its epoch says.
const HALVES: usize = 2;

/// What one store sends.
const PACK_BYTES: usize = 16;

/// Words of page-locked memory between host and device: leave; the lost rank and 1; the collective; its segment and 1.
const WORDS: usize = 4;

/// How large the communicators of a world are.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct CommunicatorOptions {
    /// The bytes of each rank's plane, at least 64 KiB; larger messages are sent in several parts. The host device has none.
    pub plane_bytes: usize,
    /// What epochs begin at. A test begins just below 2³².
    pub first_epoch: u32,
    /// Whether sums are made of what was gathered, as between GPUs of several nodes, where one kernel could do both. A test
    /// wants it.
    pub sums_gathered: bool,
}

impl Default for CommunicatorOptions {
    fn default() -> Self {
        Self { plane_bytes: 64 << 20, first_epoch: 0, sums_gathered: false }
    }
}

/// What a collective's kernel is told of the communicator: the first field of its argument struct. The same for every call
/// of one kernel in one place of a forward.
#[repr(C)]
#[derive(Clone, Copy, Debug, KernelArgs)]
pub struct CommunicatorArgs {
    /// The planes of all ranks, in order; null beyond the world's size, and on the host device.
    #[points_to(u32)]
    pub planes: [DevicePtr; RANKS_MAX],
    /// The epoch of each block, of this rank: how many collectives of this communicator it has done.
    #[points_to(u32)]
    pub epochs: DevicePtr,
    /// Page-locked words: leave; the lost rank and 1; the collective; its segment and 1.
    #[points_to(u32)]
    pub words: DevicePtr,
    /// The packs of 16 bytes that one rank can send to another in one launch: half a plane's share of each rank.
    pub slot_packs: u32,
    /// 1 if several ranks share a GPU.
    pub shares_gpus: u32,
    /// How long to wait for another rank, in nanoseconds.
    pub timeout_ns: u64,
    /// This rank.
    pub rank: u32,
    /// The number of ranks.
    pub num_ranks: u32,
    /// The collective's number among the names of the communicator.
    pub collective: u32,
    /// The segment that it is captured in, and 1; 0 outside.
    pub segment: u32,
}

const _: () = assert!(std::mem::offset_of!(CommunicatorArgs, segment) == SEGMENT_AT, "see `Launch::segment`");

/// What one rank needs for its collectives: given to its [`Runner`](crate::Runner), whose main stream is the only one that
/// uses it (law L16). Two runners on one communicator do not compile:
/// ```compile_fail,E0382
/// use bcg_runtime::{CommunicatorOptions, Device, Runner, RunnerOptions, World, WorldOptions};
/// let world = World::new(vec![Device::host()], WorldOptions::default())?;
/// let communicator = world.communicators(CommunicatorOptions::default())?.remove(0);
/// let first = Runner::in_world(communicator, RunnerOptions::default())?;
/// let second = Runner::in_world(communicator, RunnerOptions::default())?;
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub struct Communicator {
    world: World,
    rank: usize,
    plane: PlaneId,
    args: CommunicatorArgs,
    blocks_max: usize,
    told: Arc<Told>,
    sums_gathered: bool,
    /// What carries data to ranks that kernels cannot reach.
    transport: Option<Arc<dyn Transport>>,
    _epochs: Allocation,
    /// All ranks' planes: others write into this one's as long as they live.
    _planes: Arc<[Reservation]>,
}

/// What the kernels of a rank say of the others, for whoever waits for that rank's work.
#[derive(Debug)]
pub(crate) struct Told {
    world: World,
    rank: usize,
    words: Arc<PinnedBuffer>,
    /// The collectives launched so far, by name.
    names: Mutex<Vec<&'static str>>,
}

impl Communicator {
    pub(super) fn for_all(world: &World, options: &CommunicatorOptions) -> Result<Vec<Self>> {
        if options.plane_bytes < PLANE_BYTES_MIN {
            let message = format!("plane_bytes is {}; give at least {PLANE_BYTES_MIN}", options.plane_bytes);
            return Err(Error::Option { option: "World::communicators", message });
        }
        let (size, timeout) = (world.size(), world.0.options.timeout);
        let planes = planes(world, options.plane_bytes)?;
        let first_rank = world.first_rank();
        let mut collectives = Collectives::new(size, timeout, &world.0.lost);
        if let Some(span) = &world.0.span {
            let local = first_rank..first_rank + world.num_local();
            collectives = collectives.spanning(local, Arc::clone(span) as _, span.num_communicators());
        }
        let collectives = Arc::new(collectives);
        if let Some(span) = &world.0.span {
            span.add(&collectives);
        }
        world.0.collectives.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&collectives));
        let mut args = CommunicatorArgs {
            planes: [DevicePtr::NULL; RANKS_MAX],
            epochs: DevicePtr::NULL,
            words: DevicePtr::NULL,
            slot_packs: planes.first().map_or(0, |plane| (plane.mapped_bytes() / HALVES / size / PACK_BYTES) as u32),
            shares_gpus: world.shares_gpus().into(),
            timeout_ns: timeout.as_nanos().try_into().unwrap_or(u64::MAX),
            rank: 0,
            num_ranks: size as u32,
            collective: 0,
            segment: 0,
        };
        for (place, plane) in args.planes.iter_mut().zip(planes.iter()) {
            *place = plane.base();
        }
        let blocks_max = blocks_max(world);
        // What a rank gives finds a place on every node from here on.
        let transports = transports(world)?;
        let mut all = Vec::with_capacity(world.num_local());
        for ((device, rank), transport) in world.0.devices.iter().zip(first_rank..).zip(transports) {
            let epochs = Allocation::new(device, COLLECTIVE_BLOCKS_MAX * size_of::<u32>())?;
            let stream = device.own_stream()?;
            stream.backend.fill_u32(stream.handle, epochs.ptr(), options.first_epoch, COLLECTIVE_BLOCKS_MAX)?;
            let words = Arc::new(PinnedBuffer::new(device, WORDS * size_of::<u32>())?);
            words.write_bytes_at(0, &[0; WORDS * size_of::<u32>()])?;
            world.0.abort_words.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&words));
            all.push(Self {
                world: world.clone(),
                rank,
                plane: device.backend().join(&collectives, rank),
                args: CommunicatorArgs { epochs: epochs.ptr(), words: words.ptr(), rank: rank as u32, ..args },
                blocks_max,
                sums_gathered: options.sums_gathered || transport.is_some(),
                transport,
                told: Arc::new(Told { world: world.clone(), rank, words, names: Mutex::default() }),
                _epochs: epochs,
                _planes: Arc::clone(&planes),
            });
            device.synchronize()?;
        }
        Ok(all)
    }

    /// Returns the world.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Returns this rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the device of this rank.
    pub fn device(&self) -> &Device {
        self.world.device(self.rank - self.world.first_rank())
    }

    /// Returns the bytes that one rank can send to another in one launch; without a bound on the host device.
    pub fn slot_bytes(&self) -> usize {
        if self.world.kind() == DeviceKind::Host { usize::MAX } else { self.args.slot_packs as usize * PACK_BYTES }
    }

    /// Returns how many blocks a collective may have, for all to find room at once on every GPU of the world. Where ranks
    /// share one, their collectives together leave half of its multiprocessors alone: a block of another kernel may need a
    /// whole one, and what a collective waits for must run beside it. The same on all ranks.
    pub fn blocks_max(&self) -> usize {
        self.blocks_max
    }

    /// Whether sums are made of what was gathered.
    pub(crate) fn sums_gathered(&self) -> bool {
        self.sums_gathered
    }

    /// What carries data to ranks that kernels cannot reach, if there are such.
    pub(crate) fn transport(&self) -> Option<&Arc<dyn Transport>> {
        self.transport.as_ref()
    }

    pub(crate) fn plane(&self) -> PlaneId {
        self.plane
    }

    /// What a collective of this name is told, in this segment of a capture or outside of any.
    pub(crate) fn args(&self, collective: &'static str, segment: Option<usize>) -> CommunicatorArgs {
        let mut names = self.told.names.lock().unwrap_or_else(PoisonError::into_inner);
        let known = names.iter().position(|name| *name == collective);
        let number = known.unwrap_or_else(|| {
            names.push(collective);
            names.len() - 1
        });
        let segment = segment.map_or(0, |segment| segment as u32 + 1);
        CommunicatorArgs { collective: number as u32, segment, ..self.args }
    }

    /// What its kernels say of the other ranks.
    pub(crate) fn told(&self) -> &Arc<Told> {
        &self.told
    }

    /// This rank, if it is one of several.
    pub(crate) fn ranks(&self) -> Option<Ranks> {
        (self.world.size() > 1).then(|| Ranks { world: self.world.clone(), rank: self.rank })
    }
}

impl Told {
    /// Tells whether a collective of this name was launched.
    pub(crate) fn names(&self, kernel: &str) -> bool {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).contains(&kernel)
    }

    /// Checks that no rank is lost, of which a kernel of this rank may tell first.
    ///
    /// # Errors
    /// [`Error::RankLost`].
    pub(crate) fn check(&self) -> Result<()> {
        let mut words = [0; WORDS];
        self.words.read_bytes_at(0, bytemuck::cast_slice_mut(&mut words))?;
        let [_, lost, collective, segment]: [u32; WORDS] = words;
        if lost == 0 {
            return self.world.check();
        }
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        let name = names.get(collective as usize).map_or("a collective", |name| *name);
        let segment = segment.checked_sub(1).map(|segment| segment as usize);
        let cause = format!("rank {} waited {:?} for it", self.rank, self.world.0.options.timeout);
        Err(self.world.lose_at(lost as usize - 1, name.to_owned(), segment, cause))
    }
}

/// See [`Communicator::blocks_max`].
fn blocks_max(world: &World) -> usize {
    let multiprocessors = world.0.devices.iter().map(|device| device.num_multiprocessors() as usize).min();
    let (multiprocessors, ranks_of_gpu) = (multiprocessors.unwrap_or(1), world.ranks_of_gpu());
    let blocks = match ranks_of_gpu {
        0 | 1 => multiprocessors * BLOCKS_OF_MULTIPROCESSOR,
        _ => multiprocessors / (2 * ranks_of_gpu),
    };
    blocks.clamp(1, COLLECTIVE_BLOCKS_MAX)
}

/// Connects the ranks of this process with those of other nodes, through a library where they are GPUs: one for each, and none
/// in a world of one process.
fn transports(world: &World) -> Result<Vec<Option<Arc<dyn Transport>>>> {
    let num_local = world.num_local();
    if world.num_nodes() == 1 {
        return Ok(vec![None; num_local]);
    }
    let id = if world.node() == 0 { world.device(0).backend().transport_id()? } else { None };
    let ids = world.exchange("the making of communicators", id.unwrap_or_default(), world.timeout())?;
    let id: Arc<[u8]> = ids[0].as_slice().into();
    if id.is_empty() {
        return Ok(vec![None; num_local]);
    }
    let (sender, joined) = sync_channel(num_local);
    for local in 0..num_local {
        let (world, id, sender) = (world.clone(), Arc::clone(&id), sender.clone());
        let join = move || {
            let rank = world.first_rank() + local;
            let transport = world.device(local).backend().join_transport(&id, rank, world.size());
            let _ = sender.send((local, transport)); // nobody waits any more, if it came too late
        };
        std::thread::Builder::new().name("node join".into()).spawn(join).map_err(Error::other)?;
    }
    let (mut transports, deadline) = (vec![None; num_local], Instant::now() + world.timeout());
    while transports.iter().any(Option::is_none) {
        let left = deadline.saturating_duration_since(Instant::now());
        let late = |_| Error::Nodes(format!("their GPUs did not connect within {:?}", world.timeout()));
        let (local, transport) = joined.recv_timeout(left).map_err(late)?;
        let transport: Arc<dyn Transport> = Arc::from(transport?);
        world.0.transports.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&transport));
        transports[local] = Some(transport);
    }
    Ok(transports)
}

/// Maps a plane on each GPU, which all others can write, and fills it with the word that stands for "not yet written".
fn planes(world: &World, bytes: usize) -> Result<Arc<[Reservation]>> {
    if world.kind() == DeviceKind::Host || world.num_nodes() > 1 {
        return Ok(Arc::new([]));
    }
    let mut planes = Vec::with_capacity(world.size());
    for device in &world.0.devices {
        let plane = map_for(device, &world.0.devices, bytes)?;
        let stream = device.own_stream()?;
        stream.backend.fill_u32(stream.handle, plane.base(), u32::MAX, plane.mapped_bytes() / size_of::<u32>())?;
        device.synchronize()?;
        planes.push(plane);
    }
    Ok(planes.into())
}

impl fmt::Debug for Communicator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Communicator").field("rank", &self.rank).field("world", &self.world).finish_non_exhaustive()
    }
}
