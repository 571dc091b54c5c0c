//! The host reference, which says what the kernel computes.

use std::cell::Cell;

use bcg_runtime::{DevicePtr, Dims, HostMemory, Result};

use super::CausalConv1dArgs;
use crate::float::{Float, row};

pub(super) fn host<T: Float>(a: &CausalConv1dArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let (channels, kernel) = (a.channels as usize, a.kernel as usize);
    let starts = match a.cu_seqlens_q {
        DevicePtr::NULL => (0..=a.sequences as i32).collect(),
        starts => memory.load::<i32>(starts, a.sequences as usize + 1)?,
    };
    let weight = memory.view::<T>(a.weight, channels * kernel)?;
    let bias = if a.bias.is_null() { None } else { Some(memory.view::<T>(a.bias, channels)?) };
    let slots = a.slots.load(memory, &starts, a.num_slots as usize)?;
    for (b, (read, write)) in slots.into_iter().enumerate() {
        let (first, end) = (starts[b].max(0) as usize, (starts[b + 1].max(0) as usize).min(a.rows as usize));
        if first >= end {
            continue;
        }
        let inputs =
            (first..end).map(|t| row::<T>(memory, a.x, a.x_stride, t, channels)).collect::<Result<Vec<_>>>()?;
        let before = read.map(|slot| a.state::<T>(memory, slot)).transpose()?;
        let after = write.map(|slot| a.state::<T>(memory, slot)).transpose()?;
        for channel in 0..channels {
            let mut window: Vec<T> = match before {
                Some(state) => state[channel * (kernel - 1)..][..kernel - 1].iter().map(Cell::get).collect(),
                None => vec![T::from_f32(0.0); kernel - 1],
            };
            for (t, input) in inputs.iter().enumerate() {
                window.push(input[channel].get());
                let weights = &weight[channel * kernel..][..kernel];
                let mut sum = bias.map_or(0.0, |bias| bias[channel].get().to_f32());
                for (value, weight) in window[t..].iter().zip(weights) {
                    sum += weight.get().to_f32() * value.to_f32();
                }
                let out = row::<T>(memory, a.out, i64::from(a.channels), first + t, channels)?;
                out[channel].set(T::from_f32(sum / (1.0 + (-sum).exp())));
            }
            if let Some(state) = after {
                let last = &window[window.len() - (kernel - 1)..];
                state[channel * (kernel - 1)..].iter().zip(last).for_each(|(state, value)| state.set(*value));
            }
        }
    }
    Ok(())
}

impl CausalConv1dArgs {
    fn state<'m, T: Float>(&self, memory: &HostMemory<'m>, slot: usize) -> Result<&'m [Cell<T>]> {
        let past = self.kernel as usize - 1;
        row(memory, self.state, self.slot_stride, slot, self.channels as usize * past)
    }
}
