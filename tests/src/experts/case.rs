//! A layer with made-up numbers, and what plain arithmetic makes of it.

use bcg_runtime::{DType, Device, Result, Tensor};
use half::{bf16, f16};

/// Who the tokens' experts belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spread {
    /// Any experts.
    Random,
    /// Those of one rank alone, or as many of them as it has.
    OneRank(usize),
}

/// The sizes of a layer and of its batch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) tokens: usize,
    pub(super) columns: usize,
    pub(super) inner: usize,
    pub(super) num_experts: usize,
    pub(super) chosen: usize,
    pub(super) dtype: DType,
    pub(super) has_shared: bool,
}

/// A batch: its valid rows, and how these choose.
#[derive(Clone, Copy, Debug)]
pub(super) struct Batch {
    pub(super) valid: usize,
    pub(super) spread: Spread,
    pub(super) seed: usize,
}

/// A number in -1..1 that depends on where it stands.
fn number(seed: usize, at: usize) -> f32 {
    let mut z = ((at as u64) << 20 | seed as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

fn round(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::Bf16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

impl Case {
    fn x(&self, t: usize, c: usize) -> f32 {
        round(self.dtype, number(1, t * self.columns + c))
    }

    /// Row n of the gate (n below I) or up matrix of an expert.
    fn gate_up(&self, expert: usize, n: usize, c: usize) -> f32 {
        let scale = 2.0 / (self.columns as f32).sqrt();
        round(self.dtype, scale * number(2, (expert * 2 * self.inner + n) * self.columns + c))
    }

    fn down(&self, expert: usize, n: usize, i: usize) -> f32 {
        let scale = 2.0 / (self.inner as f32).sqrt();
        round(self.dtype, scale * number(3, (expert * self.columns + n) * self.inner + i))
    }

    /// A rank's part of what the shared experts make of a row.
    fn shared_of(&self, rank: usize, t: usize, c: usize) -> f32 {
        round(self.dtype, number(4 + 16 * rank, t * self.columns + c))
    }

    /// The logits of a batch, `[T, E]`; NaN in padded rows.
    pub(super) fn logits(&self, batch: Batch, num_ranks: usize) -> Vec<f32> {
        let of_rank = self.num_experts / num_ranks;
        let logit = |at: usize| {
            let (t, expert) = (at / self.num_experts, at % self.num_experts);
            let bonus = match batch.spread {
                Spread::OneRank(rank) if expert / of_rank == rank => 4.0,
                _ => 0.0,
            };
            if t < batch.valid { number(5 + 16 * batch.seed, at) + bonus } else { f32::NAN }
        };
        (0..self.tokens * self.num_experts).map(logit).collect()
    }

    /// What a layer makes of row `t`, computed in f64, with the sum of the sizes of what is added up.
    pub(super) fn expected(&self, batch: Batch, num_ranks: usize, t: usize) -> Vec<(f64, f64)> {
        let logits = self.logits(batch, num_ranks);
        let logits = &logits[t * self.num_experts..][..self.num_experts];
        let mut experts: Vec<usize> = (0..self.num_experts).collect();
        experts.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        experts.truncate(self.chosen);
        let mass: f64 = experts.iter().map(|expert| f64::from(logits[*expert]).exp()).sum();
        let mut sums = vec![(0.0, 0.0); self.columns];
        for expert in experts {
            let weight = f64::from(logits[expert]).exp() / mass;
            let product = |n: usize| -> f64 {
                (0..self.columns).map(|c| f64::from(self.x(t, c)) * f64::from(self.gate_up(expert, n, c))).sum()
            };
            let gated: Vec<f64> = (0..self.inner)
                .map(|i| (product(i), product(self.inner + i)))
                .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
                .collect();
            for (n, (sum, size)) in sums.iter_mut().enumerate() {
                for (i, gated) in gated.iter().enumerate() {
                    let term = weight * gated * f64::from(self.down(expert, n, i));
                    (*sum, *size) = (*sum + term, *size + term.abs());
                }
            }
        }
        if self.has_shared {
            for (c, (sum, size)) in sums.iter_mut().enumerate() {
                for rank in 0..num_ranks {
                    let value = f64::from(self.shared_of(rank, t, c));
                    (*sum, *size) = (*sum + value, *size + value.abs());
                }
            }
        }
        sums
    }
}

/// What a rank keeps of a case.
#[derive(Clone, Debug)]
pub(super) struct Inputs {
    pub(super) x: Tensor,
    pub(super) logits: Tensor,
    pub(super) num_valid: Tensor,
    pub(super) gate_up: Tensor,
    pub(super) down: Tensor,
    pub(super) shared: Option<Tensor>,
}

impl Inputs {
    pub(super) fn new(device: &Device, case: &Case, rank: usize, num_ranks: usize) -> Result<Self> {
        let tensor = |shape: &[usize], value: &dyn Fn(usize) -> f32| -> Result<Tensor> {
            let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
            match case.dtype {
                DType::Bf16 => device.tensor(shape, &values.iter().map(|v| bf16::from_f32(*v)).collect::<Vec<_>>()),
                DType::F16 => device.tensor(shape, &values.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>()),
                _ => device.tensor(shape, &values),
            }
        };
        let (rows, columns, inner) = (case.tokens, case.columns, case.inner);
        let (own, first) = (case.num_experts / num_ranks, rank * case.num_experts / num_ranks);
        let shared = |at: usize| case.shared_of(rank, at / columns, at % columns);
        Ok(Self {
            x: tensor(&[rows, columns], &|at| case.x(at / columns, at % columns))?,
            logits: device.zeros(&[rows, case.num_experts], DType::F32)?,
            num_valid: device.zeros(&[1], DType::I32)?,
            gate_up: tensor(&[own, 2 * inner, columns], &|at| {
                let row = at / columns;
                case.gate_up(first + row / (2 * inner), row % (2 * inner), at % columns)
            })?,
            down: tensor(&[own, columns, inner], &|at| {
                let row = at / inner;
                case.down(first + row / columns, row % columns, at % inner)
            })?,
            shared: case.has_shared.then(|| tensor(&[rows, columns], &shared)).transpose()?,
        })
    }
}
