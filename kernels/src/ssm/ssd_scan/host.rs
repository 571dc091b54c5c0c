//! The host reference, which says what the kernel computes.

use std::cell::Cell;

use bcg_runtime::{DevicePtr, Dims, HostMemory, Result};
use half::bf16;

use super::SsmArgs;
use crate::float::{Float, dot, extend_f32, row};

/// The host reference for states in f32.
pub(in crate::ssm) fn host_f32<T: Float>(a: &SsmArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    host::<T, f32>(a, memory)
}

/// The host reference for states in bf16.
pub(in crate::ssm) fn host_bf16<T: Float>(a: &SsmArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    host::<T, bf16>(a, memory)
}

pub(super) fn host<T: Float, S: Float>(a: &SsmArgs, memory: &HostMemory<'_>) -> Result<()> {
    let sequences = a.sequences as usize;
    let starts = match a.cu_seqlens_q {
        DevicePtr::NULL => (0..=sequences as i32).collect(),
        starts => memory.load::<i32>(starts, sequences + 1)?,
    };
    let slots = a.slots.load(memory, &starts, a.num_slots as usize)?;
    for (b, (read, write)) in slots.into_iter().enumerate() {
        let rows = starts[b].max(0) as usize..(starts[b + 1].max(0) as usize).min(a.rows as usize);
        if rows.is_empty() {
            continue;
        }
        for head in 0..a.heads as usize {
            let mut h = match read {
                Some(slot) => to_f32(a.state::<S>(memory, slot, head)?),
                None => vec![0.0; a.head_dim as usize * a.state_size as usize],
            };
            for t in rows.clone() {
                a.advance::<T>(memory, t, head, &mut h)?;
            }
            if let Some(slot) = write {
                let state = a.state::<S>(memory, slot, head)?;
                state.iter().zip(h).for_each(|(state, h)| state.set(S::from_f32(h)));
            }
        }
    }
    Ok(())
}

pub(super) fn to_f32<T: Float>(values: &[Cell<T>]) -> Vec<f32> {
    let mut to = Vec::with_capacity(values.len());
    extend_f32(&mut to, values);
    to
}

impl SsmArgs {
    /// The state of one head in a slot.
    fn state<'m, S: Float>(&self, memory: &HostMemory<'m>, slot: usize, head: usize) -> Result<&'m [Cell<S>]> {
        let len = self.head_dim as usize * self.state_size as usize;
        let first = slot * self.slot_stride as usize + head * len;
        memory.view_at(self.state, first, len)
    }

    /// Takes a head's state over one token, and writes what it gives.
    fn advance<T: Float>(&self, memory: &HostMemory<'_>, t: usize, head: usize, h: &mut [f32]) -> Result<()> {
        let (heads, head_dim, state_size) = (self.heads as usize, self.head_dim as usize, self.state_size as usize);
        let of_head = |parameters: DevicePtr| {
            Ok::<_, bcg_runtime::Error>(memory.view::<T>(parameters, heads)?[head].get().to_f32())
        };
        let group = head / self.group_heads as usize;
        let width = heads / self.group_heads as usize * state_size;
        let of_group = |matrix, stride| {
            Ok::<_, bcg_runtime::Error>(to_f32(
                &row::<T>(memory, matrix, stride, t, width)?[group * state_size..][..state_size],
            ))
        };
        let (b, c) = (of_group(self.b, self.b_stride)?, of_group(self.c, self.c_stride)?);
        let x = &row::<T>(memory, self.x, self.x_stride, t, heads * head_dim)?[head * head_dim..][..head_dim];
        let out =
            &row::<T>(memory, self.out, (heads * head_dim) as i64, t, heads * head_dim)?[head * head_dim..][..head_dim];
        let raw = row::<T>(memory, self.dt, self.dt_stride, t, heads)?[head].get().to_f32() + of_head(self.dt_bias)?;
        let softplus = if raw > 20.0 { raw } else { raw.exp().ln_1p() };
        let dt = softplus.max(self.dt_min).min(self.dt_max);
        let (decay, d) = ((dt * -of_head(self.a_log)?.exp()).exp(), of_head(self.d)?);
        for ((h, x), out) in h.chunks_mut(state_size).zip(x).zip(out) {
            let x = x.get().to_f32();
            h.iter_mut().zip(&b).for_each(|(h, b)| *h = decay * *h + dt * x * b);
            out.set(T::from_f32(dot(h, &c) + d * x));
        }
        Ok(())
    }
}
