//! Tensor maps: what Hopper's tensor memory accelerator (TMA) needs to know of a tensor.

use crate::{CaptureStream, DType, DevicePtr, Result};

/// The most dimensions of a tensor map.
pub(crate) const TENSOR_MAP_RANK_MAX: usize = 5;

/// A tensor map (`CUtensorMap`), passed by value within a kernel's argument struct; in CUDA it needs `alignas(64)`, and
/// the kernel's parameter `__grid_constant__`. Without meaning, all zeros, on the host device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct TensorMap(pub(crate) [u64; 16]);

/// The tiles that a tensor map copies: boxes of a tensor of up to 5 dimensions, the innermost one first.
///
/// In shared memory the bytes of a box have the 128-byte swizzle, so its innermost dimension has at most 128 bytes. What
/// lies outside of the tensor is read as zeros.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions, TensorMapSpec};
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.zeros(&[256, 64], DType::Bf16)?;
/// runner.eager(&(), |cx| {
///     let address = cx.addr(&x)?;
///     let spec = TensorMapSpec { address, dtype: x.dtype(), dims: &[64, 256], strides_bytes: &[128], box_dims: &[64, 128] };
///     cx.tensor_map(&spec).map(|_| ())
/// })?;
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMapSpec<'a> {
    /// Where the tensor begins: a multiple of 16.
    pub address: DevicePtr,
    /// Its elements.
    pub dtype: DType,
    /// Elements of each dimension.
    pub dims: &'a [u64],
    /// Bytes from one index to the next of each dimension but the innermost: multiples of 16.
    pub strides_bytes: &'a [u64],
    /// Elements of a box in each dimension, at most 256.
    pub box_dims: &'a [u32],
}

impl CaptureStream {
    /// Makes a tensor map for a kernel's arguments. The address comes from [`CaptureStream::addr`].
    ///
    /// # Capture
    /// Frozen, as an address is.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if the slices do not belong to one rank from 1 to 5; the driver's, for a tensor or a box
    /// that the hardware cannot copy.
    pub fn tensor_map(&mut self, spec: &TensorMapSpec<'_>) -> Result<TensorMap> {
        let rank = spec.dims.len();
        if !(1..=TENSOR_MAP_RANK_MAX).contains(&rank)
            || spec.box_dims.len() != rank
            || spec.strides_bytes.len() + 1 != rank
        {
            let got = format!("{} dims, {} strides, {} box dims", rank, spec.strides_bytes.len(), spec.box_dims.len());
            return Err(crate::Error::shape("CaptureStream::tensor_map", "rank, rank - 1 and rank, up to 5", got));
        }
        self.device().backend().tensor_map(spec)
    }
}
