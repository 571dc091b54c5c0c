//! What steps do to the states of state-space layers.

use std::collections::BTreeSet;

use bcg_models::state::PageLease;
use bcg_models::{GraphMode, ModelRunner, ModelRunnerOptions, SamplingParams, SequenceInput};
use bcg_runtime::{DType, Device, DeviceKind, Tensor};
use half::bf16;

use super::checkpoint::{input, reference, tokens_of};
use super::{Checkpoint, load, options};

/// The steps of some sequences: each entry names a sequence and how many new tokens it gets. Ragged prefills with
/// continued states and chunks shorter than the convolution, decodes, padded and not.
const STEPS: &[&[(usize, usize)]] = &[
    &[(0, 20)],
    &[(1, 9), (0, 3), (2, 1)],
    &[(0, 1), (2, 1)],
    &[(2, 2), (3, 17)],
    &[(3, 1), (1, 1), (0, 1), (2, 1)],
    &[(1, 1)],
    &[(0, 13), (1, 1), (2, 1), (3, 2)],
    &[(3, 1), (0, 1), (2, 1)],
];

/// The bits of every state tensor: by tensor, then by slot.
type States = Vec<Vec<Vec<u32>>>;

fn bits(device: &Device, tensor: &Tensor) -> Vec<u32> {
    let error = "the states are read";
    match tensor.dtype() {
        DType::F32 => device.read::<f32>(tensor).expect(error).into_iter().map(f32::to_bits).collect(),
        _ => device.read::<bf16>(tensor).expect(error).into_iter().map(|v| v.to_f32().to_bits()).collect(),
    }
}

fn states(runner: &mut ModelRunner) -> States {
    runner.synchronize().expect("the step ends");
    let tensors = runner.states().layers().iter().flat_map(|layer| [&layer.conv, &layer.ssm]);
    let by_slot = |tensor: &Tensor| {
        let bits = bits(runner.device(), tensor);
        bits.chunks(bits.len() / tensor.dim(0)).map(<[u32]>::to_vec).collect()
    };
    tensors.map(by_slot).collect()
}

/// Runs the steps; after each, exactly the slots that its sequences write have changed, in every layer, and hold numbers.
/// Returns the slots of all layers after each step.
fn run_steps(device: &Device, checkpoint: Checkpoint, options: ModelRunnerOptions) -> Vec<States> {
    let what = format!("{options:?}");
    let mut runner = load(device, checkpoint, options);
    let mut before = states(&mut runner);
    let is_zero = |states: &States| states.iter().flatten().flatten().all(|bits| *bits == 0);
    assert!(is_zero(&before), "neither warm-up nor captures keep a state: {what}");
    let tokens: Vec<Vec<u32>> = reference(checkpoint).iter().map(tokens_of).map(|tokens| tokens.repeat(3)).collect();
    let (pool, greedy) = (runner.pages().clone(), SamplingParams::greedy());
    let leases: Vec<PageLease> = (0..4).map(|_| pool.lease(pool.pages_for(64)).expect("pages")).collect();
    let mut computed = [0; 4];
    let mut all = vec![];
    for step in STEPS {
        let batch: Vec<SequenceInput<'_>> = step
            .iter()
            .map(|&(b, new)| input(&tokens[b][computed[b]..computed[b] + new], computed[b], &leases[b], &greedy))
            .collect();
        let slot = |&(b, _): &(usize, usize)| leases[b].state().expect("a state").slots(computed[b]).1 as usize;
        let written: BTreeSet<usize> = step.iter().map(slot).collect();
        runner.step(&batch).expect("a step");
        let after = states(&mut runner);
        for (index, (before, after)) in before.iter().zip(&after).enumerate() {
            let changed: BTreeSet<usize> = (0..after.len()).filter(|slot| after[*slot] != before[*slot]).collect();
            assert_eq!(changed, written, "tensor {index}, step {step:?}: {what}");
            let values = after.iter().flatten().map(|bits| f32::from_bits(*bits));
            assert!(values.into_iter().all(f32::is_finite), "tensor {index}, step {step:?}: {what}");
        }
        step.iter().for_each(|&(b, new)| computed[b] += new);
        before = after;
        all.push(before.clone());
    }
    all
}

/// However a forward runs (eagerly, as a capture, healed, as a chain, verified, with NaN in padded rows), it changes exactly
/// the slots that its sequences write, and leaves the same states. A model without states keeps none.
pub fn a_step_writes_the_states_of_its_sequences_only(device: &Device, checkpoint: Checkpoint) {
    let runner = load(device, checkpoint, options(GraphMode::Off));
    if runner.states().layers().is_empty() {
        assert_eq!(runner.states().size_bytes(), 0);
        return;
    }
    drop(runner);
    // Sizes above those of the steps, so that rows are padded.
    let sizes = |graph| ModelRunnerOptions { cuda_graph_sizes: Some(vec![3, 16, 24]), ..options(graph) };
    let decodes = |graph| ModelRunnerOptions { cuda_graph_decode_sizes: Some(vec![1, 4]), ..sizes(graph) };
    let eager = run_steps(device, checkpoint, options(GraphMode::Off));
    for options in [
        decodes(GraphMode::Ahead),
        decodes(GraphMode::Lazy),
        ModelRunnerOptions { debug_cuda_graph: true, ..decodes(GraphMode::Ahead) },
        ModelRunnerOptions { poison_graph_memory: true, verify_graph: Some(1), ..decodes(GraphMode::Ahead) },
    ] {
        let got = run_steps(device, checkpoint, options.clone());
        // On CUDA another number of rows may be summed in another order.
        if device.kind() == DeviceKind::Host {
            assert!(got == eager, "{options:?}");
        }
    }
}
