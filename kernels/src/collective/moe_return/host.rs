//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, Error, Given, HostMemory, Result};

use super::ReturnArgs;
use crate::collective::message::given;
use crate::float::{Float, row};
use crate::moe::combined;

/// Says that a rank has no part of a row, or has one.
const PARTS: [u8; 2] = [0, 1];

/// Gives this rank's part of every row of this launch, of all ranks: whether it has one, then the sum, which is zeros if not.
pub(super) fn give<T: Float>(a: &ReturnArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for rank in 0..a.communicator.num_ranks {
        for t in rows_of(a, rank) {
            let places = row::<i32>(memory, a.places, i64::from(a.chosen), t, a.chosen as usize)?;
            let has_part =
                is_valid(a, memory, t)? && (!a.shared.is_null() || places.iter().any(|place| place.get() >= 0));
            bytes.push(PARTS[usize::from(has_part)]);
            let sums = if has_part { part::<T>(a, memory, t)? } else { vec![0.0; a.columns as usize] };
            sums.into_iter().for_each(|sum| bytes.extend_from_slice(bytemuck::bytes_of(&T::from_f32(sum))));
        }
    }
    Ok(bytes)
}

/// Sums the parts of this rank's rows, and leaves zeros below zero, which change no sum, in those of the others.
///
/// # Errors
/// If a rank has a part where the row's choices say that it has none, or the other way around: on a GPU one would wait for
/// what never comes.
pub(super) fn take<T: Float>(a: &ReturnArgs, _: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
    let (columns, chosen) = (a.columns as usize, a.chosen as usize);
    let part_bytes = 1 + columns * size_of::<T>();
    for rank in 0..a.communicator.num_ranks {
        for (i, t) in rows_of(a, rank).enumerate() {
            let out = row::<T>(memory, a.out, i64::from(a.columns), t, columns)?;
            if rank != a.communicator.rank {
                out.iter().for_each(|out| out.set(T::from_f32(-0.0)));
                continue;
            }
            let experts = row::<i32>(memory, a.experts, i64::from(a.chosen), a.first_token as usize + i, chosen)?;
            let is_owner = |owner: u32| experts.iter().any(|e| e.get() as u32 / a.experts_of_rank == owner);
            let is_valid = is_valid(a, memory, t)?;
            let first = (rank * a.tokens) as usize + i;
            let parts: Vec<&[u8]> = gave.iter().map(|bytes| &bytes[first * part_bytes..][..part_bytes]).collect();
            for (owner, part) in parts.iter().enumerate() {
                let is_due = is_valid && (!a.shared.is_null() || is_owner(owner as u32));
                if part[0] != PARTS[usize::from(is_due)] {
                    let message = format!("moe_return: row {t} and rank {owner} differ about its choices");
                    return Err(Error::other(message));
                }
            }
            for (c, out) in out.iter().enumerate() {
                let mut values = parts.iter().map(|part| given::<T>(&part[1..], c).to_f32());
                let first = values.next().unwrap_or_default();
                out.set(T::from_f32(values.fold(first, |sum, value| sum + value)));
            }
        }
    }
    Ok(())
}

/// The rows of a rank that this launch returns, among those of all.
fn rows_of(a: &ReturnArgs, rank: u32) -> impl Iterator<Item = usize> + use<> {
    let first = rank * a.tokens_of_rank + a.first_token;
    (first..first + a.tokens).map(|t| t as usize)
}

fn is_valid(a: &ReturnArgs, memory: &HostMemory<'_>, t: usize) -> Result<bool> {
    Ok((t as i32) < memory.load::<i32>(a.num_valid, 1)?[0])
}

/// This rank's part of row `t`, not yet rounded.
fn part<T: Float>(a: &ReturnArgs, memory: &HostMemory<'_>, t: usize) -> Result<Vec<f32>> {
    let chosen = a.chosen as usize;
    let places = row::<i32>(memory, a.places, i64::from(a.chosen), t, chosen)?;
    let weights = row::<f32>(memory, a.received_weights, i64::from(a.chosen), t, chosen)?;
    let shared = if a.shared.is_null() { None } else { Some((a.shared, a.shared_stride)) };
    combined::<T>(memory, a.y, (places, weights), shared, (t, a.columns as usize))
}
