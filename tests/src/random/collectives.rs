//! The collectives of random programs, in i32 so that each rank's bits are exact. They run on host devices only.

use bcg_runtime::{
    CommunicatorArgs, DevicePtr, Dims, Given, HostMemory, Kernel, KernelArgs, OpStream, RanksFn, Result, Source, Tensor,
};

static SOURCE: Source = Source::new("random_ranks.cu", "").takes::<Args>();

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    communicator: CommunicatorArgs,
    #[points_to(const i32)]
    x: DevicePtr,
    #[points_to(i32)]
    out: DevicePtr,
    rows: u64,
    cols: u64,
    x_stride: u64,
    /// How many ranks further the one is whose matrix is wanted.
    offset: u64,
}

// SAFETY: `launch`, below, makes the arguments of every launch: rows, columns and strides of the tensors whose addresses it
// gives. The source has no kernel.
static SUM_RANKS: Kernel<Args> = unsafe { Kernel::collective("sum_ranks", &SOURCE, RanksFn { give, take: take_sum }) };
// SAFETY: as above.
static OF_RANK: Kernel<Args> = unsafe { Kernel::collective("of_rank", &SOURCE, RanksFn { give, take: take_one }) };

fn give(args: &Args, _: &Dims, memory: &HostMemory<'_>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for row in 0..args.rows as usize {
        let row = memory.view_at::<i32>(args.x, row * args.x_stride as usize, args.cols as usize)?;
        row.iter().for_each(|value| bytes.extend(value.get().to_ne_bytes()));
    }
    Ok(bytes)
}

fn values(bytes: &[u8]) -> impl Iterator<Item = i32> {
    bytes.as_chunks::<4>().0.iter().map(|bytes| i32::from_ne_bytes(*bytes))
}

fn take_sum(args: &Args, _: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
    let mut sum = vec![0i32; (args.rows * args.cols) as usize];
    for bytes in gave {
        sum.iter_mut().zip(values(bytes)).for_each(|(sum, value)| *sum = sum.wrapping_add(value));
    }
    memory.store(args.out, &sum)
}

fn take_one(args: &Args, _: &Dims, gave: &Given, memory: &HostMemory<'_>) -> Result<()> {
    let from = (args.communicator.rank as usize + args.offset as usize) % gave.len();
    memory.store(args.out, &values(&gave[from]).collect::<Vec<_>>())
}

fn launch(cx: &mut OpStream, kernel: &'static Kernel<Args>, x: &Tensor, offset: usize) -> Result<Tensor> {
    let (rows, cols) = (x.dim(0), x.num_elements() / x.dim(0));
    let out = cx.empty(&[rows, cols], x.dtype())?;
    let (x_ptr, out_ptr) = (cx.addr(x)?, cx.addr(&out)?);
    cx.launch_collective(kernel, Dims::per_item(rows * cols, 64), |communicator| Args {
        communicator,
        x: x_ptr,
        out: out_ptr,
        rows: rows as u64,
        cols: cols as u64,
        x_stride: x.row_stride() as u64,
        offset: offset as u64,
    })?;
    Ok(out)
}

/// Returns the sum of all ranks' `x`.
pub(super) fn sum_ranks(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    launch(cx, &SUM_RANKS, x, 0)
}

/// Returns the `x` of the rank that is `offset` further.
pub(super) fn of_rank(cx: &mut OpStream, x: &Tensor, offset: usize) -> Result<Tensor> {
    launch(cx, &OF_RANK, x, offset)
}
