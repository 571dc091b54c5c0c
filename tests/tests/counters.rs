//! What one step costs the host, pinned: driver calls, launches, nodes, patched nodes, bridged bytes, allocations.
//!
//! Time cannot be tested on a machine that others share, but what takes the time can be counted on the host device: a
//! change that makes a step dearer changes a number here, and has to say why. Each row is one step, warm, of one tiny
//! checkpoint: a prefill of two prompts, a mixed batch of two decodes and one prompt, and a decode.

use bcg_models::state::PageLease;
use bcg_models::{GraphMode, ModelRunner, ModelRunnerOptions, Phase, SamplingParams, SequenceInput};
use bcg_runtime::{Device, HostControl};
use bcg_tests::allocations::{CountingAllocator, num_allocations};
use bcg_tests::golden::{CHECKPOINTS, Checkpoint, load, options};

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// What a step costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cost {
    /// Calls of the driver until all is enqueued, those that cannot fail not counted.
    driver_calls: u64,
    /// Of these, launches of graphs.
    graph_launches: u64,
    /// Kernels that were launched one by one, outside graphs.
    launches: u64,
    /// Operations on the device: the nodes of graphs, and what was enqueued beside them.
    nodes: u64,
    /// Nodes of breaks' work that were patched.
    patched: u64,
    /// Bytes that a break returned elsewhere than at capture.
    bridged_bytes: u64,
    /// Host allocations until all is enqueued.
    allocations: u64,
}

impl Cost {
    fn of(numbers: [u64; 7]) -> Self {
        let [driver_calls, graph_launches, launches, nodes, patched, bridged_bytes, allocations] = numbers;
        Self { driver_calls, graph_launches, launches, nodes, patched, bridged_bytes, allocations }
    }
}

/// Rows of the prefills.
const SIZE: usize = 40;

/// Tokens that each sequence of a step holds already, and new ones.
type Batch = &'static [(usize, usize)];

/// A step and its cost.
type Pinned = ((Phase, Batch), [u64; 7]);

const PREFILL: (Phase, Batch) = (Phase::Prefill, &[(0, 17), (0, 23)]);
const MIXED: (Phase, Batch) = (Phase::Prefill, &[(10, 1), (5, 1), (0, 38)]);
const DECODE: (Phase, Batch) = (Phase::Decode, &[(10, 1), (5, 1), (7, 1), (30, 1)]);

/// The pinned costs, in the order of [`Cost`]'s fields.
const PINNED: [(Checkpoint, [Pinned; 3]); 4] = [
    (
        "tiny-qwen3",
        [(PREFILL, [9, 1, 7, 45, 0, 0, 1]), (MIXED, [9, 1, 11, 49, 0, 0, 1]), (DECODE, [10, 1, 4, 44, 0, 0, 1])],
    ),
    (
        "tiny-qwen3-moe",
        [(PREFILL, [9, 1, 7, 53, 0, 0, 1]), (MIXED, [9, 1, 11, 57, 0, 0, 1]), (DECODE, [10, 1, 4, 52, 0, 0, 1])],
    ),
    (
        "tiny-nemotron-h",
        [(PREFILL, [9, 1, 14, 49, 0, 0, 1]), (MIXED, [9, 1, 16, 51, 0, 0, 1]), (DECODE, [10, 1, 4, 48, 0, 0, 1])],
    ),
    (
        "tiny-deepseek-v3",
        [(PREFILL, [9, 1, 7, 72, 0, 0, 1]), (MIXED, [9, 1, 7, 72, 0, 0, 1]), (DECODE, [10, 1, 4, 75, 0, 0, 1])],
    ),
];

fn cost(runner: &mut ModelRunner, control: &HostControl, phase: Phase, batch: Batch) -> Cost {
    let pool = runner.pages().clone();
    let leases: Vec<PageLease> =
        batch.iter().map(|(past, new)| pool.lease(pool.pages_for(past + new)).expect("pages")).collect();
    let (tokens, greedy) = ([7; SIZE], SamplingParams::greedy());
    let inputs: Vec<_> = batch
        .iter()
        .zip(&leases)
        .map(|(&(past, new), lease)| {
            let input = SequenceInput::new(&tokens[..new], past, lease.pages(), &greedy);
            SequenceInput { state: lease.state(), ..input }
        })
        .collect();
    let patched = |runner: &ModelRunner| -> u64 {
        let graph = runner.describe(phase, if phase == Phase::Prefill { SIZE } else { batch.len() }).expect("a graph");
        graph.breaks.iter().map(|at| at.num_patched).sum()
    };
    let (mut last, mut least_allocations) = (None, u64::MAX);
    // The first step may merge an executable for its kind of work, and the next ones let buffers reach their sizes. The
    // emulated device's log of calls grows in between, so the step with the fewest allocations counts.
    for _ in 0..6 {
        // What lies before does not matter here.
        for (&(past, _), lease) in batch.iter().zip(&leases) {
            lease.state().into_iter().for_each(|state| state.assume(past));
        }
        runner.synchronize().expect("what ran before");
        assert_eq!(control.num_pending(), 0);
        let (calls, stats, patched_before) = (control.num_calls(), runner.runtime_stats(), patched(runner));
        let chained: u64 = runner.stats().chained.values().sum();
        let allocations = num_allocations();
        let pending = runner.launch(&inputs).expect("a step");
        least_allocations = least_allocations.min(num_allocations() - allocations);
        let (names, after) = (control.calls_since(calls), runner.runtime_stats());
        let is_healed = runner.stats().chained.values().sum::<u64>() == chained;
        last = Some((
            is_healed,
            Cost {
                driver_calls: names.len() as u64,
                graph_launches: names.iter().filter(|name| **name == "cuGraphLaunch").count() as u64,
                launches: (after.num_launches - stats.num_launches) as u64,
                nodes: control.num_pending() as u64,
                patched: patched(runner) - patched_before,
                bridged_bytes: (after.bridge_copied_bytes - stats.bridge_copied_bytes) as u64,
                allocations: least_allocations,
            },
        ));
        runner.collect(pending).expect("tokens");
    }
    let (is_healed, cost) = last.expect("steps ran");
    assert!(is_healed, "a warm {phase:?} of {batch:?} is one launch");
    cost
}

#[test]
fn a_warm_step_costs_what_it_did() {
    assert_eq!(PINNED.map(|(checkpoint, _)| checkpoint), CHECKPOINTS, "every family is pinned");
    let mut moved = Vec::new();
    for (checkpoint, steps) in PINNED {
        let device = Device::host();
        let control = device.host_control().expect("a host device");
        let graphs = ModelRunnerOptions {
            cuda_graph_sizes: Some(vec![SIZE]),
            cuda_graph_decode_sizes: Some(vec![4]),
            ..options(GraphMode::Ahead)
        };
        let mut runner = load(&device, checkpoint, graphs);
        for ((phase, batch), pinned) in steps {
            let (pinned, cost) = (Cost::of(pinned), cost(&mut runner, control, phase, batch));
            if cost != pinned {
                moved.push(format!("{checkpoint} {phase:?} of {batch:?}:\n  pinned {pinned:?}\n  now    {cost:?}"));
            }
        }
    }
    assert!(moved.is_empty(), "a step costs something else; pin it with the reason:\n{}", moved.join("\n"));
}
