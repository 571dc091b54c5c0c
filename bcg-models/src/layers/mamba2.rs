//! The Mamba2 mixer: a causal convolution and a state-space recurrence between two projections.
//!
//! The projections are captured. What lies between them, [`Core`], depends on where the sequences of a batch begin and
//! where their states lie: in a prefill it is one break, in a decode it is captured too, since both lie in static
//! buffers.

use std::sync::Arc;

use bcg_kernels::{self as ops, CausalConv1d, SsmInputs, StateSlots};
use bcg_runtime::{Context, DType, Eager, OpStream, Result, Tensor, eager_on_graph};
use serde_json::Value;

use super::Linear;
use crate::batch::{ForwardBatch, TokenInputs};
use crate::config::{Fields, ModelConfig};
use crate::state::{LayerState, StateLayout};
use crate::weights::{Divided, Part, Section, Shard, Split, Weights};

/// The sizes of a mixer, and how it computes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mamba2Config {
    /// Heads, H.
    pub heads: usize,
    /// Dimensions of each head, P.
    pub head_dim: usize,
    /// Groups of heads that share B and C; their number is G.
    pub groups: usize,
    /// Numbers of the state for each dimension of a head, N.
    pub state_size: usize,
    /// Inputs that the convolution looks at, the newest included, K.
    pub conv_kernel: usize,
    /// Whether the convolution has a bias.
    pub use_conv_bias: bool,
    /// The least and the largest time step.
    pub time_step_limit: (f32, f32),
    /// The element type of states between steps.
    pub ssm_dtype: DType,
}

/// The kernels of the convolution and of the scan.
const CONV_KERNELS: std::ops::RangeInclusive<usize> = 2..=4;
const STATE_SIZE_MAX: usize = 256;

impl Mamba2Config {
    /// Reads the fields of a mixer, and refuses what [`Mamba2`] does not compute.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read(fields: &Fields) -> crate::Result<Self> {
        fields.refuse_other("mamba_hidden_act", "silu", "no other activation is implemented")?;
        for field in ["mamba_proj_bias", "use_bias"] {
            fields.refuse_flag(field, "biased projections are not implemented")?;
        }
        let read = Self {
            heads: fields.count("mamba_num_heads")?,
            head_dim: fields.count("mamba_head_dim")?,
            groups: fields.count("n_groups")?,
            state_size: fields.count("ssm_state_size")?,
            conv_kernel: fields.count("conv_kernel")?,
            use_conv_bias: fields.get("use_conv_bias").is_none() || fields.flag("use_conv_bias")?,
            time_step_limit: time_step_limit(fields)?,
            ssm_dtype: ssm_dtype(fields)?,
        };
        if !read.heads.is_multiple_of(read.groups) {
            let expected = format!("a divisor of mamba_num_heads = {}", read.heads);
            return Err(fields.error("n_groups", expected, read.groups, "check the checkpoint's conversion"));
        }
        if !CONV_KERNELS.contains(&read.conv_kernel) {
            return Err(fields.error("conv_kernel", "2 to 4", read.conv_kernel, "no other kernel is implemented"));
        }
        if read.state_size > STATE_SIZE_MAX {
            let expected = format!("at most {STATE_SIZE_MAX}");
            return Err(fields.error("ssm_state_size", expected, read.state_size, "the scan keeps no larger state"));
        }
        Ok(read)
    }

    /// What ranks divide of a mixer. A group stays on one rank, because the norm behind the scan is one of each group.
    pub fn divided(&self) -> [Divided; 2] {
        [Divided::new("mamba_num_heads", self.heads), Divided::new("n_groups", self.groups)]
    }

    /// The heads and the groups that one rank has.
    pub fn share(self, shard: Shard) -> Self {
        Self { heads: shard.share(self.heads), groups: shard.share(self.groups), ..self }
    }

    /// What `layers` mixers keep of a sequence.
    pub fn state_layout(&self, layers: usize) -> StateLayout {
        StateLayout {
            layers,
            conv: [self.channels(), self.conv_kernel - 1],
            ssm: [self.heads, self.head_dim, self.state_size],
            ssm_dtype: self.ssm_dtype,
        }
    }

    /// The width of x, `H P`.
    fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The width of B, and of C, `G N`.
    fn shared(&self) -> usize {
        self.groups * self.state_size
    }

    /// Channels of the convolution: x, B and C.
    fn channels(&self) -> usize {
        self.inner() + 2 * self.shared()
    }
}

/// `time_step_limit`: two numbers, of which infinity may be written as transformers 5 does; without it, no limits.
fn time_step_limit(fields: &Fields) -> crate::Result<(f32, f32)> {
    let Some(value) = fields.get("time_step_limit") else { return Ok((0.0, f32::INFINITY)) };
    let number = |value: &Value| match value.get("__float__").and_then(Value::as_str) {
        Some("Infinity") => Some(f32::INFINITY),
        _ => value.as_f64().map(|number| number as f32),
    };
    match value.as_array().map(|limits| limits.iter().map(number).collect::<Vec<_>>()).as_deref() {
        Some(&[Some(least), Some(most)]) if 0.0 <= least && least <= most => Ok((least, most)),
        _ => {
            let expected = "two numbers from 0 on, the second not below the first";
            Err(fields.error("time_step_limit", expected, value, "check the checkpoint's conversion"))
        }
    }
}

/// `mamba_ssm_cache_dtype`; f32 without it.
fn ssm_dtype(fields: &Fields) -> crate::Result<DType> {
    let Some(value) = fields.get("mamba_ssm_cache_dtype") else { return Ok(DType::F32) };
    match value.as_str() {
        Some("float32") => Ok(DType::F32),
        Some("bfloat16") => Ok(DType::Bf16),
        _ => {
            let expected = "\"float32\" or \"bfloat16\"";
            Err(fields.error("mamba_ssm_cache_dtype", expected, value, "no other state is implemented"))
        }
    }
}

/// One layer's mixer.
#[derive(Debug)]
pub struct Mamba2 {
    in_proj: Linear,
    core: Arc<Core>,
    out_proj: Linear,
}

/// What lies between the projections.
#[derive(Debug)]
struct Core {
    /// `[channels, K]`.
    conv1d_weight: Tensor,
    /// `[channels]`.
    conv1d_bias: Option<Tensor>,
    /// `[H]`, as the next two.
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    /// `[H P]`.
    norm_weight: Tensor,
    eps: f32,
    /// Of this rank.
    config: Mamba2Config,
}

impl Mamba2 {
    /// Takes `in_proj`, `conv1d`, `A_log`, `D`, `dt_bias`, `norm` and `out_proj` under `name`.
    ///
    /// # Errors
    /// Those of [`Mamba2Config::read`] and of [`Weights::take`].
    pub fn load(weights: &mut Weights<'_>, name: &str, config: &ModelConfig) -> crate::Result<Self> {
        let (hidden, whole) = (config.hidden_size, Mamba2Config::read(&config.fields)?);
        let mixer = whole.share(weights.shard());
        // What stands in the rows of the matrices, and is divided by itself.
        let x = Section { units: whole.heads, rows: whole.head_dim };
        let b = Section { units: whole.groups, rows: whole.state_size };
        let dt = Section { units: whole.heads, rows: 1 };
        let (z, c) = (x, b);
        let mut take = |part: &str, shape: &[usize], sections: &[Section]| {
            let name = format!("{name}.{part}");
            weights.take_rows(&[Part { name: &name, shape, split: Split::Rows(sections) }])
        };
        let (channels, kernel) = (whole.channels(), whole.conv_kernel);
        let conv1d_weight = take("conv1d.weight", &[channels, 1, kernel], &[x, b, c])?;
        let core = Core {
            conv1d_weight: conv1d_weight.reshape(&[mixer.channels(), kernel])?,
            conv1d_bias: whole.use_conv_bias.then(|| take("conv1d.bias", &[channels], &[x, b, c])).transpose()?,
            a_log: take("A_log", &[whole.heads], &[dt])?,
            d: take("D", &[whole.heads], &[dt])?,
            dt_bias: take("dt_bias", &[whole.heads], &[dt])?,
            norm_weight: take("norm.weight", &[whole.inner()], &[x])?,
            eps: config.rms_norm_eps,
            config: mixer,
        };
        let in_proj: (String, &[Section]) = (format!("{name}.in_proj"), &[z, x, b, c, dt]);
        Ok(Self {
            in_proj: Linear::column_fused(weights, &[in_proj], hidden)?,
            core: Arc::new(core),
            out_proj: Linear::row(weights, &format!("{name}.out_proj"), hidden, whole.inner())?,
        })
    }

    /// `[T, C]` to partial sums, `[T, C]`; takes the states of the batch's sequences over their new tokens.
    ///
    /// # Errors
    /// Those of the ops, and of the break.
    pub fn forward(
        &self,
        cx: &mut Context<'_, ForwardBatch>,
        x: &Tensor,
        inputs: &TokenInputs,
        state: &LayerState,
    ) -> Result<Tensor> {
        let projected = self.in_proj.forward(cx, x)?; // [T, H P + channels + H]
        let mixed = match &inputs.decode {
            None => mix(cx, &self.core, &projected, state)?,
            Some(decode) => self.core.run(cx, &projected, state, &decode.states, None)?,
        }; // [T, H P]
        drop(projected);
        self.out_proj.forward(cx, &mixed)
    }
}

/// Mixes `projected`, `[T, H P + channels + H]`, along the live batch's sequences; returns `[T, H P]`.
#[eager_on_graph]
fn mix(cx: &mut Eager<'_, ForwardBatch>, core: &Arc<Core>, projected: &Tensor, state: &LayerState) -> Result<Tensor> {
    let batch = cx.live();
    let mixed = core.run(cx, projected, state, &batch.states, Some(&batch.cu_seqlens_q))?;
    batch.push_states(cx, state)?;
    Ok(mixed)
}

impl Core {
    /// Runs over sequences that begin at the rows of `starts`, or over one token of each.
    fn run(
        &self,
        cx: &mut OpStream,
        projected: &Tensor,
        state: &LayerState,
        slots: &StateSlots,
        starts: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Mamba2Config { groups, time_step_limit, .. } = self.config;
        let (inner, shared, channels) = (self.config.inner(), self.config.shared(), self.config.channels());
        let gate = projected.columns(0..inner)?; // [T, H P]
        let dt = projected.columns(inner + channels..projected.dim(1))?; // [T, H]
        let conv = CausalConv1d {
            x: &projected.columns(inner..inner + channels)?,
            weight: &self.conv1d_weight,
            bias: self.conv1d_bias.as_ref(),
            state: &state.conv,
            slots,
            cu_seqlens_q: starts,
        };
        let xbc = ops::causal_conv1d(cx, &conv)?; // [T, H P + 2 G N]
        let input = SsmInputs {
            x: &xbc.columns(0..inner)?,
            b: &xbc.columns(inner..inner + shared)?,
            c: &xbc.columns(inner + shared..channels)?,
            dt: &dt,
            a_log: &self.a_log,
            d: &self.d,
            dt_bias: &self.dt_bias,
            dt_limits: time_step_limit,
            state: &state.ssm,
            slots,
        };
        let y = match starts {
            Some(starts) => ops::ssd_scan(cx, &input, starts)?,
            None => ops::ssm_update(cx, &input)?,
        }; // [T, H P]
        ops::gated_rms_norm(cx, &y, &gate, &self.norm_weight, inner / groups, self.eps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn with(changes: &Value) -> crate::Result<Mamba2Config> {
        let mut root = json!({
            "mamba_num_heads": 8, "mamba_head_dim": 64, "n_groups": 2, "ssm_state_size": 128, "conv_kernel": 4,
        });
        for (key, value) in changes.as_object().expect("an object") {
            root[key] = value.clone();
        }
        Mamba2Config::read(&Fields::new("config.json", root))
    }

    #[test]
    fn limits_of_the_time_step_are_read_in_every_spelling() {
        let limits = |changes| with(&changes).expect("a mixer").time_step_limit;
        let infinity = json!({"__float__": "Infinity"});
        assert_eq!(limits(json!({})), (0.0, f32::INFINITY));
        assert_eq!(limits(json!({"time_step_limit": [0.001, infinity]})), (0.001, f32::INFINITY));
        assert_eq!(limits(json!({"time_step_limit": [0, 0.1]})), (0.0, 0.1));
    }

    #[test]
    fn what_no_field_says_is_as_in_transformers() {
        let mixer = with(&json!({})).expect("a mixer");
        assert_eq!((mixer.use_conv_bias, mixer.ssm_dtype), (true, DType::F32));
        let mixer = with(&json!({"use_conv_bias": false, "mamba_ssm_cache_dtype": "bfloat16"})).expect("a mixer");
        assert_eq!((mixer.use_conv_bias, mixer.ssm_dtype), (false, DType::Bf16));
        let layout = StateLayout { layers: 3, conv: [1024, 3], ssm: [8, 64, 128], ssm_dtype: DType::Bf16 };
        assert_eq!(mixer.state_layout(3), layout);
    }

    #[test]
    fn what_cannot_be_honoured_is_refused() {
        for (field, value) in [
            ("mamba_hidden_act", json!("gelu")),
            ("mamba_proj_bias", json!(true)),
            ("use_bias", json!(true)),
            ("n_groups", json!(3)),
            ("conv_kernel", json!(5)),
            ("ssm_state_size", json!(512)),
            ("time_step_limit", json!([0.2, 0.1])),
            ("time_step_limit", json!(["0", 1])),
            ("mamba_ssm_cache_dtype", json!("float16")),
        ] {
            let error = with(&json!({field: value})).expect_err(field).to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
