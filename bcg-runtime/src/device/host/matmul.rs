//! Matrix products of the host device, by the `gemm` crate: queued and run late like any other work.
//!
//! The crate multiplies tiles of a fixed shape: with other shapes it may sum in another order, and then a row would
//! depend on how many rows there are, which padding changes. A little workspace is asked for and overwritten, so that
//! one that lives too short is seen.

use std::cell::Cell;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::HostBackend;
use super::regions::Memory;
use super::view::HostMemory;
use super::work::Work;
use crate::device::traits::{Matmul, MatmulBackend, MatmulPlan, MatmulShape, MatmulTuning, StreamHandle};
use crate::{DType, DevicePtr, Error, Result};

pub(super) const NAME: &str = "matmul";
const CALL: &str = "cublasLtMatmul";
/// Rows multiplied at a time; missing ones are zeros.
const TILE_ROWS: usize = 8;
/// Outputs multiplied at a time; bounds the copy of the weight in f32.
const TILE_OUTPUTS: usize = 512;
const WORKSPACE_BYTES: usize = 64;

impl MatmulBackend for HostBackend {
    fn plan_matmul(&self, _shape: &MatmulShape) -> Result<MatmulPlan> {
        Ok(MatmulPlan { workspace_bytes: WORKSPACE_BYTES, algorithm: [0; 8] })
    }

    fn matmul_workspace_bytes_max(&self) -> usize {
        WORKSPACE_BYTES
    }

    fn matmul(&self, stream: StreamHandle, product: &Matmul) -> Result<()> {
        let mut state = self.enter(CALL)?;
        let shape = &product.shape;
        let is_pitched = shape.rows == 1 || shape.x_stride >= shape.depth && shape.out_stride >= shape.outputs;
        if !is_pitched || (shape.outputs > 1 && shape.weight_stride < shape.depth) {
            return Err(Error::driver(CALL, 7, "CUBLAS_STATUS_INVALID_VALUE"));
        }
        state.enqueue(CALL, stream, Work::Matmul(*product))
    }

    /// Does nothing: there is one way to multiply.
    fn tune_matmuls(&self, _rows: &[usize], _progress: &mut dyn FnMut(usize, usize)) -> Result<MatmulTuning> {
        Ok(MatmulTuning::default())
    }

    /// One way to multiply: there is nothing to tell.
    fn matmul_plans(&self) -> Vec<(MatmulShape, MatmulPlan)> {
        Vec::new()
    }

    fn set_matmul_plans(&self, _: &[(MatmulShape, MatmulPlan)]) -> Result<()> {
        Ok(())
    }
}

/// Runs a product.
pub(super) fn run(product: &Matmul, memory: &Memory) -> Result<()> {
    let MatmulShape { rows, outputs, depth, x_stride, weight_stride, out_stride, dtype, out_dtype, .. } = product.shape;
    memory.fill(NAME, product.workspace, [0xFF; 4], product.plan.workspace_bytes)?;
    let memory = HostMemory::new(memory, NAME);
    let padded = rows.next_multiple_of(TILE_ROWS);
    let mut x = Vec::with_capacity(padded * depth);
    for t in 0..rows {
        extend(&mut x, &memory, at(product.x, t * x_stride, dtype), depth, dtype)?;
    }
    x.resize(padded * depth, 0.0);
    let mut weight = Vec::with_capacity(TILE_OUTPUTS.min(outputs) * depth);
    for first in (0..outputs).step_by(TILE_OUTPUTS) {
        let width = TILE_OUTPUTS.min(outputs - first);
        weight.clear();
        for n in first..first + width {
            extend(&mut weight, &memory, at(product.weight, n * weight_stride, dtype), depth, dtype)?;
        }
        let mut tile = vec![0.0; TILE_ROWS * width];
        for tile_row in (0..rows).step_by(TILE_ROWS) {
            multiply(&mut tile, &x[tile_row * depth..(tile_row + TILE_ROWS) * depth], &weight, width, depth);
            for (t, sums) in (tile_row..rows).zip(tile.chunks(width)) {
                store(&memory, at(product.out, t * out_stride + first, out_dtype), sums, out_dtype)?;
            }
        }
    }
    Ok(())
}

fn at(matrix: DevicePtr, element: usize, dtype: DType) -> DevicePtr {
    matrix.offset_bytes(element * dtype.size_bytes())
}

/// Appends `len` elements at `ptr` as f32.
fn extend(to: &mut Vec<f32>, memory: &HostMemory<'_>, ptr: DevicePtr, len: usize, dtype: DType) -> Result<()> {
    let begin = to.len();
    match dtype {
        DType::Bf16 => {
            to.resize(begin + len, 0.0);
            memory.load::<bf16>(ptr, len)?.convert_to_f32_slice(&mut to[begin..]);
        }
        DType::F16 => {
            to.resize(begin + len, 0.0);
            memory.load::<f16>(ptr, len)?.convert_to_f32_slice(&mut to[begin..]);
        }
        _ => to.extend(memory.view::<f32>(ptr, len)?.iter().map(Cell::get)),
    }
    Ok(())
}

/// Rounds `values` to `dtype` and stores them at `ptr`.
fn store(memory: &HostMemory<'_>, ptr: DevicePtr, values: &[f32], dtype: DType) -> Result<()> {
    match dtype {
        DType::Bf16 => {
            let out = memory.view::<bf16>(ptr, values.len())?;
            out.iter().zip(values).for_each(|(out, value)| out.set(bf16::from_f32(*value)));
        }
        DType::F16 => {
            let out = memory.view::<f16>(ptr, values.len())?;
            out.iter().zip(values).for_each(|(out, value)| out.set(f16::from_f32(*value)));
        }
        _ => memory.store(ptr, values)?,
    }
    Ok(())
}

/// `tile[r, n] = sum_k x[r, k] * weight[n, k]` for [`TILE_ROWS`] rows.
fn multiply(tile: &mut [f32], x: &[f32], weight: &[f32], width: usize, depth: usize) {
    assert_eq!(tile.len(), TILE_ROWS * width);
    assert_eq!(x.len(), TILE_ROWS * depth);
    assert_eq!(weight.len(), width * depth);
    let (width_stride, depth_stride) = (width as isize, depth as isize);
    // SAFETY: gemm reads `m × k` and `k × n` elements and writes `m × n`, at the strides given; the three assertions
    // above say that the slices hold exactly these, and `tile` is borrowed mutably, so nothing overlaps.
    unsafe {
        gemm::gemm(
            TILE_ROWS,
            width,
            depth,
            tile.as_mut_ptr(),
            1,
            width_stride,
            false,
            x.as_ptr(),
            1,
            depth_stride,
            weight.as_ptr(),
            depth_stride,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Rig;
    use super::*;
    use crate::device::traits::{GraphBackend, MemoryBackend, NodeCounts, StreamBackend};

    /// A product of `[2, 3]` and `[2, 3]` in f32 at the start of `ptr`; the output follows, then the workspace.
    fn product(ptr: DevicePtr) -> Matmul {
        let shape = MatmulShape {
            rows: 2,
            outputs: 2,
            depth: 3,
            x_stride: 3,
            weight_stride: 3,
            out_stride: 2,
            dtype: DType::F32,
            out_dtype: DType::F32,
            alignment: 16,
        };
        let plan = MatmulPlan { workspace_bytes: WORKSPACE_BYTES, algorithm: [0; 8] };
        let [weight, out, workspace] = [6, 12, 16].map(|element| at(ptr, element, DType::F32));
        Matmul { shape, plan, x: ptr, weight, out, workspace }
    }

    #[test]
    fn a_captured_product_is_a_kernel_that_runs_at_each_launch() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(32 * 4).unwrap());
        let factors = [1.0f32, 2.0, 3.0, 4.0, 5.0, 6.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0];
        rig.backend.copy_from_host(stream, ptr, bytemuck::cast_slice(&factors)).unwrap();
        rig.backend.begin_capture(stream).unwrap();
        rig.backend.matmul(stream, &product(ptr)).unwrap();
        let graph = rig.backend.end_capture(stream).unwrap();
        assert_eq!(rig.backend.node_counts(graph).unwrap(), NodeCounts { kernels: 1, ..NodeCounts::default() });
        let exec = rig.backend.instantiate(graph).unwrap();
        let out = product(ptr).out;
        assert!(rig.read::<f32>(stream, out, 4).unwrap().iter().all(|v| v.is_nan()), "it did not run at capture");
        rig.backend.launch_graph(exec, stream).unwrap();
        assert_eq!(rig.read::<f32>(stream, out, 4).unwrap(), [1.0, 6.0, 4.0, 15.0]);
    }

    #[test]
    fn a_product_beyond_its_memory_is_an_error_that_names_it() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(32 * 4).unwrap());
        let mut short = product(ptr);
        short.shape.outputs = 30;
        short.shape.out_stride = 30;
        rig.backend.matmul(stream, &short).unwrap();
        let error = rig.backend.synchronize_stream(stream).unwrap_err();
        assert!(matches!(&error, Error::Memory { kernel, .. } if kernel == "matmul"), "{error}");
    }

    #[test]
    fn strides_shorter_than_a_row_are_refused_and_faults_have_the_name_of_the_call() {
        let rig = Rig::new();
        let (stream, ptr) = (rig.stream("main"), rig.backend.alloc(32 * 4).unwrap());
        let mut overlapping = product(ptr);
        overlapping.shape.x_stride = 2;
        assert!(matches!(rig.backend.matmul(stream, &overlapping), Err(Error::Driver { code: 7, .. })));
        rig.control.fail_calls_named(CALL, 1);
        assert!(matches!(rig.backend.matmul(stream, &product(ptr)), Err(Error::Driver { code: 999, .. })));
        assert_eq!(rig.control.num_pending(), 0);
    }

    #[test]
    fn a_tile_is_the_same_wherever_its_rows_stand() {
        let (width, depth) = (100, 700);
        let number = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 999.0 - 0.5;
        let weight: Vec<f32> = (0..width * depth).map(number).collect();
        let one: Vec<f32> = (0..depth).map(|i| number(i + 77)).collect();
        let mut first = vec![];
        for place in 0..TILE_ROWS {
            let mut x: Vec<f32> = (0..TILE_ROWS * depth).map(|i| number(i + place)).collect();
            x[place * depth..(place + 1) * depth].copy_from_slice(&one);
            let mut tile = vec![f32::NAN; TILE_ROWS * width];
            multiply(&mut tile, &x, &weight, width, depth);
            let row = tile[place * width..(place + 1) * width].to_vec();
            if place == 0 {
                first.clone_from(&row);
            }
            assert_eq!(row, first, "row {place} of the tile");
        }
    }
}
