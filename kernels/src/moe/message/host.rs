//! The host reference, which says what the kernels compute.

use std::cell::Cell;

use bcg_runtime::{Dims, HostMemory, Result};

use super::{CHOICES_OF_PACK, PACK_BYTES, PackArgs, UnpackArgs};
use crate::float::{Float, byte_row, row};

/// The words of a pack of choices: of each the expert and 1, or 0, and the weight.
const WORDS: usize = 2 * CHOICES_OF_PACK;

fn set(bytes: &[Cell<u8>], value: &[u8]) {
    bytes.iter().zip(value).for_each(|(to, from)| to.set(*from));
}

pub(super) fn pack<T: Float>(a: &PackArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let chosen = a.chosen as usize;
    let choice_packs = chosen.div_ceil(CHOICES_OF_PACK);
    let message_bytes = (choice_packs + a.row_packs as usize) * PACK_BYTES;
    for m in 0..dims.grid[0] as usize {
        let (to, t) = (m as u32 / a.tokens, m % a.tokens as usize);
        let experts = row::<i32>(memory, a.experts, i64::from(a.chosen), t, chosen)?;
        let weights = row::<f32>(memory, a.weights, i64::from(a.chosen), t, chosen)?;
        let message = byte_row(memory, a.message, message_bytes as i64, m, message_bytes as i64)?;
        message.iter().for_each(|byte| byte.set(0));
        let (choices, packs) = message.split_at(choice_packs * PACK_BYTES);
        let mut has = false;
        for k in (0..chosen).filter(|k| experts[*k].get() as u32 / a.experts_of_rank == to) {
            set(&choices[4 * 2 * k..], &(experts[k].get() + 1).to_ne_bytes());
            set(&choices[4 * (2 * k + 1)..], &weights[k].get().to_ne_bytes());
            has = true;
        }
        if has {
            for (c, x) in row::<T>(memory, a.x, a.x_stride, t, a.columns as usize)?.iter().enumerate() {
                set(&packs[c * size_of::<T>()..], bytemuck::bytes_of(&x.get()));
            }
        }
    }
    Ok(())
}

pub(super) fn unpack(a: &UnpackArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let chosen = a.chosen as usize;
    let choice_packs = chosen.div_ceil(CHOICES_OF_PACK);
    let message_words = (choice_packs + a.row_packs as usize) * WORDS;
    for m in 0..a.rows as usize {
        let words = row::<i32>(memory, a.message, message_words as i64, m, choice_packs * WORDS)?;
        let experts = row::<i32>(memory, a.experts, i64::from(a.chosen), m, chosen)?;
        let weights = row::<f32>(memory, a.weights, i64::from(a.chosen), m, chosen)?;
        for k in 0..chosen {
            experts[k].set(words[2 * k].get() - 1);
            weights[k].set(f32::from_bits(words[2 * k + 1].get() as u32));
        }
    }
    Ok(())
}
