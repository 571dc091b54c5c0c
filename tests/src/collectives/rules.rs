//! What holds for collectives on any device.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use bcg_runtime::{CommunicatorOptions, Context, DType, Error, RankThreads, Tensor, World};

use super::call::{Call, Op};
use super::lane::{FLOATS, INPUTS, Lane};

/// How much is checked.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// The elements of an input, at most.
    pub elements: usize,
    /// How many small calls of all kinds are made in a random order.
    pub calls: usize,
    /// How long a rank dawdles, at most, before it comes to some of these.
    pub max_delay: Duration,
    /// Whether sums are made of what was gathered.
    pub gathered: bool,
}

/// Rows and columns: one of either, none, widths of no whole 16 bytes, rows wider than the registers of a block, more rows than
/// blocks, more bytes than a small plane holds.
const SHAPES: [(usize, usize); 10] =
    [(1, 1), (0, 128), (3, 128), (5, 100), (2, 4097), (300, 32), (1, 20_003), (16, 6144), (138, 6144), (300, 6144)];

/// Columns beside each row: none, whole 16 bytes, and others.
const GAPS: [(usize, usize); 3] = [(0, 0), (8, 16), (3, 5)];

/// Calls of one forward of the random ones.
const CALLS_OF_FORWARD: usize = 8;

fn ops(num_ranks: usize) -> Vec<Op> {
    vec![
        Op::AllReduce,
        Op::AllReduceAddRmsNorm,
        Op::AllGatherColumns,
        Op::AllGatherRows,
        Op::AllToAll,
        Op::ReduceScatterRows,
        Op::Broadcast { root: num_ranks - 1 },
        Op::SendReceive { to_offset: 1 },
    ]
}

/// Every collective, of every dtype and shape, eagerly and in graphs, alone and among others, returns in bits what plain sums
/// in the order of the ranks are; and the same on all ranks where all get the same. Returns how many results were checked.
///
/// # Errors
/// The first that does not, or the first error of a rank.
pub fn collectives_match_plain_sums(world: &World, size: Size) -> Result<usize> {
    let num_ranks = world.size();
    let mut options = CommunicatorOptions::default();
    options.plane_bytes = 2 << 20;
    options.first_epoch = u32::MAX - 3;
    options.sums_gathered = size.gathered;
    let mut ranks = RankThreads::start(world, Lane::all(world, options, size.elements)?)?;
    let mut num_checked = 0;
    for (at, (rows, columns)) in SHAPES.into_iter().enumerate() {
        for op in ops(num_ranks) {
            let rows = if Call::divides_rows(op) { rows * num_ranks } else { rows };
            for (dtype, gaps) in FLOATS.into_iter().flat_map(|dtype| GAPS.map(|gaps| (dtype, gaps))) {
                let call = Call { op, dtype, input: at % INPUTS, rows, columns, gaps };
                if call.elements() <= size.elements {
                    num_checked += run(&mut ranks, &[call], false)?;
                }
            }
        }
    }
    num_checked += random_calls(&mut ranks, size)?;
    num_checked += captured_calls(&mut ranks, size)?;
    Ok(num_checked)
}

/// Calls of small shapes in a random order.
struct Calls {
    rng: u64,
    num_ranks: usize,
    elements: usize,
}

impl Calls {
    fn below(&mut self, bound: usize) -> usize {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.rng >> 33) as usize % bound
    }

    fn next(&mut self) -> Call {
        let op = ops(self.num_ranks)[self.below(8)];
        let op = match op {
            Op::Broadcast { .. } => Op::Broadcast { root: self.below(self.num_ranks) },
            Op::SendReceive { .. } => Op::SendReceive { to_offset: self.below(2 * self.num_ranks) },
            op => op,
        };
        let columns = [1, 8, 100, 256, 1024, 6144][self.below(6)];
        let rows = 1 + self.below(1 + 4096 / columns.max(256));
        let rows = if Call::divides_rows(op) { rows * self.num_ranks } else { rows };
        let call = Call {
            op,
            dtype: FLOATS[self.below(3)],
            input: self.below(INPUTS),
            rows,
            columns,
            gaps: GAPS[self.below(3)],
        };
        if call.elements() <= self.elements { call } else { Call { rows: self.num_ranks, columns: 8, ..call } }
    }

    fn forward(&mut self) -> Vec<Call> {
        (0..CALLS_OF_FORWARD).map(|_| self.next()).collect()
    }
}

fn random_calls(ranks: &mut RankThreads<Lane>, size: Size) -> Result<usize> {
    let mut calls = Calls { rng: 7, num_ranks: ranks.world().size(), elements: size.elements };
    let mut num_checked = 0;
    while num_checked < size.calls {
        let forward = calls.forward();
        let max_delay = size.max_delay;
        ranks.run(move |lane| {
            let delay = lane.random(1 + max_delay.as_micros() as u64);
            if lane.random(4) == 0 {
                std::thread::sleep(Duration::from_micros(delay));
            }
            Ok(())
        })?;
        num_checked += run(ranks, &forward, num_checked % 64 == 0)?;
    }
    Ok(num_checked)
}

/// Runs calls eagerly on all ranks, and checks what they return.
fn run(ranks: &mut RankThreads<Lane>, calls: &[Call], dawdles: bool) -> Result<usize> {
    let made = calls.to_vec();
    let values = ranks
        .run(move |lane: &mut Lane| {
            if dawdles {
                let delay = lane.random(2000);
                std::thread::sleep(Duration::from_micros(delay));
            }
            let inputs = lane.inputs();
            let outputs = lane.runner.eager(&(), |cx| forward(cx, &made, &inputs))?;
            lane.check(&made, &outputs)
        })
        .with_context(|| format!("{calls:?}"))?;
    check_replicas(calls, &values)?;
    Ok(calls.len())
}

fn forward(cx: &mut Context<'_, ()>, calls: &[Call], inputs: &super::lane::Inputs) -> bcg_runtime::Result<Vec<Tensor>> {
    let mut outputs = Vec::new();
    for call in calls {
        outputs.extend(call.run(cx, inputs)?);
    }
    Ok(outputs)
}

/// Captures forwards of random calls, and replays each many times, with eager forwards between.
fn captured_calls(ranks: &mut RankThreads<Lane>, size: Size) -> Result<usize> {
    let mut calls = Calls { rng: 11, num_ranks: ranks.world().size(), elements: size.elements };
    let (num_graphs, num_replays) = (4, (size.calls / 400).max(3));
    let mut num_checked = 0;
    for _ in 0..num_graphs {
        let captured = calls.forward();
        num_checked += run(ranks, &captured, false)?; // loads the kernels
        let made = captured.clone();
        ranks.run(move |lane: &mut Lane| {
            let (inputs, made) = (lane.inputs(), made.clone());
            lane.graph.capture_ahead(&mut lane.runner, &(), move |cx| forward(cx, &made, &inputs))
        })?;
        for replay in 0..num_replays {
            let made = captured.clone();
            let values = ranks
                .run(move |lane: &mut Lane| {
                    let outputs = lane.graph.replay(&mut lane.runner, &())?;
                    lane.check(&made, &outputs)
                })
                .with_context(|| format!("replay {replay} of {captured:?}"))?;
            check_replicas(&captured, &values)?;
            num_checked += captured.len();
            if replay % 8 == 0 {
                num_checked += run(ranks, &calls.forward(), false)?;
            }
        }
    }
    Ok(num_checked)
}

/// Checks that all ranks have the same bits where all have the same values.
fn check_replicas(calls: &[Call], values: &[Vec<Vec<f32>>]) -> Result<()> {
    let mut at = 0;
    for call in calls {
        for output in at..at + call.num_outputs() {
            let bits = |rank: usize| values[rank][output].iter().map(|value| value.to_bits());
            let is_same = (1..values.len()).all(|rank| bits(0).eq(bits(rank)));
            ensure!(!call.is_replicated() || is_same, "{call:?}: the ranks have other bits in output {output}");
        }
        at += call.num_outputs();
    }
    Ok(())
}

/// If one rank does not come, all ranks get an error that names it, within twice the world's timeout. Returns how long that
/// took.
///
/// # Errors
/// If a rank gets no such error, or too late.
pub fn a_rank_that_does_not_come_is_lost(world: &World) -> Result<Duration> {
    let missing = world.size() - 1;
    let mut ranks = RankThreads::start(world, Lane::all(world, CommunicatorOptions::default(), 1 << 12)?)?;
    let call = Call { op: Op::AllReduce, dtype: DType::Bf16, input: 0, rows: 4, columns: 256, gaps: (0, 0) };
    run(&mut ranks, &[call], false)?;
    let begun = Instant::now();
    let errors = ranks.run(move |lane: &mut Lane| {
        let inputs = lane.inputs();
        if lane.runner.rank() == missing {
            std::thread::sleep(Duration::from_millis(1500));
        }
        // Later calls, which find the world lost on the device before the host knows it, leave as well.
        let calls = [call; 3];
        let outputs = lane.runner.eager(&(), |cx| forward(cx, &calls, &inputs));
        let result = outputs.and_then(|_| lane.runner.synchronize());
        Ok((result.err(), begun.elapsed()))
    })?;
    let mut took = Duration::ZERO;
    for (rank, (error, after)) in errors.into_iter().enumerate() {
        let is_named =
            matches!(error.as_ref().map(Error::root), Some(Error::RankLost { rank, .. }) if *rank == missing);
        ensure!(is_named, "rank {rank} was told {error:?}, not that rank {missing} is lost");
        ensure!(after < Duration::from_secs(2), "rank {rank} was told after {after:?}");
        took = took.max(after);
    }
    Ok(took)
}
