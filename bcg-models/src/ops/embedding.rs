//! Table lookup; CUDA source: `kernels/src/embedding.cu`.

use bcg_runtime::{CaptureStream, DType, DevicePtr, Dims, HostMemory, Kernel, Result, Tensor};
use bytemuck::{AnyBitPattern, NoUninit};

use super::check::{Check, row_bytes, row_stride_bytes};
use super::float::{byte_row, copy_cells};

const CHECK: Check = Check::new("embedding");

#[repr(C)]
#[derive(Clone, Copy, NoUninit, AnyBitPattern)]
struct EmbeddingArgs {
    ids: DevicePtr,
    table: DevicePtr,
    out: DevicePtr,
    table_stride_bytes: i64,
    row_bytes: i64,
    table_rows: i64,
}

static EMBEDDING: Kernel<EmbeddingArgs> = Kernel::new("embedding", &bcg_kernels::EMBEDDING, host);

/// Looks up one row of `table` for each id.
///
/// `out[t] = table[ids[t]]`; an id outside the table, as a padded row may hold, gives a row of zeros.
///
/// # Shapes
/// - `ids`: `[T]` i32.   - `table`: `[V, C]`, any dtype.   - `out`: `[T, C]`, dtype of `table`.
///
/// # Capture
/// Records one kernel. Frozen: shapes and addresses. Read again at each replay: `ids` and `table`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_models::ops;
/// use bcg_runtime::{Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let table = device.tensor(&[3, 2], &[0.0f32, 1.0, 10.0, 11.0, 20.0, 21.0])?;
/// let ids = device.tensor(&[3], &[2, 0, -1])?;
/// let out = runner.eager(&(), |cx| ops::embedding(cx, &ids, &table))?;
/// assert_eq!(runner.read::<f32>(&out)?, [20.0, 21.0, 0.0, 1.0, 0.0, 0.0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn embedding(cx: &mut CaptureStream, ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    CHECK.rank("ids", ids, &["T"])?;
    CHECK.dense("ids", ids, ids.shape(), DType::I32)?;
    CHECK.rank("table", table, &["V", "C"])?;
    let dims = CHECK.block_per_row(ids, 128)?;
    let out = cx.empty(&[ids.dim(0), table.dim(1)], table.dtype())?;
    let args = EmbeddingArgs {
        ids: cx.addr(ids)?,
        table: cx.addr(table)?,
        out: cx.addr(&out)?,
        table_stride_bytes: row_stride_bytes(table),
        row_bytes: row_bytes(table),
        table_rows: table.dim(0) as i64,
    };
    cx.launch(&EMBEDDING, dims, args)?;
    Ok(out)
}

fn host(a: &EmbeddingArgs, dims: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let ids = memory.view::<i32>(a.ids, dims.grid[0] as usize)?;
    for (t, id) in ids.iter().enumerate() {
        let out = byte_row(memory, a.out, a.row_bytes, t, a.row_bytes)?;
        match usize::try_from(id.get()) {
            Ok(id) if (id as i64) < a.table_rows => {
                copy_cells(out, byte_row(memory, a.table, a.table_stride_bytes, id, a.row_bytes)?);
            }
            _ => out.iter().for_each(|byte| byte.set(0)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (ids, long) = (device.zeros(&[2], DType::I32)?, device.zeros(&[2], DType::I64)?);
        let table = device.zeros(&[3, 4], DType::Bf16)?;
        assert!(refusal(&device, |cx| embedding(cx, &long, &table)).contains("`ids` i32, got i64"));
        assert!(refusal(&device, |cx| embedding(cx, &table, &table)).contains("`ids` [T], got [3, 4]"));
        assert!(refusal(&device, |cx| embedding(cx, &ids, &ids)).contains("`table` [V, C], got [2]"));
        Ok(())
    }
}
