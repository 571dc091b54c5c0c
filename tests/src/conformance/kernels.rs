//! The kernels of the conformance rules: small, and exact on integers, so that results compare bit for bit.
//!
//! Matrices are `[T, C]` in f32, rows `stride` elements apart; a vector counts as one row.

use bcg_runtime::{DType, DevicePtr, Dims, HostFn, Kernel, KernelArgs, OpStream, Result, Source, Tensor};

static SOURCE: Source = Source::new(
    "conformance.cu",
    r#"
#include "args.cuh"
typedef unsigned long long u64;

extern "C" __global__ void axpy(AxpyArgs a) {
    u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (i >= a.rows * a.cols) return;
    u64 t = i / a.cols, c = i % a.cols;
    a.out[t * a.out_stride + c] = a.alpha * a.x[t * a.x_stride + c] + a.y[t * a.y_stride + c];
}

extern "C" __global__ void add_index(AddIndexArgs a) {
    u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (i >= a.rows * a.cols) return;
    u64 t = i / a.cols, c = i % a.cols;
    a.out[t * a.out_stride + c] = a.x[t * a.x_stride + c] + (float)c;
}

extern "C" __global__ void count(CountArgs a) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.cell += 1;
}

extern "C" __global__ void read_beyond(ReadBeyondArgs a) {
    if (blockIdx.x == 0 && threadIdx.x == 0) *a.out = a.x[a.offset];
}

extern "C" __global__ void column_sum(ColumnArgs a) {
    u64 c = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (c >= a.cols) return;
    u64 rows = (u64)*a.valid_rows < a.rows ? (u64)*a.valid_rows : a.rows;
    float sum = 0.0f;
    for (u64 t = 0; t < rows; t++) sum += a.x[t * a.cols + c];
    a.out[c] = sum;
}

extern "C" __global__ void reverse_scan(ColumnArgs a) {
    u64 c = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (c >= a.cols) return;
    u64 rows = (u64)*a.valid_rows < a.rows ? (u64)*a.valid_rows : a.rows;
    float sum = 0.0f;
    for (u64 t = a.rows; t-- > 0;) {
        if (t < rows) sum += a.x[t * a.cols + c];
        a.out[t * a.cols + c] = sum;
    }
}

extern "C" __global__ void route(ColumnArgs a) {
    u64 b = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (b >= a.cols) return;
    u64 rows = (u64)*a.valid_rows < a.rows ? (u64)*a.valid_rows : a.rows;
    int n = 0;
    for (u64 t = 0; t < rows; t++) n += a.x[t] == (float)b;
    ((int*)a.out)[b] = n;
}

extern "C" __global__ void geometry(GeometryArgs a) {
    extern __shared__ char bytes[];
    unsigned size;
    asm("mov.u32 %0, %dynamic_smem_size;" : "=r"(size));
    if (size > 0) bytes[size - 1] = (char)threadIdx.x;
    if (threadIdx.x == 0 && blockIdx.x < a.len) a.out[blockIdx.x] = (float)(gridDim.x * 100000 + blockDim.x * 100 + size / 1024);
}

extern "C" __global__ void copy_index(CopyIndexArgs a) {
    u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x;
    if (i < a.out_len) a.out[i] = (u64)a.index[i] < a.len ? a.x[a.index[i]] : -1.0f;
}
"#,
)
.takes::<AxpyArgs>()
.takes::<AddIndexArgs>()
.takes::<CountArgs>()
.takes::<ReadBeyondArgs>()
.takes::<ColumnArgs>()
.takes::<GeometryArgs>()
.takes::<CopyIndexArgs>();

const BLOCK: u32 = 128;

/// Declares a kernel of [`SOURCE`].
const fn kernel<A: KernelArgs>(name: &'static str, host: HostFn<A>) -> Kernel<A> {
    // SAFETY: each function below that launches one gives it rows, columns and strides of the tensors whose addresses it
    // gives, and no thread goes beyond them. `read_beyond` does on purpose: a rule sees it refused on the host device, and
    // asks no GPU for more than an element of its own memory.
    unsafe { Kernel::new(name, &SOURCE, host) }
}

/// Returns rows, columns and stride of a matrix; a vector is one row, and inner dimensions are columns.
fn matrix(x: &Tensor) -> (u64, u64, u64) {
    let rows = if x.rank() == 1 { 1 } else { x.dim(0) };
    let cols = x.num_elements() / rows.max(1);
    let stride = if x.rank() == 1 { cols } else { x.row_stride() };
    (rows as u64, cols as u64, stride as u64)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct AxpyArgs {
    #[points_to(const f32)]
    x: DevicePtr,
    #[points_to(const f32)]
    y: DevicePtr,
    #[points_to(f32)]
    out: DevicePtr,
    rows: u64,
    cols: u64,
    x_stride: u64,
    y_stride: u64,
    out_stride: u64,
    alpha: f32,
    pad: u32,
}

static AXPY: Kernel<AxpyArgs> = kernel("axpy", |a, _, memory| {
    for t in 0..a.rows as usize {
        let row = |ptr: DevicePtr, stride: u64| memory.view_at::<f32>(ptr, t * stride as usize, a.cols as usize);
        let (x, y, out) = (row(a.x, a.x_stride)?, row(a.y, a.y_stride)?, row(a.out, a.out_stride)?);
        for c in 0..out.len() {
            out[c].set(a.alpha * x[c].get() + y[c].get());
        }
    }
    Ok(())
});

/// `out = alpha * x + y`; `out` may be `x` or `y`.
pub fn axpy_into(cx: &mut OpStream, alpha: f32, x: &Tensor, y: &Tensor, out: &Tensor) -> Result<()> {
    let ((rows, cols, out_stride), (.., x_stride), (.., y_stride)) = (matrix(out), matrix(x), matrix(y));
    let (x, y, out) = (cx.addr(x)?, cx.addr(y)?, cx.addr(out)?);
    let args = AxpyArgs { x, y, out, rows, cols, x_stride, y_stride, out_stride, alpha, pad: 0 };
    cx.launch(&AXPY, Dims::per_item((rows * cols) as usize, BLOCK), args)
}

/// Returns `alpha * x + y`.
pub fn axpy(cx: &mut OpStream, alpha: f32, x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let out = cx.empty(x.shape(), x.dtype())?;
    axpy_into(cx, alpha, x, y, &out)?;
    Ok(out)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct AddIndexArgs {
    #[points_to(const f32)]
    x: DevicePtr,
    #[points_to(f32)]
    out: DevicePtr,
    rows: u64,
    cols: u64,
    x_stride: u64,
    out_stride: u64,
}

static ADD_INDEX: Kernel<AddIndexArgs> = kernel("add_index", |a, _, memory| {
    for t in 0..a.rows as usize {
        let x = memory.view_at::<f32>(a.x, t * a.x_stride as usize, a.cols as usize)?;
        let out = memory.view_at::<f32>(a.out, t * a.out_stride as usize, a.cols as usize)?;
        for c in 0..out.len() {
            out[c].set(x[c].get() + c as f32);
        }
    }
    Ok(())
});

/// `out[t, c] = x[t, c] + c`; `out` may be `x`.
pub fn add_index_into(cx: &mut OpStream, x: &Tensor, out: &Tensor) -> Result<()> {
    let ((rows, cols, out_stride), (.., x_stride)) = (matrix(out), matrix(x));
    let (x, out) = (cx.addr(x)?, cx.addr(out)?);
    let args = AddIndexArgs { x, out, rows, cols, x_stride, out_stride };
    cx.launch(&ADD_INDEX, Dims::per_item((rows * cols) as usize, BLOCK), args)
}

/// Returns `x[t, c] + c`.
pub fn add_index(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    let out = cx.empty(x.shape(), x.dtype())?;
    add_index_into(cx, x, &out)?;
    Ok(out)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct CountArgs {
    #[points_to(i32)]
    cell: DevicePtr,
}

static COUNT: Kernel<CountArgs> = kernel("count", |a, _, memory| {
    let cell = &memory.view::<i32>(a.cell, 1)?[0];
    cell.set(cell.get() + 1);
    Ok(())
});

/// Adds one to `cell[0]`, an i32: counts how often the work ran.
pub fn count(cx: &mut OpStream, cell: &Tensor) -> Result<()> {
    let args = CountArgs { cell: cx.addr(cell)? };
    cx.launch(&COUNT, Dims::linear(1, 32), args)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct ReadBeyondArgs {
    #[points_to(const f32)]
    x: DevicePtr,
    #[points_to(f32)]
    out: DevicePtr,
    offset: u64,
}

static READ_BEYOND: Kernel<ReadBeyondArgs> = kernel("read_beyond", |a, _, memory| {
    let value = memory.view_at::<f32>(a.x, a.offset as usize, 1)?[0].get();
    memory.store(a.out, &[value])
});

/// Copies the element `offset` after the start of `x`, wherever that is: a kernel with a fault.
pub fn read_beyond(cx: &mut OpStream, x: &Tensor, offset: u64, out: &Tensor) -> Result<()> {
    let args = ReadBeyondArgs { x: cx.addr(x)?, out: cx.addr(out)?, offset };
    cx.launch(&READ_BEYOND, Dims::linear(1, 32), args)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct ColumnArgs {
    #[points_to(const f32)]
    x: DevicePtr,
    #[points_to(f32)]
    out: DevicePtr,
    #[points_to(const i32)]
    valid_rows: DevicePtr,
    rows: u64,
    cols: u64,
}

impl ColumnArgs {
    fn valid(&self, memory: &bcg_runtime::HostMemory<'_>) -> Result<usize> {
        let valid = memory.view::<i32>(self.valid_rows, 1)?[0].get() as usize;
        Ok(valid.min(self.rows as usize))
    }
}

static COLUMN_SUM: Kernel<ColumnArgs> = kernel("column_sum", |a, _, memory| {
    let cols = a.cols as usize;
    let x = memory.view::<f32>(a.x, a.rows as usize * cols)?;
    let out = memory.view::<f32>(a.out, cols)?;
    let valid = a.valid(memory)?;
    for c in 0..cols {
        out[c].set((0..valid).map(|t| x[t * cols + c].get()).fold(0.0, |sum, v| sum + v));
    }
    Ok(())
});

/// Returns the sum over the valid rows of each column: `[C]`.
pub fn column_sum(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    let out = cx.empty(&[x.dim(1)], x.dtype())?;
    let (rows, cols) = (x.dim(0) as u64, x.dim(1) as u64);
    let args = ColumnArgs { x: cx.addr(x)?, out: cx.addr(&out)?, valid_rows: cx.valid_rows_ptr(), rows, cols };
    cx.launch(&COLUMN_SUM, Dims::per_item(cols as usize, BLOCK), args)?;
    Ok(out)
}

static REVERSE_SCAN: Kernel<ColumnArgs> = kernel("reverse_scan", |a, _, memory| {
    let (rows, cols) = (a.rows as usize, a.cols as usize);
    let x = memory.view::<f32>(a.x, rows * cols)?;
    let out = memory.view::<f32>(a.out, rows * cols)?;
    let valid = a.valid(memory)?;
    for c in 0..cols {
        let mut sum = 0.0;
        for t in (0..rows).rev() {
            sum += if t < valid { x[t * cols + c].get() } else { 0.0 };
            out[t * cols + c].set(sum);
        }
    }
    Ok(())
});

/// Returns the sum over this and all later valid rows, for each row: padding comes first in its order, so a tail that is
/// not ignored spoils every row.
pub fn reverse_scan(cx: &mut OpStream, x: &Tensor) -> Result<Tensor> {
    let out = cx.empty(x.shape(), x.dtype())?;
    let (rows, cols) = (x.dim(0) as u64, x.dim(1) as u64);
    let args = ColumnArgs { x: cx.addr(x)?, out: cx.addr(&out)?, valid_rows: cx.valid_rows_ptr(), rows, cols };
    cx.launch(&REVERSE_SCAN, Dims::per_item(cols as usize, BLOCK), args)?;
    Ok(out)
}

static ROUTE: Kernel<ColumnArgs> = kernel("route", |a, _, memory| {
    let keys = memory.view::<f32>(a.x, a.rows as usize)?;
    let counts = memory.view::<i32>(a.out, a.cols as usize)?;
    let valid = a.valid(memory)?;
    for (bucket, count) in counts.iter().enumerate() {
        count.set(keys[..valid].iter().filter(|key| key.get() == bucket as f32).count() as i32);
    }
    Ok(())
});

/// Returns how many valid rows have each key in `0..buckets`: i32 `[buckets]`.
pub fn route(cx: &mut OpStream, keys: &Tensor, buckets: usize) -> Result<Tensor> {
    let out = cx.empty(&[buckets], DType::I32)?;
    let (rows, cols) = (keys.dim(0) as u64, buckets as u64);
    let args = ColumnArgs { x: cx.addr(keys)?, out: cx.addr(&out)?, valid_rows: cx.valid_rows_ptr(), rows, cols };
    cx.launch(&ROUTE, Dims::per_item(buckets, BLOCK), args)?;
    Ok(out)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct CopyIndexArgs {
    #[points_to(const f32)]
    x: DevicePtr,
    #[points_to(const i32)]
    index: DevicePtr,
    #[points_to(f32)]
    out: DevicePtr,
    len: u64,
    out_len: u64,
}

static COPY_INDEX: Kernel<CopyIndexArgs> = kernel("copy_index", |a, _, memory| {
    let x = memory.view::<f32>(a.x, a.len as usize)?;
    let index = memory.view::<i32>(a.index, a.out_len as usize)?;
    let out = memory.view::<f32>(a.out, a.out_len as usize)?;
    for i in 0..out.len() {
        out[i].set(x.get(index[i].get() as usize).map_or(-1.0, std::cell::Cell::get));
    }
    Ok(())
});

/// Returns `x[index[i]]`, or -1 where the index is out of range.
pub fn copy_index(cx: &mut OpStream, x: &Tensor, index: &Tensor) -> Result<Tensor> {
    let out = cx.empty(index.shape(), x.dtype())?;
    let (len, out_len) = (x.num_elements() as u64, index.num_elements() as u64);
    let args = CopyIndexArgs { x: cx.addr(x)?, index: cx.addr(index)?, out: cx.addr(&out)?, len, out_len };
    cx.launch(&COPY_INDEX, Dims::per_item(out_len as usize, BLOCK), args)?;
    Ok(out)
}

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
struct GeometryArgs {
    #[points_to(f32)]
    out: DevicePtr,
    len: u64,
}

static GEOMETRY: Kernel<GeometryArgs> = kernel("geometry", |a, dims, memory| {
    let value = dims.grid[0] * 100_000 + dims.block[0] * 100 + dims.shared_bytes / 1024;
    let out = memory.view::<f32>(a.out, a.len as usize)?;
    out.iter().take(dims.grid[0] as usize).for_each(|out| out.set(value as f32));
    Ok(())
});

/// Each block writes what it was launched with into its element of `out`: blocks, threads, KiB of shared memory.
pub fn geometry(cx: &mut OpStream, dims: Dims, out: &Tensor) -> Result<()> {
    let args = GeometryArgs { out: cx.addr(out)?, len: out.num_elements() as u64 };
    cx.launch(&GEOMETRY, dims, args)
}
