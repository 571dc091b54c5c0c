//! A step's inputs put in their places: tokens that the step before chose and the host has not seen, and the page table;
//! CUDA source: `unpack_inputs.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::Check;
use host::host;

static SOURCE: Source = source!("rows/unpack_inputs/unpack_inputs.cu").takes::<UnpackInputsArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("unpack_inputs");
const BLOCK: u32 = 256;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct UnpackInputsArgs {
    #[points_to(i32)]
    tokens: DevicePtr,
    #[points_to(const i32)]
    chosen: DevicePtr,
    #[points_to(const i32)]
    packed: DevicePtr,
    #[points_to(i32)]
    page_table: DevicePtr,
    table_stride: i64,
    rows: u32,
    num_chosen: u32,
    sequences: u32,
    width: u32,
}

// SAFETY: `unpack_inputs` has checked the shapes when it launches, and the source indexes by these alone.
static UNPACK_INPUTS: Kernel<UnpackInputsArgs> = unsafe { Kernel::new("unpack_inputs", &SOURCE, host) }.programmatic();

/// Replaces each negative token `-1 - r` by `chosen[r]`, in place, and copies the rows of `packed` to those of `page_table`.
/// A row that `chosen` does not have gives token 0.
///
/// # Shapes
/// - `tokens`: `[T]` i32.   - `chosen`: `[B]` i32.   - `packed`, `page_table`: `[S, W]` i32; `page_table` may be row-sliced.
///
/// # Capture
/// Enqueues one kernel. Frozen: shapes and addresses. Read again at each replay: the contents of `tokens`, `chosen` and
/// `packed`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let (tokens, chosen) = (device.tensor(&[3], &[7, -2, -1])?, device.tensor(&[2], &[40, 41])?);
/// let (packed, table) = (device.tensor(&[2, 1], &[5, 6])?, device.zeros(&[2, 3], DType::I32)?);
/// runner.eager(&(), |cx| bcg_kernels::unpack_inputs(cx, &tokens, &chosen, &packed, &table.columns(0..1)?))?;
/// assert_eq!(runner.read::<i32>(&tokens)?, [7, 41, 40]);
/// assert_eq!(runner.read::<i32>(&table)?, [5, 0, 0, 6, 0, 0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn unpack_inputs(
    cx: &mut OpStream,
    tokens: &Tensor,
    chosen: &Tensor,
    packed: &Tensor,
    page_table: &Tensor,
) -> Result<()> {
    for (name, tensor, dim) in [("tokens", tokens, "T"), ("chosen", chosen, "B")] {
        CHECK.rank(name, tensor, &[dim])?;
        CHECK.dtype(name, tensor, DType::I32)?;
    }
    CHECK.rank("packed", packed, &["S", "W"])?;
    CHECK.dense("packed", packed, packed.shape(), DType::I32)?;
    CHECK.shape("page_table", page_table, packed.shape())?;
    CHECK.dtype("page_table", page_table, DType::I32)?;
    let pages = packed.num_elements();
    CHECK.u32("S * W", pages)?;
    let args = UnpackInputsArgs {
        tokens: cx.addr(tokens)?,
        chosen: cx.addr(chosen)?,
        packed: cx.addr(packed)?,
        page_table: cx.addr(page_table)?,
        table_stride: page_table.row_stride() as i64,
        rows: CHECK.u32("T", tokens.dim(0))?,
        num_chosen: CHECK.u32("B", chosen.dim(0))?,
        sequences: CHECK.u32("S", packed.dim(0))?,
        width: CHECK.u32("W", packed.dim(1))?,
    };
    cx.launch(&UNPACK_INPUTS, Dims::per_item(tokens.dim(0).max(pages), BLOCK), args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let (good, floats) = (device.zeros(&[2], DType::I32)?, device.zeros(&[2], DType::F32)?);
        let (matrix, wide) = (device.zeros(&[2, 2], DType::I32)?, device.zeros(&[2, 3], DType::I32)?);
        let says =
            |tokens, chosen, packed, table| refusal(&device, |cx| unpack_inputs(cx, tokens, chosen, packed, table));
        assert!(says(&floats, &good, &matrix, &matrix).contains("`tokens` i32, got f32"));
        assert!(says(&good, &matrix, &matrix, &matrix).contains("`chosen` [B], got [2, 2]"));
        assert!(says(&good, &good, &matrix, &wide).contains("`page_table` [2, 2], got [2, 3]"));
        Ok(())
    }
}
