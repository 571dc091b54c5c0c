//! Mamba2's mixer and the MLP beside it.

use anyhow::Result;
use bcg_kernels::{self as ops, CausalConv1d, SsmInputs, StateSlots};
use bcg_runtime::{DType, Tensor};

use super::KernelsArgs;
use super::attention::{DecodeShape, PrefillShape, as_i32};
use super::cases::{Case, Shapes, each};
use super::lab::Lab;

/// The geometry of a mixer.
#[derive(Clone, Copy)]
struct Mixer {
    heads: usize,
    head_dim: usize,
    groups: usize,
    state_size: usize,
    kernel: usize,
    dtype: DType,
}

impl Mixer {
    fn read(model: &Shapes) -> Result<Self> {
        Ok(Self {
            heads: model.count("mamba_num_heads")?,
            head_dim: model.count("mamba_head_dim")?,
            groups: model.count("n_groups")?,
            state_size: model.count("ssm_state_size")?,
            kernel: model.count("conv_kernel")?,
            dtype: model.config.dtype,
        })
    }

    fn inner(self) -> usize {
        self.heads * self.head_dim
    }

    fn group_width(self) -> usize {
        self.groups * self.state_size
    }

    fn channels(self) -> usize {
        self.inner() + 2 * self.group_width()
    }

    /// Elements of one state.
    fn state(self) -> usize {
        self.inner() * self.state_size
    }
}

/// Slots of sequences that begin, or that go on from a state.
fn slots(lab: &Lab, sequences: usize, has_past: bool) -> Result<StateSlots> {
    let slot = |index: usize| if has_past { index as i32 } else { -1 };
    Ok(StateSlots {
        read: lab.tensor(&(0..sequences).map(slot).collect::<Vec<_>>())?,
        write: lab.tensor(&(sequences as i32..2 * sequences as i32).collect::<Vec<_>>())?,
    })
}

/// The cases of a model with such layers.
pub(super) fn cases(model: &Shapes, args: &KernelsArgs) -> Result<Vec<Case>> {
    let mixer = Mixer::read(model)?;
    let (hidden, inner) = (model.config.hidden_size, model.count("intermediate_size")?);
    let mut cases = Vec::new();
    for &tokens in &args.tokens {
        let projected = 2 * mixer.inner() + 2 * mixer.group_width() + mixer.heads;
        cases.extend([
            model.projection("in_proj", [tokens, projected, hidden]),
            model.projection("out_proj", [tokens, hidden, mixer.inner()]),
            model.projection("up_proj", [tokens, inner, hidden]),
            model.projection("down_proj", [tokens, hidden, inner]),
            relu2(model, tokens, inner),
            gated_rms_norm(model, mixer, tokens),
        ]);
    }
    for &shape in args.prefill.iter().filter(|shape| shape.prefix == 0) {
        cases.extend([convolution(model, mixer, shape), scan(model, mixer, shape)]);
    }
    // A decode reads the state alone, however many tokens came before.
    let mut batches: Vec<usize> = args.decode.iter().map(|DecodeShape { sequences, .. }| *sequences).collect();
    batches.sort_unstable();
    batches.dedup();
    cases.extend(batches.into_iter().map(|sequences| update(model, mixer, sequences)));
    Ok(cases)
}

fn relu2(model: &Shapes, tokens: usize, inner: usize) -> Case {
    let dtype = model.config.dtype;
    let prepare = each(move |lab| {
        let x = lab.random(&[tokens, inner], dtype)?;
        Ok(Box::new(move |cx| Ok(vec![ops::relu2(cx, &x)?])))
    });
    model.case("relu2", format!("T={tokens}"), 2 * tokens * inner * model.size(), 0, prepare)
}

fn gated_rms_norm(model: &Shapes, mixer: Mixer, tokens: usize) -> Case {
    let (eps, width) = (model.config.rms_norm_eps, mixer.inner());
    let prepare = each(move |lab| {
        let (y, gate) = (lab.random(&[tokens, width], mixer.dtype)?, lab.random(&[tokens, width], mixer.dtype)?);
        let weight = lab.random(&[width], mixer.dtype)?;
        let group = width / mixer.groups;
        Ok(Box::new(move |cx| Ok(vec![ops::gated_rms_norm(cx, &y, &gate, &weight, group, eps)?])))
    });
    model.case("gated_rms_norm", format!("T={tokens}"), (3 * tokens + 1) * width * model.size(), 0, prepare)
}

fn starts(lab: &Lab, lens: &[usize]) -> Result<Tensor> {
    let starts: Vec<usize> = (0..=lens.len()).map(|end| lens[..end].iter().sum()).collect();
    lab.tensor(&as_i32(&starts))
}

fn convolution(model: &Shapes, mixer: Mixer, shape: PrefillShape) -> Case {
    let lens = shape.lens();
    let (tokens, sequences, channels) = (lens.iter().sum::<usize>(), lens.len(), mixer.channels());
    let bytes = (2 * tokens + sequences * (mixer.kernel - 1)) * channels * model.size();
    let prepare = each(move |lab| {
        let x = lab.random(&[tokens, channels], mixer.dtype)?;
        let (weight, bias) =
            (lab.random(&[channels, mixer.kernel], mixer.dtype)?, lab.random(&[channels], mixer.dtype)?);
        let state = lab.random(&[2 * sequences, channels, mixer.kernel - 1], mixer.dtype)?;
        let (slots, starts) = (slots(lab, sequences, false)?, starts(lab, &lens)?);
        Ok(Box::new(move |cx| {
            let input = CausalConv1d {
                x: &x,
                weight: &weight,
                bias: Some(&bias),
                state: &state,
                slots: &slots,
                cu_seqlens_q: Some(&starts),
            };
            Ok(vec![ops::causal_conv1d(cx, &input)?])
        }))
    });
    model.case("causal_conv1d", shape.to_string(), bytes, 0, prepare)
}

/// The inputs of a scan or an update, with buffers of their own.
struct Buffers {
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    slots: StateSlots,
}

impl Buffers {
    fn new(lab: &mut Lab, mixer: Mixer, rows: usize, sequences: usize, has_past: bool) -> Result<Self> {
        let mut random = |shape: &[usize]| lab.random(shape, mixer.dtype);
        let (x, dt) = (random(&[rows, mixer.inner()])?, random(&[rows, mixer.heads])?);
        let (b, c) = (random(&[rows, mixer.group_width()])?, random(&[rows, mixer.group_width()])?);
        let (a_log, d, dt_bias) = (random(&[mixer.heads])?, random(&[mixer.heads])?, random(&[mixer.heads])?);
        let shape = [2 * sequences, mixer.heads, mixer.head_dim, mixer.state_size];
        let (state, slots) = (lab.random(&shape, DType::F32)?, slots(lab, sequences, has_past)?);
        Ok(Self { x, b, c, dt, a_log, d, dt_bias, state, slots })
    }

    fn inputs(&self) -> SsmInputs<'_> {
        SsmInputs {
            x: &self.x,
            b: &self.b,
            c: &self.c,
            dt: &self.dt,
            a_log: &self.a_log,
            d: &self.d,
            dt_bias: &self.dt_bias,
            dt_limits: (0.0, f32::INFINITY),
            state: &self.state,
            slots: &self.slots,
        }
    }
}

/// Bytes of the rows of a scan or an update.
fn row_bytes(model: &Shapes, mixer: Mixer, rows: usize) -> usize {
    rows * (2 * mixer.inner() + 2 * mixer.group_width() + mixer.heads) * model.size()
}

fn scan(model: &Shapes, mixer: Mixer, shape: PrefillShape) -> Case {
    let lens = shape.lens();
    let (rows, sequences) = (lens.iter().sum::<usize>(), lens.len());
    let bytes = row_bytes(model, mixer, rows) + sequences * mixer.state() * size_of::<f32>();
    // Into the state and out of it, which no way to compute it can do without.
    let flops = 4 * rows * mixer.state();
    let prepare = each(move |lab| {
        let (buffers, starts) = (Buffers::new(lab, mixer, rows, sequences, false)?, starts(lab, &lens)?);
        Ok(Box::new(move |cx| Ok(vec![ops::ssd_scan(cx, &buffers.inputs(), &starts)?])))
    });
    model.case("ssd_scan", shape.to_string(), bytes, flops, prepare)
}

fn update(model: &Shapes, mixer: Mixer, sequences: usize) -> Case {
    let bytes = row_bytes(model, mixer, sequences) + 2 * sequences * mixer.state() * size_of::<f32>();
    let prepare = each(move |lab| {
        let buffers = Buffers::new(lab, mixer, sequences, sequences, true)?;
        Ok(Box::new(move |cx| Ok(vec![ops::ssm_update(cx, &buffers.inputs())?])))
    });
    model.case("ssm_update", format!("B={sequences}"), bytes, 0, prepare)
}
