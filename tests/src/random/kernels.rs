//! The kernels of random programs: wrapping i32 arithmetic on row-sliced matrices, so that every device agrees bit for bit.

use bcg_runtime::{DevicePtr, Dims, HostFn, HostMemory, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

static SOURCE: Source = Source::new(
    "random.cu",
    r#"
#include "args.cuh"
typedef unsigned long long u64;
typedef unsigned int u32;

// out = a * x + b * y + c
extern "C" __global__ void mix(Args k) {
    u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (i >= k.rows * k.cols) return;
    u64 t = i / k.cols, c = i % k.cols;
    k.out[t * k.out_stride + c] = k.a * k.x[t * k.x_stride + c] + k.b * k.y[t * k.y_stride + c] + k.c;
}

// out[t] = x[y[t][0] mod rows of x]
extern "C" __global__ void gather(Args k) {
    u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (i >= k.rows * k.cols) return;
    u64 t = i / k.cols, c = i % k.cols;
    u64 from = k.y[t * k.y_stride] % (u32)k.x_rows;
    k.out[t * k.out_stride + c] = k.x[from * k.x_stride + c];
}

// out[t] = x[t] + y[0]
extern "C" __global__ void add_row(Args k) {
    u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (i >= k.rows * k.cols) return;
    u64 t = i / k.cols, c = i % k.cols;
    k.out[t * k.out_stride + c] = k.x[t * k.x_stride + c] + k.y[c];
}

// out[0] = sum of the valid rows of x
extern "C" __global__ void sum_rows(Args k) {
    u64 c = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (c >= k.cols) return;
    u64 valid = (u64)*k.valid_rows < k.x_rows ? (u64)*k.valid_rows : k.x_rows;
    u32 sum = 0;
    for (u64 t = 0; t < valid; t++) sum += k.x[t * k.x_stride + c];
    k.out[c] = sum;
}

// out[t] = sum of the valid rows from t on
extern "C" __global__ void scan_rows(Args k) {
    u64 c = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (c >= k.cols) return;
    u64 valid = (u64)*k.valid_rows < k.x_rows ? (u64)*k.valid_rows : k.x_rows;
    u32 sum = 0;
    for (u64 t = k.rows; t-- > 0;) {
        if (t < valid) sum += k.x[t * k.x_stride + c];
        k.out[t * k.out_stride + c] = sum;
    }
}
"#,
)
.takes::<Args>();

const BLOCK: u32 = 64;

/// Declares a kernel of [`SOURCE`].
const fn kernel(name: &'static str, host: HostFn<Args>) -> Kernel<Args> {
    // SAFETY: `args`, below, makes the arguments of every launch: rows, columns and strides of the tensors whose addresses it
    // gives. No thread goes beyond them.
    unsafe { Kernel::new(name, &SOURCE, host) }
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct Args {
    #[points_to(const u32)]
    x: DevicePtr,
    #[points_to(const u32)]
    y: DevicePtr,
    #[points_to(u32)]
    out: DevicePtr,
    #[points_to(const i32)]
    valid_rows: DevicePtr,
    rows: u64,
    cols: u64,
    x_rows: u64,
    x_stride: u64,
    y_stride: u64,
    out_stride: u64,
    a: i32,
    b: i32,
    c: i32,
    pad: i32,
}

type Row<'a> = &'a [std::cell::Cell<i32>];

impl Args {
    fn row<'a>(memory: &HostMemory<'a>, ptr: DevicePtr, stride: u64, t: usize, cols: usize) -> Result<Row<'a>> {
        memory.view_at::<i32>(ptr, t * stride as usize, cols)
    }

    fn x<'a>(&self, memory: &HostMemory<'a>, t: usize) -> Result<Row<'a>> {
        Self::row(memory, self.x, self.x_stride, t, self.cols as usize)
    }

    fn y<'a>(&self, memory: &HostMemory<'a>, t: usize, cols: usize) -> Result<Row<'a>> {
        Self::row(memory, self.y, self.y_stride, t, cols)
    }

    fn out<'a>(&self, memory: &HostMemory<'a>, t: usize) -> Result<Row<'a>> {
        Self::row(memory, self.out, self.out_stride, t, self.cols as usize)
    }

    fn valid(&self, memory: &HostMemory<'_>) -> Result<usize> {
        Ok((memory.view::<i32>(self.valid_rows, 1)?[0].get() as usize).min(self.x_rows as usize))
    }
}

static MIX: Kernel<Args> = kernel("mix", |k, _, memory| {
    for t in 0..k.rows as usize {
        let (x, y, out) = (k.x(memory, t)?, k.y(memory, t, k.cols as usize)?, k.out(memory, t)?);
        for c in 0..out.len() {
            let sum = k.a.wrapping_mul(x[c].get()).wrapping_add(k.b.wrapping_mul(y[c].get()));
            out[c].set(sum.wrapping_add(k.c));
        }
    }
    Ok(())
});

static GATHER: Kernel<Args> = kernel("gather", |k, _, memory| {
    for t in 0..k.rows as usize {
        let from = k.y(memory, t, 1)?[0].get() as u32 % k.x_rows as u32;
        let (x, out) = (k.x(memory, from as usize)?, k.out(memory, t)?);
        out.iter().zip(x).for_each(|(out, x)| out.set(x.get()));
    }
    Ok(())
});

static ADD_ROW: Kernel<Args> = kernel("add_row", |k, _, memory| {
    let y = k.y(memory, 0, k.cols as usize)?;
    for t in 0..k.rows as usize {
        let (x, out) = (k.x(memory, t)?, k.out(memory, t)?);
        for c in 0..out.len() {
            out[c].set(x[c].get().wrapping_add(y[c].get()));
        }
    }
    Ok(())
});

static SUM_ROWS: Kernel<Args> = kernel("sum_rows", |k, _, memory| {
    let mut sums = vec![0i32; k.cols as usize];
    for t in 0..k.valid(memory)? {
        let row = k.x(memory, t)?;
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum = sum.wrapping_add(x.get()));
    }
    memory.store(k.out, &sums)
});

static SCAN_ROWS: Kernel<Args> = kernel("scan_rows", |k, _, memory| {
    let valid = k.valid(memory)?;
    let mut sums = vec![0i32; k.cols as usize];
    for t in (0..k.rows as usize).rev() {
        let (x, out) = (k.x(memory, t)?, k.out(memory, t)?);
        for c in 0..out.len() {
            sums[c] = if t < valid { sums[c].wrapping_add(x[c].get()) } else { sums[c] };
            out[c].set(sums[c]);
        }
    }
    Ok(())
});

fn args(cx: &mut OpStream, x: &Tensor, y: &Tensor, out: &Tensor) -> Result<Args> {
    let rows = out.dim(0);
    Ok(Args {
        x: cx.addr(x)?,
        y: cx.addr(y)?,
        out: cx.addr(out)?,
        valid_rows: cx.valid_rows_ptr(),
        rows: rows as u64,
        cols: (out.num_elements() / rows) as u64,
        x_rows: x.dim(0) as u64,
        x_stride: x.row_stride() as u64,
        y_stride: y.row_stride() as u64,
        out_stride: out.row_stride() as u64,
        a: 0,
        b: 0,
        c: 0,
        pad: 0,
    })
}

fn launch(cx: &mut OpStream, kernel: &'static Kernel<Args>, args: Args) -> Result<()> {
    cx.launch(kernel, Dims::per_item((args.rows * args.cols) as usize, BLOCK), args)
}

/// `out = a * x + b * y + c`, all of one shape.
pub(super) fn mix(cx: &mut OpStream, [a, b, c]: [i32; 3], x: &Tensor, y: &Tensor, out: &Tensor) -> Result<()> {
    let args = args(cx, x, y, out)?;
    launch(cx, &MIX, Args { a, b, c, ..args })
}

/// Returns the rows of `x` that the first column of `index` names.
pub(super) fn gather(cx: &mut OpStream, x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let cols = x.num_elements() / x.dim(0);
    let out = cx.empty(&[index.dim(0), cols], x.dtype())?;
    let args = args(cx, x, index, &out)?;
    launch(cx, &GATHER, args)?;
    Ok(out)
}

/// Returns `x + row`, for each row of `x`.
pub(super) fn add_row(cx: &mut OpStream, x: &Tensor, row: &Tensor) -> Result<Tensor> {
    let out = cx.empty(x.shape(), x.dtype())?;
    let args = args(cx, x, row, &out)?;
    launch(cx, &ADD_ROW, args)?;
    Ok(out)
}

/// Returns the sum of the valid rows, as one row.
pub(super) fn sum_rows(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    let out = cx.empty(&[1, x.num_elements() / x.dim(0)], x.dtype())?;
    let args = args(cx, x, x, &out)?;
    launch(cx, &SUM_ROWS, args)?;
    Ok(out)
}

/// Returns the sum of the valid rows from each row on.
pub(super) fn scan_rows(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    let out = cx.empty(x.shape(), x.dtype())?;
    let args = args(cx, x, x, &out)?;
    launch(cx, &SCAN_ROWS, args)?;
    Ok(out)
}
