//! Several host devices as the ranks of a world, at the level of the driver's calls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::testing::Rig;
use super::super::{HostMemory, HostOptions};
use super::Collectives;
use crate::compile::Source;
use crate::device::ranks::{Lost, LostRank};
use crate::device::traits::{
    EventBackend, ExecHandle, GraphBackend, MemoryBackend, RankBackend, StreamBackend, StreamHandle,
};
use crate::launch::{Launch, PlaneId, SEGMENT_AT};
use crate::op::Op;
use crate::{DevicePtr, Dims, Error, Kernel, KernelArgs, RanksFn, Result};

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(60);
const SHORT: Duration = Duration::from_millis(50);
/// The number of elements of a message.
const LEN: usize = 5;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct SumArgs {
    /// In the place of the communicator's arguments; the last word is the segment and 1.
    world: [u32; SEGMENT_AT / 4 + 1],
    x: DevicePtr,
    out: DevicePtr,
}

static SOURCE: Source = Source::new("testing_ranks.cu", "").takes::<SumArgs>();
const HOST: RanksFn<SumArgs> = RanksFn { give, take };
// SAFETY: the source has no kernel; the host reference checks every access.
static SUM: Kernel<SumArgs> = unsafe { Kernel::collective("sum", &SOURCE, HOST) };
// SAFETY: as for `SUM`.
static OTHER: Kernel<SumArgs> = unsafe { Kernel::collective("other", &SOURCE, HOST) };

fn give(args: &SumArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
    Ok(bytemuck::cast_slice(&memory.load::<f32>(args.x, LEN)?).to_vec())
}

/// Sums in the order of the ranks.
fn take(args: &SumArgs, _: &Dims, gave: &[Arc<[u8]>], memory: &HostMemory<'_>) -> Result<()> {
    let mut sum = [0f32; LEN];
    for bytes in gave {
        let values = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_ne_bytes(*bytes));
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    memory.store(args.out, &sum)
}

/// One rank: a device with a stream, what it adds up and where it puts the sum.
struct Rank {
    rig: Rig,
    plane: PlaneId,
    main: StreamHandle,
    x: DevicePtr,
    out: DevicePtr,
}

impl Rank {
    fn new(rank: usize, collectives: &Arc<Collectives>, options: HostOptions) -> Self {
        let rig = Rig::with(options);
        let plane = rig.backend.join(collectives, rank);
        let (main, [x, out]) = (rig.stream("main"), [(); 2].map(|()| rig.backend.alloc(LEN * 4).unwrap()));
        let this = Self { rig, plane, main, x, out };
        this.upload(&std::array::from_fn(|at| 0.1 + rank as f32 + 0.3 * at as f32));
        this
    }

    fn upload(&self, x: &[f32; LEN]) {
        self.rig.backend.copy_from_host(self.main, self.x, bytemuck::cast_slice(x)).unwrap();
    }

    fn launch(&self, stream: StreamHandle, kernel: &'static Kernel<SumArgs>, grid: u32, x: DevicePtr, out: DevicePtr) {
        let mut world = [0; SEGMENT_AT / 4 + 1];
        world[SEGMENT_AT / 4] = 3;
        let launch = Launch::new(kernel, Dims::linear(grid, 32), &SumArgs { world, x, out });
        let launch = Launch { plane: Some(self.plane), ..launch };
        self.rig.backend.enqueue(stream, &Op::Launch(launch)).unwrap();
    }

    /// Enqueues `out = sum of all ranks' x`.
    fn sum(&self) {
        self.launch(self.main, &SUM, 1, self.x, self.out);
    }

    /// Enqueues `x = sum of all ranks' out`.
    fn sum_back(&self) {
        self.launch(self.main, &SUM, 1, self.out, self.x);
    }

    fn synchronize(&self) -> Result<()> {
        self.rig.backend.synchronize_stream(self.main)
    }

    /// Returns the bits of a message.
    fn read(&self, ptr: DevicePtr) -> Result<Vec<u32>> {
        let values = self.rig.read::<f32>(self.main, ptr, LEN)?;
        Ok(values.into_iter().map(f32::to_bits).collect())
    }

    fn capture_sum(&self) -> ExecHandle {
        self.rig.capture(self.main, || self.sum()).unwrap()
    }

    /// Checks that the stream works and that nothing is left of what was before.
    fn assert_usable(&self) {
        self.synchronize().unwrap();
        let log = self.rig.log();
        self.rig.append(self.main, log, 7).unwrap();
        assert_eq!(self.rig.read_log(log), [7]);
        assert_eq!(self.rig.control.num_pending(), 0);
    }
}

struct Ranks {
    ranks: Vec<Rank>,
    lost: Arc<Lost>,
    collectives: Arc<Collectives>,
}

impl Ranks {
    fn new(num_ranks: usize, timeout: Duration) -> Self {
        Self::with(num_ranks, timeout, &HostOptions::default())
    }

    fn with(num_ranks: usize, timeout: Duration, options: &HostOptions) -> Self {
        let lost = Arc::default();
        let collectives = Arc::new(Collectives::new(num_ranks, timeout, &lost));
        let ranks = (0..num_ranks).map(|rank| Rank::new(rank, &collectives, options.clone())).collect();
        Self { ranks, lost, collectives }
    }

    fn assert_lost(&self, rank: usize, cause: &str) {
        assert_lost(&self.lost.error().unwrap(), rank, cause);
        self.ranks.iter().for_each(Rank::assert_usable);
    }
}

fn assert_lost(error: &Error, lost: usize, part: &str) {
    match error {
        Error::RankLost { rank, collective, segment: Some(2), cause } => {
            assert_eq!((*rank, &**collective), (lost, "sum"), "{error}");
            assert!(cause.contains(part), "{error}");
        }
        other => panic!("not a lost rank: {other}"),
    }
}

/// Runs a program in which sums build on sums, driven by one thread for all ranks in turn or by one for each, and returns
/// the bits that each rank has at its end.
fn run_program(num_ranks: usize, seed: u64, threads: bool) -> Vec<Vec<u32>> {
    let world = Ranks::new(num_ranks, LONG);
    let run = |(at, rank): (usize, &Rank)| {
        rank.rig.control.reseed(seed + 1000 * at as u64);
        rank.rig.control.set_delay("main", (seed + at as u64).is_multiple_of(3));
        let (exec, log) = (rank.capture_sum(), rank.rig.log());
        let side = rank.rig.stream("side");
        for step in 0..3 {
            rank.sum();
            rank.rig.append(side, log, step).unwrap();
            rank.sum_back();
            rank.rig.backend.launch_graph(exec, rank.main).unwrap();
        }
    };
    let read = |rank: &Rank| [rank.read(rank.x).unwrap(), rank.read(rank.out).unwrap()].concat();
    if !threads {
        world.ranks.iter().enumerate().for_each(run);
        return world.ranks.iter().map(read).collect();
    }
    std::thread::scope(|scope| {
        let each = world.ranks.iter().enumerate();
        let handles: Vec<_> = each
            .map(|(at, rank)| {
                scope.spawn(move || {
                    run((at, rank));
                    read(rank)
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}

#[test]
fn all_ranks_get_the_same_bits_under_every_schedule() {
    for num_ranks in [1, 2, 3] {
        let expected = run_program(num_ranks, 0, false);
        assert!(expected.iter().all(|bits| *bits == expected[0]));
        for seed in 1..100 {
            assert_eq!(run_program(num_ranks, seed, seed.is_multiple_of(2)), expected, "seed {seed}");
        }
    }
}

#[test]
fn a_collective_ends_when_the_last_rank_has_come() {
    let world = Ranks::new(2, LONG);
    let [first, second] = &world.ranks[..] else { unreachable!() };
    first.sum();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| first.read(first.out).unwrap());
        std::thread::sleep(SHORT);
        assert!(!reader.is_finished());
        second.sum();
        assert_eq!(reader.join().unwrap(), second.read(second.out).unwrap());
    });
}

#[test]
fn every_call_that_waits_lets_other_ranks_come() {
    let calls: [fn(&Rank); 6] = [
        |rank| rank.synchronize().unwrap(),
        |rank| rank.rig.backend.synchronize().unwrap(),
        |rank| {
            let event = rank.rig.event();
            rank.rig.backend.record_event(event, rank.main).unwrap();
            rank.rig.backend.synchronize_event(event).unwrap();
        },
        |rank| rank.rig.backend.free(rank.rig.backend.alloc(1).unwrap()),
        |rank| {
            let unit = rank.rig.backend.map_granularity();
            let base = rank.rig.backend.reserve(unit).unwrap();
            rank.rig.backend.map(base, 0, unit).unwrap();
            rank.rig.backend.unmap(base, 0, unit);
        },
        |rank| {
            let ptr = rank.rig.backend.alloc(1).unwrap();
            rank.rig.capture(rank.rig.stream("captured"), || rank.rig.backend.free(ptr)).unwrap();
        },
    ];
    for call in calls {
        let world = Ranks::new(2, LONG);
        world.ranks[0].sum();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                call(&world.ranks[0]);
                world.ranks[0].rig.control.num_pending()
            });
            std::thread::sleep(Duration::from_millis(5));
            assert!(!waiter.is_finished());
            world.ranks[1].sum();
            world.ranks[1].synchronize().unwrap();
            assert_eq!(waiter.join().unwrap(), 0);
        });
    }
}

#[test]
fn other_streams_do_not_wait_for_other_ranks() {
    let world = Ranks::new(2, SHORT);
    let rank = &world.ranks[0];
    let (side, log) = (rank.rig.stream("side"), rank.rig.log());
    rank.sum();
    rank.rig.append(rank.main, log, 1).unwrap();
    rank.rig.append(side, log, 2).unwrap();
    rank.rig.backend.synchronize_stream(side).unwrap();
    assert_eq!(rank.rig.control.num_pending(), 2);
    assert!(world.lost.error().is_none());
    world.ranks[1].sum();
    assert_eq!(rank.rig.read_log(log), [2, 1]);
}

#[test]
fn enqueuing_behind_a_collective_waits_for_nobody() {
    let world = Ranks::with(2, SHORT, &HostOptions { max_pending: 4, ..HostOptions::default() });
    let rank = &world.ranks[0];
    let log = rank.rig.log();
    rank.sum();
    (0..20).for_each(|value| rank.rig.append(rank.main, log, value).unwrap());
    assert!(world.lost.error().is_none());
    world.ranks[1].sum();
    assert_eq!(rank.rig.read_log(log), Vec::from_iter(0..20));
}

#[test]
fn a_rank_that_does_not_come_is_lost_to_all_after_the_timeout() {
    for num_ranks in [2, 3] {
        let world = Ranks::new(num_ranks, SHORT);
        let (late, others) = world.ranks.split_last().unwrap();
        others.iter().for_each(Rank::sum);
        let begun = Instant::now();
        for rank in others {
            assert_lost(&rank.synchronize().unwrap_err(), num_ranks - 1, "did not come within 50ms");
        }
        assert!(begun.elapsed() >= SHORT);
        late.sum();
        assert_lost(&late.synchronize().unwrap_err(), num_ranks - 1, "did not come within 50ms");
        world.assert_lost(num_ranks - 1, "did not come");
    }
}

#[test]
fn a_lost_world_ends_those_who_wait_and_those_who_come_at_once() {
    let world = Ranks::new(2, LONG);
    let [first, second] = &world.ranks[..] else { unreachable!() };
    first.sum();
    first.sum_back();
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| first.synchronize().unwrap_err());
        std::thread::sleep(Duration::from_millis(5));
        let lost = LostRank { rank: 1, collective: "sum".to_owned(), segment: Some(2), cause: "asked for".to_owned() };
        world.lost.set(lost);
        world.collectives.wake();
        assert_lost(&waiter.join().unwrap(), 1, "asked for");
    });
    second.sum();
    assert_lost(&second.synchronize().unwrap_err(), 1, "asked for");
    world.assert_lost(1, "asked for");
}

#[test]
fn ranks_that_come_to_different_collectives_lose_their_world() {
    let names =
        "it came to `sum` (grid [1, 1, 1], block [32, 1, 1], 0 bytes of shared memory) while rank 0 came to `other`";
    for (kernel, grid, cause) in [(&OTHER, 1, names), (&SUM, 2, "while rank 0 came to `sum` (grid [2, 1, 1]")] {
        let world = Ranks::new(2, LONG);
        let [first, second] = &world.ranks[..] else { unreachable!() };
        first.launch(first.main, kernel, grid, first.x, first.out);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| first.synchronize().unwrap_err());
            while first.rig.backend.lock().queue.parked().is_empty() {
                std::thread::yield_now();
            }
            second.sum();
            assert_lost(&second.synchronize().unwrap_err(), 1, cause);
            assert_lost(&waiter.join().unwrap(), 1, cause);
        });
        world.assert_lost(1, cause);
    }
}

#[test]
fn a_rank_whose_work_failed_before_a_collective_loses_its_world_and_keeps_its_own_error() {
    let failing: [fn(&Rank); 2] = [
        |rank| {
            rank.rig.fail_later(rank.main);
            rank.sum();
        },
        |rank| rank.launch(rank.main, &SUM, 1, DevicePtr::NULL, rank.out),
    ];
    for fail in failing {
        let world = Ranks::new(2, LONG);
        world.ranks[0].sum();
        fail(&world.ranks[1]);
        assert_lost(&world.ranks[0].synchronize().unwrap_err(), 1, "the null address");
        assert!(matches!(world.ranks[1].synchronize(), Err(Error::Memory { .. })));
        world.assert_lost(1, "the null address");
    }
}

#[test]
fn a_rank_whose_half_that_takes_failed_keeps_its_error_and_the_others_have_theirs() {
    let world = Ranks::new(2, LONG);
    let [first, second] = &world.ranks[..] else { unreachable!() };
    first.sum();
    second.launch(second.main, &SUM, 1, second.x, DevicePtr::NULL);
    first.synchronize().unwrap();
    assert!(matches!(second.synchronize(), Err(Error::Memory { .. })));
    world.ranks.iter().for_each(Rank::sum);
    assert_eq!(first.read(first.out).unwrap(), second.read(second.out).unwrap());
    assert!(world.lost.error().is_none());
}

#[test]
fn two_streams_of_a_rank_in_one_communicator_lose_the_world() {
    let world = Ranks::new(2, LONG);
    let rank = &world.ranks[0];
    let side = rank.rig.stream("side");
    rank.launch(rank.main, &SUM, 1, rank.x, rank.out);
    rank.launch(side, &SUM, 1, rank.x, rank.out);
    let cause = "it came to `sum` while it waits in `sum`: a communicator has one order";
    assert_lost(&rank.rig.backend.synchronize().unwrap_err(), 0, cause);
    world.assert_lost(0, cause);
}

#[test]
fn captured_collectives_meet_at_each_launch_and_mix_with_eager_ones() {
    let world = Ranks::new(2, LONG);
    let execs: Vec<_> = world.ranks.iter().map(Rank::capture_sum).collect();
    assert!(world.ranks.iter().all(|rank| rank.rig.control.num_pending() <= 1));
    for step in 0..4 {
        for (rank, exec) in world.ranks.iter().zip(&execs) {
            rank.upload(&[step as f32; LEN]);
            rank.rig.backend.launch_graph(*exec, rank.main).unwrap();
            rank.sum_back();
        }
        for rank in &world.ranks {
            assert_eq!(rank.read(rank.x).unwrap(), [(4.0 * step as f32).to_bits(); LEN]);
        }
    }
}

#[test]
fn the_place_of_a_world_that_is_gone_is_used_again() {
    let lost = Arc::default();
    let rig = Rig::new();
    let join = |collectives: &Arc<Collectives>| rig.backend.join(collectives, 0);
    let worlds: Vec<_> = (0..3).map(|_| Arc::new(Collectives::new(1, LONG, &lost))).collect();
    assert_eq!(worlds.iter().map(join).collect::<Vec<_>>(), [0, 1, 2].map(PlaneId));
    drop(worlds.into_iter().nth(1));
    for _ in 0..3 {
        assert_eq!(join(&Arc::new(Collectives::new(1, LONG, &lost))), PlaneId(0));
    }
}

#[test]
fn a_collective_of_a_world_that_is_gone_fails() {
    let Ranks { ranks, .. } = Ranks::new(2, LONG);
    ranks[0].sum();
    let error = ranks[0].synchronize().unwrap_err();
    assert_eq!(error.to_string(), "the world of `sum` is gone");
    ranks[0].assert_usable();
}

#[test]
fn a_device_in_two_worlds_waits_for_each_on_its_own() {
    let world = Ranks::new(2, LONG);
    let [first, second] = &world.ranks[..] else { unreachable!() };
    let lost = Arc::default();
    let other = Arc::new(Collectives::new(2, SHORT, &lost));
    let (plane, stream) = (first.rig.backend.join(&other, 0), first.rig.stream("side"));
    first.sum();
    let args = SumArgs { world: [3; SEGMENT_AT / 4 + 1], x: first.x, out: first.x };
    let launch = Launch { plane: Some(plane), ..Launch::new(&SUM, Dims::linear(1, 32), &args) };
    first.rig.backend.enqueue(stream, &Op::Launch(launch)).unwrap();
    assert_lost(&first.rig.backend.synchronize_stream(stream).unwrap_err(), 1, "did not come");
    assert!(world.lost.error().is_none() && lost.error().is_some());
    second.sum();
    assert_eq!(first.read(first.out).unwrap(), second.read(second.out).unwrap());
}
