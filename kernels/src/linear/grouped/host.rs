//! The host reference, which says what the kernel computes.

use bcg_runtime::{Dims, HostMemory, Result};
use half::bf16;

use super::args::GroupedArgs;
use super::hopper::GroupedHopperArgs;
use crate::activation::gated;
use crate::float::{Float, dot, extend_f32, row};

pub(super) fn host_gate_up<T: Float>(a: &GroupedArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    host::<T, true>(a, memory)
}

pub(super) fn host_linear<T: Float>(a: &GroupedArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    host::<T, false>(a, memory)
}

pub(super) fn host<T: Float, const GATED: bool>(a: &GroupedArgs, memory: &HostMemory<'_>) -> Result<()> {
    let (experts, outputs, depth) = (a.experts as usize, a.outputs as usize, a.depth as usize);
    let halves = if GATED { 2 } else { 1 };
    let offsets = memory.load::<i32>(a.offsets, experts + 1)?;
    let rows = memory.load::<i32>(a.rows, a.places as usize)?;
    let read = |matrix, stride, index| -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(depth);
        extend_f32(&mut values, row::<T>(memory, matrix, stride, index, depth)?);
        Ok(values)
    };
    for e in 0..experts {
        let places = offsets[e] as usize..offsets[e + 1] as usize;
        let source = |place: usize| if GATED { rows[place] as usize / a.chosen as usize } else { place };
        let xs = places.clone().map(|place| read(a.x, a.x_stride, source(place))).collect::<Result<Vec<_>>>()?;
        for n in 0..outputs {
            if xs.is_empty() {
                break;
            }
            let weight_row = |half| read(a.weight, i64::from(a.depth), (e * halves + half) * outputs + n);
            let columns = (0..halves).map(weight_row).collect::<Result<Vec<_>>>()?;
            for (place, x) in places.clone().zip(&xs) {
                let sum = |half: usize| dot(x, &columns[half]);
                let value = if GATED { gated(T::round(sum(0)), T::round(sum(1))) } else { T::from_f32(sum(0)) };
                row::<T>(memory, a.out, i64::from(a.outputs), place, outputs)?[n].set(value);
            }
        }
    }
    Ok(())
}

pub(super) fn hopper_gate_up(a: &GroupedHopperArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    host_gate_up::<bf16>(&a.grouped, dims, memory)
}

pub(super) fn hopper_linear(a: &GroupedHopperArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    host_linear::<bf16>(&a.grouped, dims, memory)
}
