//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, Given, HostMemory, Result};

use super::DispatchArgs;
use crate::collective::message::{give_row, given};
use crate::float::{Float, row};

/// The bytes of a choice: the expert, and the weight.
const CHOICE_BYTES: usize = 8;

/// Gives every token of this launch: its choices, then its row.
pub(super) fn give<T: Float>(a: &DispatchArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
    let (chosen, columns) = (a.chosen as usize, a.columns as usize);
    let mut bytes = Vec::new();
    for t in (a.first_token..a.first_token + a.tokens).map(|t| t as usize) {
        let experts = row::<i32>(memory, a.experts, i64::from(a.chosen), t, chosen)?;
        let weights = row::<f32>(memory, a.weights, i64::from(a.chosen), t, chosen)?;
        for (expert, weight) in experts.iter().zip(weights) {
            bytes.extend_from_slice(&expert.get().to_ne_bytes());
            bytes.extend_from_slice(&weight.get().to_ne_bytes());
        }
        give_row(&mut bytes, row::<T>(memory, a.x, a.x_stride, t, columns)?);
    }
    Ok(bytes)
}

/// Takes the choices of this rank's experts from every rank, and the rows that have one.
pub(super) fn take<T: Float>(a: &DispatchArgs, _: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
    let (chosen, columns) = (a.chosen as usize, a.columns as usize);
    let own = (a.communicator.rank * a.experts_of_rank) as i32;
    let own = own..own + a.experts_of_rank as i32;
    for (rank, bytes) in gave.iter().enumerate() {
        let tokens = bytes.chunks(chosen * CHOICE_BYTES + columns * size_of::<T>());
        for (i, (choices, x)) in tokens.map(|token| token.split_at(chosen * CHOICE_BYTES)).enumerate() {
            let t = rank * a.tokens_of_rank as usize + a.first_token as usize + i;
            let mut has = false;
            for k in 0..chosen {
                let expert: i32 = bytemuck::pod_read_unaligned(&choices[k * CHOICE_BYTES..][..4]);
                let weight: f32 = bytemuck::pod_read_unaligned(&choices[k * CHOICE_BYTES + 4..][..4]);
                let (expert, weight) = if own.contains(&expert) { (expert, weight) } else { (-1, 0.0) };
                memory.view_at::<i32>(a.received_experts, t * chosen + k, 1)?[0].set(expert);
                memory.view_at::<f32>(a.received_weights, t * chosen + k, 1)?[0].set(weight);
                has |= expert >= 0;
            }
            if has {
                let out = row::<T>(memory, a.rows, i64::from(a.columns), t, columns)?;
                out.iter().enumerate().for_each(|(c, out)| out.set(given(x, c)));
            }
        }
    }
    Ok(())
}
