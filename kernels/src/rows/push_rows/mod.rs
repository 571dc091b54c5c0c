//! Copy of listed rows to where another device reads them; CUDA source: `push_rows.cu`.

mod host;

use bcg_runtime::{DType, DevicePtr, Dims, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

use crate::check::{Check, row_bytes};
use host::host;

static SOURCE: Source = source!("rows/push_rows/push_rows.cu").takes::<PushRowsArgs>();
pub(super) const SOURCES: &[&Source] = &[&SOURCE];

const CHECK: Check = Check::new("push_rows");

const THREADS: u32 = 256;
/// What a block copies at once: four words of 16 bytes for each thread.
const PIECE_BYTES: i64 = 4 * 16 * THREADS as i64;
/// Blocks of the grid for each multiprocessor, whatever the list holds.
const BLOCKS_PER_MULTIPROCESSOR: u32 = 2;

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct PushRowsArgs {
    #[points_to(const u8)]
    first_source: DevicePtr,
    #[points_to(u8)]
    first_target: DevicePtr,
    #[points_to(const u8)]
    second_source: DevicePtr,
    #[points_to(u8)]
    second_target: DevicePtr,
    #[points_to(const i32)]
    runs: DevicePtr,
    #[points_to(const i32)]
    count: DevicePtr,
    /// Of a row of the first pair, and of the second one.
    first_bytes: i64,
    second_bytes: i64,
    source_rows: i64,
    target_rows: i64,
    /// Of a run.
    rows_max: i64,
    piece_bytes: i64,
    runs_max: i32,
    _padding: u32,
}

// SAFETY: `push_rows` has checked the shapes when it launches, and the source skips runs that leave them.
static PUSH_ROWS: Kernel<PushRowsArgs> = unsafe { Kernel::new("push_rows", &SOURCE, host) }.programmatic();

/// The inputs of [`push_rows`].
#[derive(Debug, Clone, Copy)]
pub struct PushRows<'a> {
    /// Two tensors with as many rows as each other, `[R, …]`.
    pub sources: [&'a Tensor; 2],
    /// Where their rows go, `[R', …]`; memory of another device, as a rule.
    pub targets: [&'a Tensor; 2],
    /// `[N, 4]` i32: the first row of a run in the sources, its first row in the targets, its number of rows, and 0.
    pub runs: &'a Tensor,
    /// `[1]` i32: the runs that count.
    pub count: &'a Tensor,
    /// Rows of a run at most. A run of more is skipped, and so is one that leaves the tensors.
    pub rows_max: usize,
}

/// Copies runs of rows of two tensors to two others, which may be memory of another device: the same runs of both.
///
/// `targets[i][run.target + r, …] = sources[i][run.source + r, …]` for each row `r` of each run, in one kernel; no two
/// runs may share a target row, and sources and targets must not overlap.
///
/// # Shapes
/// - `sources[i]`: `[R, …]`, `targets[i]`: `[R', …]`, rows of one size and dtype; contiguous.
/// - `runs`: `[N, 4]` i32, `count`: `[1]` i32; contiguous.
///
/// # Capture
/// Enqueues one kernel, whose grid depends on the device alone. Frozen: shapes and addresses. Read again at each replay:
/// `sources`, `runs`, `count`.
///
/// # Errors
/// [`bcg_runtime::Error::Shape`] if a shape or dtype differs; those of enqueuing.
///
/// # Example
/// ```
/// use bcg_kernels::PushRows;
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let (k, v) = (device.tensor(&[3, 1], &[1, 2, 3])?, device.tensor(&[3, 2], &[4, 5, 6, 7, 8, 9])?);
/// let (far_k, far_v) = (device.zeros(&[4, 1], DType::I32)?, device.zeros(&[4, 2], DType::I32)?);
/// let (runs, count) = (device.tensor(&[1, 4], &[1, 0, 2, 0])?, device.tensor(&[1], &[1])?);
/// let push = PushRows { sources: [&k, &v], targets: [&far_k, &far_v], runs: &runs, count: &count, rows_max: 2 };
/// runner.eager(&(), |cx| bcg_kernels::push_rows(cx, &push))?;
/// runner.synchronize()?;
/// assert_eq!(device.read::<i32>(&far_k)?, [2, 3, 0, 0]);
/// assert_eq!(device.read::<i32>(&far_v)?, [6, 7, 8, 9, 0, 0, 0, 0]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub fn push_rows(cx: &mut OpStream, push: &PushRows<'_>) -> Result<()> {
    let PushRows { sources, targets, runs, count, rows_max } = *push;
    for (names, [source, target]) in [
        (["sources[0]", "targets[0]"], [sources[0], targets[0]]),
        (["sources[1]", "targets[1]"], [sources[1], targets[1]]),
    ] {
        for (name, tensor, first) in [(names[0], source, sources[0]), (names[1], target, targets[0])] {
            CHECK.contiguous(name, tensor)?;
            CHECK.dtype(name, tensor, source.dtype())?;
            CHECK.shape(name, tensor, &[&first.shape()[..1], &source.shape()[1..]].concat())?;
        }
    }
    CHECK.rank("runs", runs, &["N", "4"])?;
    CHECK.dense("runs", runs, &[runs.dim(0), 4], DType::I32)?;
    CHECK.dense("count", count, &[1], DType::I32)?;
    let args = PushRowsArgs {
        first_source: cx.addr(sources[0])?,
        first_target: cx.addr(targets[0])?,
        second_source: cx.addr(sources[1])?,
        second_target: cx.addr(targets[1])?,
        runs: cx.addr(runs)?,
        count: cx.addr(count)?,
        first_bytes: row_bytes(sources[0]),
        second_bytes: row_bytes(sources[1]),
        source_rows: i64::from(CHECK.u32("R", sources[0].dim(0))?),
        target_rows: i64::from(CHECK.u32("R'", targets[0].dim(0))?),
        rows_max: i64::from(CHECK.u32("rows_max", rows_max)?),
        piece_bytes: PIECE_BYTES,
        runs_max: CHECK.u32("N", runs.dim(0))?.cast_signed(),
        _padding: 0,
    };
    cx.launch(&PUSH_ROWS, Dims::linear(BLOCKS_PER_MULTIPROCESSOR * cx.device().num_multiprocessors(), THREADS), args)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::testing::refusal;
    use bcg_runtime::Device;

    #[test]
    fn wrong_tensors_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let rows = |shape: &[usize]| device.zeros(shape, DType::F32);
        let (a, b, c) = (rows(&[3, 4])?, rows(&[3, 8])?, rows(&[4, 4])?);
        let (far_a, far_b) = (rows(&[5, 4])?, rows(&[5, 8])?);
        let (runs, count) = (device.zeros(&[2, 4], DType::I32)?, device.zeros(&[1], DType::I32)?);
        let good = PushRows { sources: [&a, &b], targets: [&far_a, &far_b], runs: &runs, count: &count, rows_max: 2 };
        let says = |push: PushRows<'_>| refusal(&device, |cx| push_rows(cx, &push));
        assert!(says(PushRows { sources: [&a, &c], ..good }).contains("`sources[1]` [3, 4], got [4, 4]"));
        assert!(says(PushRows { targets: [&far_a, &far_a], ..good }).contains("`targets[1]` [5, 8], got [5, 4]"));
        assert!(says(PushRows { runs: &count, ..good }).contains("`runs` [N, 4], got [1]"));
        assert!(says(PushRows { count: &a, ..good }).contains("`count` [1], got [3, 4]"));
        Ok(())
    }
}
