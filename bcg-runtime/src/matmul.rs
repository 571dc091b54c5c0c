//! Matrix products: the one operation that a device has a library for.
//!
//! - A product is enqueued like a kernel: now, into a capture, or late on the host device.
//! - Its workspace is arena memory, taken for the one product.
//! - How it is computed depends on its shape alone, and changes only in [`Device::tune_matmuls`]: the same shape, the
//!   same bits, eagerly and at replay.

use crate::device::traits::{Matmul, MatmulPlan, MatmulShape};
use crate::{DType, Device, DevicePtr, Error, MatmulTuning, OpStream, Result, Tensor};

const OP: &str = "OpStream::matmul";

impl OpStream {
    /// Enqueues `out[t, n] = sum_k x[t, k] * weight[n, k]`, summed in f32 and rounded once.
    ///
    /// # Shapes
    /// - `x`: `[T, K]`, bf16, f16 or f32 (true f32, no TF32).   - `weight`: `[N, K]`, same dtype.
    /// - `out`: `[T, N]`, same dtype or f32. All may be row-sliced.
    ///
    /// # Capture
    /// Enqueues one operation, of one kernel or a few. Frozen: shapes, addresses, the algorithm. Read again at each
    /// replay: `x` and `weight`. The workspace is arena memory.
    ///
    /// # Determinism
    /// The same shapes, strides and dtypes give the same bits until [`Device::tune_matmuls`] changes the algorithm. A
    /// row never depends on what other rows hold. On CUDA it may be summed in another order when T differs; on a host
    /// device it does not depend on T either.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::Kernel`] if cuBLASLt is missing or has no algorithm; those of
    /// [`OpStream::addr`] and [`OpStream::empty`]; the driver's.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
    /// let device = Device::host();
    /// let x = device.tensor(&[1, 2], &[1.0f32, 2.0])?;
    /// let weight = device.tensor(&[3, 2], &[1.0f32, 0.0, 0.0, 1.0, 1.0, 1.0])?;
    /// let mut runner = Runner::new(&device, RunnerOptions::default())?;
    /// let out = runner.eager(&(), |cx| {
    ///     let out = cx.empty(&[1, 3], DType::F32)?;
    ///     cx.matmul(&out, &x, &weight)?;
    ///     Ok(out)
    /// })?;
    /// assert_eq!(runner.read::<f32>(&out)?, [1.0, 2.0, 3.0]);
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn matmul(&mut self, out: &Tensor, x: &Tensor, weight: &Tensor) -> Result<()> {
        check(out, x, weight)?;
        let [x_ptr, weight_ptr, out_ptr] = [self.addr(x)?, self.addr(weight)?, self.addr(out)?];
        if out.num_elements() == 0 {
            return Ok(());
        }
        if x.dim(1) == 0 {
            return self.fill_zero(out);
        }
        let shape = MatmulShape {
            rows: x.dim(0),
            outputs: weight.dim(0),
            depth: x.dim(1),
            x_stride: stride(x),
            weight_stride: stride(weight),
            out_stride: stride(out),
            dtype: x.dtype(),
            out_dtype: out.dtype(),
            alignment: alignment(&[x_ptr, weight_ptr, out_ptr]),
        };
        let plan = self.device().backend().plan_matmul(&shape)?;
        self.reserve_workspace()?;
        let workspace = match plan.workspace_bytes {
            0 => None,
            bytes => Some(self.empty(&[bytes], DType::U8)?),
        };
        let workspace = workspace.as_ref().map_or(Ok(DevicePtr::NULL), |workspace| self.addr(workspace))?;
        let product = Matmul { shape, plan, x: x_ptr, weight: weight_ptr, out: out_ptr, workspace };
        self.count_launch("matmul");
        self.note_algorithm(&plan);
        self.multiply_with_others(&shape, |cx| {
            cx.enqueue("a matrix product", |device, stream| device.backend().matmul(stream, &product))
        })
    }

    /// Makes the arena large enough for the workspace of any plan, where it may grow: other numbers of rows, captured
    /// later, or tuning may need more than the plan at hand.
    fn reserve_workspace(&mut self) -> Result<()> {
        let bytes = self.device().backend().matmul_workspace_bytes_max();
        if bytes > 0 && !self.is_capturing() && !self.is_forked() {
            self.arena().alloc(bytes)?;
        }
        Ok(())
    }
}

impl Device {
    /// Times several algorithms for the matrix products seen so far, for each number of `rows`, and uses the fastest
    /// from now on, in this process and in later ones on such a device: choices are kept in the cache folder
    /// (`BCG_CACHE_DIR`, else `$XDG_CACHE_HOME/bcg`, else `~/.cache/bcg`).
    ///
    /// A product is timed up to the most rows that it was enqueued with, so run the largest forward first. What was
    /// tuned before is not timed again. It takes a few seconds at most, with memory of its own, and does nothing on the
    /// host device. Call it before graphs are captured: they keep the algorithm they were captured with.
    ///
    /// # Errors
    /// [`Error::CaptureForbidden`] while this thread captures; the driver's.
    ///
    /// # Example
    /// ```
    /// let device = bcg_runtime::Device::host();
    /// device.tune_matmuls(&[1, 8, 64], &mut |done, total| println!("{done} of {total} products"))?;
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn tune_matmuls(&self, rows: &[usize], progress: &mut dyn FnMut(usize, usize)) -> Result<MatmulTuning> {
        self.backend().tune_matmuls(rows, progress)
    }

    /// Returns how this device computes the products that it has seen, for devices of the same model with the same libraries,
    /// in this process or in others: ranks that compute the same must have the same bits, and each would tune by times of its
    /// own.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::Device;
    /// let (first, second) = (Device::host(), Device::host());
    /// first.tune_matmuls(&[1, 8], &mut |_, _| ())?;
    /// second.take_matmul_choices(&first.matmul_choices())?;
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn matmul_choices(&self) -> Vec<u8> {
        let records = self.backend().matmul_plans().into_iter().flat_map(|(shape, plan)| record(&shape, &plan));
        records.flat_map(u64::to_le_bytes).collect()
    }

    /// Computes products as another device does from now on, by what its [`Device::matmul_choices`] returned.
    ///
    /// # Errors
    /// [`Error::Other`] for bytes that are none of that; the driver's.
    pub fn take_matmul_choices(&self, choices: &[u8]) -> Result<()> {
        let (records, rest) = choices.as_chunks::<{ RECORD_LEN * size_of::<u64>() }>();
        let plans = records.iter().map(|record| {
            let (words, _) = record.as_chunks();
            let words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
            read_record(words.as_slice().try_into().ok()?)
        });
        let plans = plans.collect::<Option<Vec<_>>>().filter(|_| rest.is_empty());
        let plans = plans.ok_or_else(|| Error::other("what another device chose for its products cannot be read"))?;
        self.backend().set_matmul_plans(&plans)
    }
}

/// The words of a choice: the shape's, the workspace, the algorithm.
const RECORD_LEN: usize = 18;

/// The dtypes that factors and products have, in the order of their numbers in a record.
const FLOATS: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];

fn record(shape: &MatmulShape, plan: &MatmulPlan) -> [u64; RECORD_LEN] {
    let MatmulShape { rows, outputs, depth, x_stride, weight_stride, out_stride, dtype, out_dtype, alignment } = shape;
    let float = |dtype: &DType| FLOATS.iter().position(|known| known == dtype).unwrap_or(FLOATS.len());
    let numbers = [rows, outputs, depth, x_stride, weight_stride, out_stride].map(|number| *number as u64);
    let others = [float(dtype), float(out_dtype), *alignment, plan.workspace_bytes].map(|number| number as u64);
    let mut record = [0; RECORD_LEN];
    let all = numbers.into_iter().chain(others).chain(plan.algorithm);
    record.iter_mut().zip(all).for_each(|(place, word)| *place = word);
    record
}

fn read_record(record: &[u64; RECORD_LEN]) -> Option<(MatmulShape, MatmulPlan)> {
    let number = |at: usize| usize::try_from(record[at]).ok();
    let float = |at: usize| number(at).and_then(|at| FLOATS.get(at).copied());
    let shape = MatmulShape {
        rows: number(0)?,
        outputs: number(1)?,
        depth: number(2)?,
        x_stride: number(3)?,
        weight_stride: number(4)?,
        out_stride: number(5)?,
        dtype: float(6)?,
        out_dtype: float(7)?,
        alignment: number(8)?,
    };
    let (_, algorithm) = record.split_last_chunk()?;
    Some((shape, MatmulPlan { workspace_bytes: number(9)?, algorithm: *algorithm }))
}

fn check(out: &Tensor, x: &Tensor, weight: &Tensor) -> Result<()> {
    for (name, tensor) in [("x", x), ("weight", weight), ("out", out)] {
        if tensor.rank() != 2 {
            return Err(Error::shape(OP, format!("a matrix `{name}`"), format!("{:?}", tensor.shape())));
        }
    }
    let (weight_shape, out_shape) = ([weight.dim(0), x.dim(1)], [x.dim(0), weight.dim(0)]);
    if weight.shape() != weight_shape || weight.dtype() != x.dtype() {
        let got = format!("{:?} {}", weight.shape(), weight.dtype());
        return Err(Error::shape(OP, format!("`weight` {weight_shape:?} {}", x.dtype()), got));
    }
    if out.shape() != out_shape {
        return Err(Error::shape(OP, format!("`out` {out_shape:?}"), format!("{:?}", out.shape())));
    }
    match (x.dtype(), out.dtype()) {
        (DType::Bf16 | DType::F16 | DType::F32, DType::F32) | (DType::Bf16, DType::Bf16) | (DType::F16, DType::F16) => {
            Ok(())
        }
        (from, to) => Err(Error::shape(OP, "bf16, f16 or f32 to the same dtype or f32", format!("{from} to {to}"))),
    }
}

/// Elements from row to row; that of a single row says nothing, and would make a shape of its own.
fn stride(matrix: &Tensor) -> usize {
    if matrix.dim(0) == 1 { matrix.dim(1) } else { matrix.row_stride() }
}

/// The coarsest alignment that all addresses have: few different ones, so that addresses make few different shapes.
fn alignment(addresses: &[DevicePtr]) -> usize {
    let bits = addresses.iter().fold(256, |bits, address| bits | address.as_u64());
    match 1 << bits.trailing_zeros() {
        coarse @ (256 | 16) => coarse,
        32 | 64 | 128 => 16,
        fine => fine,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Runner, RunnerOptions};

    #[test]
    fn alignments_are_few() {
        let of = |a, b| alignment(&[DevicePtr(a), DevicePtr(b)]);
        assert_eq!(
            [of(512, 1024), of(512, 128), of(256, 48), of(256, 8), of(4, 256), of(2, 4)],
            [256, 16, 16, 8, 4, 2]
        );
    }

    #[test]
    fn choices_are_read_as_they_were_written() -> Result<()> {
        let shape = MatmulShape {
            rows: 7,
            outputs: 6144,
            depth: 4096,
            x_stride: 4100,
            weight_stride: 4096,
            out_stride: 6144,
            dtype: DType::Bf16,
            out_dtype: DType::F32,
            alignment: 16,
        };
        let plan = MatmulPlan { workspace_bytes: 1 << 25, algorithm: [1, 2, 3, 4, 5, 6, 7, u64::MAX] };
        assert_eq!(read_record(&record(&shape, &plan)), Some((shape, plan)));
        assert_eq!(read_record(&[u64::from(u32::MAX); RECORD_LEN]), None, "no such dtype");
        let device = Device::host();
        device.take_matmul_choices(&device.matmul_choices())?;
        let error = device.take_matmul_choices(b"half a word").unwrap_err().to_string();
        assert!(error.contains("cannot be read"), "{error}");
        Ok(())
    }

    #[test]
    fn wrong_operands_are_refused_by_name() -> Result<()> {
        let device = Device::host();
        let tensor = |shape: &[usize], dtype| device.zeros(shape, dtype);
        let (x, weight) = (tensor(&[2, 8], DType::Bf16)?, tensor(&[4, 8], DType::Bf16)?);
        let out = tensor(&[2, 4], DType::Bf16)?;
        let mut runner = Runner::new(&device, RunnerOptions::default())?;
        let mut refusal = |out: &Tensor, x: &Tensor, weight: &Tensor| {
            let error = runner.eager(&(), |cx| cx.matmul(out, x, weight)).expect_err("refused");
            assert!(matches!(error, Error::Shape { .. }), "{error}");
            error.to_string()
        };
        assert!(refusal(&out, &x, &tensor(&[8], DType::Bf16)?).contains("a matrix `weight`"));
        assert!(refusal(&out, &x, &tensor(&[4, 7], DType::Bf16)?).contains("`weight` [4, 8] bf16, got [4, 7] bf16"));
        assert!(refusal(&out, &x, &tensor(&[4, 8], DType::F32)?).contains("got [4, 8] f32"));
        assert!(refusal(&tensor(&[2, 5], DType::Bf16)?, &x, &weight).contains("`out` [2, 4], got [2, 5]"));
        assert!(refusal(&tensor(&[2, 4], DType::F16)?, &x, &weight).contains("got bf16 to f16"));
        Ok(())
    }

    #[test]
    fn empty_products_enqueue_nothing_and_empty_sums_are_zero() -> Result<()> {
        let device = Device::host();
        let mut runner = Runner::new(&device, RunnerOptions::default())?;
        let zeros = runner.eager(&(), |cx| {
            let (x, weight) = (cx.empty(&[2, 0], DType::F32)?, cx.empty(&[3, 0], DType::F32)?);
            let out = cx.empty(&[2, 3], DType::F32)?;
            cx.matmul(&out, &x, &weight)?;
            cx.matmul(&out.rows(0..0)?, &x.rows(0..0)?, &weight)?;
            Ok(out)
        })?;
        assert_eq!(runner.read::<f32>(&zeros)?, [0.0; 6]);
        assert_eq!(runner.stats().num_launches, 0);
        Ok(())
    }
}
