//! One rank: its runner, and inputs whose values all ranks know. They are made before any collective runs, since memory that
//! is allocated meanwhile would wait for a kernel that waits for this rank (law L14).

use std::sync::Arc;

use bcg_runtime::{
    BreakableCudaGraph, CommunicatorOptions, DType, Device, Element, Result, Runner, RunnerOptions, Tensor, World,
};
use half::{bf16, f16};

use super::call::Call;

pub(super) const FLOATS: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

/// Inputs of each dtype. The first holds plain numbers; the others, here and there, zeros of both signs, infinities and NaN.
pub(super) const INPUTS: usize = 3;

/// What every rank holds in each input, by dtype, input and rank.
#[derive(Debug)]
pub(super) struct Known {
    values: Vec<Vec<f32>>,
    num_ranks: usize,
}

impl Known {
    pub(super) fn new(num_ranks: usize, elements: usize) -> Self {
        let mut values = Vec::new();
        for dtype in FLOATS {
            for input in 0..INPUTS {
                for rank in 0..num_ranks {
                    let numbers = (0..elements).map(|at| number(dtype, input, rank, at));
                    values.push(numbers.collect());
                }
            }
        }
        Self { values, num_ranks }
    }

    pub(super) fn of(&self, dtype: DType, input: usize, rank: usize) -> &[f32] {
        let of_dtype = FLOATS.iter().position(|known| *known == dtype).expect("a float dtype");
        &self.values[(of_dtype * INPUTS + input) * self.num_ranks + rank]
    }

    pub(super) fn num_ranks(&self) -> usize {
        self.num_ranks
    }
}

/// A number that depends on where it stands, as its dtype holds it.
fn number(dtype: DType, input: usize, rank: usize, at: usize) -> f32 {
    let mut z = ((at as u64) << 8 | (input as u64) << 4 | rank as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^= z >> 31;
    let plain = (z >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
    let special = match (input, at % 59) {
        (0, _) => None,
        (_, 0) => Some(-0.0), // on all ranks: the sum is −0.0
        (_, 1) => [None, Some(0.0), Some(-0.0), Some(f32::INFINITY)][z as usize % 4],
        (_, 2) => [None, Some(f32::NEG_INFINITY), Some(f32::INFINITY), Some(f32::NAN)][z as usize % 4],
        // Neighbours, so that whole words are ones: what stands for "not yet written".
        (_, 4..=9) => (rank == at / 59 % 4).then(|| f32::from_bits(u32::MAX)),
        _ => None,
    };
    round(dtype, special.unwrap_or(plain))
}

/// The value that `dtype` holds for `value`, of one that is a NaN of all ones too.
pub(super) fn round(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::Bf16 => to_bf16(value).to_f32(),
        DType::F16 => to_f16(value).to_f32(),
        _ => value,
    }
}

fn to_bf16(value: f32) -> bf16 {
    if value.to_bits() == u32::MAX { bf16::from_bits(u16::MAX) } else { bf16::from_f32(value) }
}

fn to_f16(value: f32) -> f16 {
    // Of a NaN the upper bits stay, so those of all ones are found again.
    if value.is_nan() && value.to_bits() >= 0xffff_e000 { f16::from_bits(u16::MAX) } else { f16::from_f32(value) }
}

/// One rank's part.
pub(super) struct Lane {
    pub(super) runner: Runner,
    pub(super) known: Arc<Known>,
    pub(super) graph: BreakableCudaGraph<(), Vec<Tensor>>,
    inputs: Vec<Tensor>,
    rng: u64,
}

impl Lane {
    /// Makes the lanes of all ranks of this process.
    pub(super) fn all(world: &World, options: CommunicatorOptions, elements: usize) -> Result<Vec<Self>> {
        let known = Arc::new(Known::new(world.size(), elements));
        let of_rank = |local| inputs(world.device(local), &known, world.first_rank() + local);
        let inputs: Vec<_> = (0..world.num_local()).map(of_rank).collect::<Result<_>>()?;
        let mut lanes = Vec::new();
        for (communicator, inputs) in world.communicators(options)?.into_iter().zip(inputs) {
            let rng = communicator.rank() as u64 + 1;
            let mut runner_options = RunnerOptions::default();
            runner_options.arena_bytes = elements * 4 * (4 + world.size());
            runner_options.poison = true;
            let runner = Runner::in_world(communicator, runner_options)?;
            let (known, graph) = (Arc::clone(&known), BreakableCudaGraph::new("collectives"));
            lanes.push(Self { runner, known, graph, inputs, rng });
        }
        Ok(lanes)
    }

    /// A number below `bound`, of this rank alone.
    pub(super) fn random(&mut self, bound: u64) -> u64 {
        self.rng = self.rng.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.rng >> 33) % bound
    }

    /// The inputs, by dtype.
    pub(super) fn inputs(&self) -> Inputs {
        Inputs(self.inputs.clone())
    }

    /// Checks what calls returned, and returns it as f32.
    pub(super) fn check(&mut self, calls: &[Call], outputs: &[Tensor]) -> Result<Vec<Vec<f32>>> {
        let mut values = Vec::with_capacity(outputs.len());
        for output in outputs {
            values.push(match output.dtype() {
                DType::Bf16 => self.runner.read::<bf16>(output)?.iter().map(|value| value.to_f32()).collect(),
                DType::F16 => self.runner.read::<f16>(output)?.iter().map(|value| value.to_f32()).collect(),
                _ => self.runner.read::<f32>(output)?,
            });
        }
        let mut rest = &values[..];
        for call in calls {
            let (own, others) = rest.split_at(call.num_outputs());
            call.check(&self.known, self.runner.rank(), own)?;
            rest = others;
        }
        Ok(values)
    }
}

/// The inputs of a rank.
#[derive(Clone, Debug)]
pub(super) struct Inputs(Vec<Tensor>);

impl Inputs {
    pub(super) fn of(&self, dtype: DType, input: usize) -> &Tensor {
        let of_dtype = FLOATS.iter().position(|known| *known == dtype).expect("a float dtype");
        &self.0[of_dtype * INPUTS + input]
    }
}

fn inputs(device: &Device, known: &Known, rank: usize) -> Result<Vec<Tensor>> {
    fn tensor<T: Element>(device: &Device, values: &[f32], convert: impl Fn(f32) -> T) -> Result<Tensor> {
        let data: Vec<T> = values.iter().map(|value| convert(*value)).collect();
        device.tensor(&[data.len()], &data)
    }
    let mut inputs = Vec::new();
    for dtype in FLOATS {
        for input in 0..INPUTS {
            let values = known.of(dtype, input, rank);
            inputs.push(match dtype {
                DType::Bf16 => tensor(device, values, |value| bf16::from_bits((value.to_bits() >> 16) as u16))?,
                DType::F16 => tensor(device, values, to_f16)?,
                _ => tensor(device, values, |value| value)?,
            });
        }
    }
    Ok(inputs)
}
