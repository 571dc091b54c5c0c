//! A tensor handle: an address, a shape, a row stride, and what keeps its memory.
//!
//! Invariants:
//! - Rows (dimension 0) are `row_stride` elements apart; within a row elements are contiguous.
//! - A persistent tensor keeps its allocation alive. An arena tensor belongs to one forward of one arena and is refused
//!   in any other ([`Error::Stale`], [`Error::Foreign`]; law L10).
//! - Nothing but [`crate::OpStream::addr`] and the device's own read and write turn a tensor into an address.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::arena::{Arena, ArenaBlock};
use crate::device::{Allocation, SharedMemory, StreamRef};
use crate::generation::{Generation, Stamp};
use crate::op::Op;
use crate::shape::Shape;
use crate::{DType, Device, DevicePtr, Element, Error, Result};

/// A handle to elements in device memory. Cloning is cheap and means the same memory.
///
/// Shapes have 1 to 4 dimensions. A tensor is contiguous, or *row-sliced*: its rows (dimension 0) lie further apart
/// than they are long, as in a column range of a matrix.
///
/// # Example
/// ```
/// use bcg_runtime::Device;
/// let device = Device::host();
/// let qkv = device.tensor(&[2, 4], &[1i32, 2, 3, 4, 5, 6, 7, 8])?;
/// let k = qkv.columns(2..3)?;
/// assert_eq!((k.shape(), k.row_stride(), k.is_contiguous()), (&[2, 1][..], 4, false));
/// assert_eq!(device.read::<i32>(&k)?, [3, 7]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensor {
    pub(crate) ptr: DevicePtr,
    pub(crate) shape: Shape,
    pub(crate) row_stride: usize,
    pub(crate) dtype: DType,
    pub(crate) storage: Storage,
}

/// What keeps a tensor's memory.
#[derive(Clone)]
pub(crate) enum Storage {
    Persistent(Arc<PersistentBuffer>),
    Arena(ArenaBlock),
}

/// An allocation of its own, with the generation it belongs to.
#[derive(Debug)]
pub(crate) struct PersistentBuffer {
    memory: PersistentMemory,
    stamp: OnceLock<Stamp>,
}

#[derive(Debug)]
enum PersistentMemory {
    Own(Allocation),
    Shared(SharedMemory),
}

impl PersistentBuffer {
    pub(crate) fn device(&self) -> &Device {
        match &self.memory {
            PersistentMemory::Own(memory) => memory.device(),
            PersistentMemory::Shared(memory) => memory.device(),
        }
    }

    /// Tells whether work of a device may use the memory.
    pub(crate) fn is_reachable_from(&self, device: &Device) -> bool {
        match &self.memory {
            PersistentMemory::Own(memory) => memory.device().is(device),
            PersistentMemory::Shared(memory) => memory.is_reachable_from(device),
        }
    }

    pub(crate) fn stamp(&self) -> Option<&Stamp> {
        self.stamp.get()
    }
}

impl Tensor {
    pub(crate) fn persistent(device: &Device, shape: &[usize], dtype: DType) -> Result<Self> {
        let shape = Shape::new("Device::empty", shape)?;
        let allocation = Allocation::new(device, shape.num_elements() * dtype.size_bytes())?;
        Ok(Self::in_buffer(allocation.ptr(), PersistentMemory::Own(allocation), shape, dtype))
    }

    fn in_buffer(ptr: DevicePtr, memory: PersistentMemory, shape: Shape, dtype: DType) -> Self {
        let buffer = Arc::new(PersistentBuffer { memory, stamp: OnceLock::new() });
        Self { ptr, shape, row_stride: shape.row_elements(), dtype, storage: Storage::Persistent(buffer) }
    }

    /// Takes memory of an arena for a tensor with undefined contents.
    pub(crate) fn in_arena(arena: &Arena, shape: Shape, dtype: DType) -> Result<Self> {
        let (ptr, block) = arena.alloc(shape.num_elements() * dtype.size_bytes())?;
        Ok(Self { ptr, shape, row_stride: shape.row_elements(), dtype, storage: Storage::Arena(block) })
    }

    /// Marks a persistent tensor as belonging to the current generation of a resource.
    ///
    /// # Errors
    /// [`Error::Foreign`] for an arena tensor; [`Error::Option`] if it was stamped before.
    pub fn stamped(self, generation: &Generation) -> Result<Self> {
        let Storage::Persistent(buffer) = &self.storage else {
            let current = "a generation, which only persistent tensors can have".to_owned();
            return Err(Error::Foreign { tensor: "an arena".to_owned(), current });
        };
        buffer.stamp.set(generation.stamp()).map_err(|_| Error::Option {
            option: "Tensor::stamped",
            message: "the tensor has a generation already; stamp each tensor once, when it is made".to_owned(),
        })?;
        Ok(self)
    }

    /// Tells whether the tensor has memory of its own, as weights have; false for one in a stream's arena.
    pub fn is_persistent(&self) -> bool {
        matches!(self.storage, Storage::Persistent(_))
    }

    /// Returns the sizes of the dimensions.
    pub fn shape(&self) -> &[usize] {
        self.shape.dims()
    }

    /// Returns the size of one dimension.
    ///
    /// # Panics
    /// If there is no such dimension.
    pub fn dim(&self, dim: usize) -> usize {
        self.shape.dims()[dim]
    }

    /// Returns the number of dimensions.
    pub fn rank(&self) -> usize {
        self.shape.dims().len()
    }

    /// Returns the element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.num_elements()
    }

    /// Returns the distance between rows (indices of dimension 0), in elements.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// Tells whether the rows follow each other without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.row_stride == self.shape.row_elements() || self.dim(0) <= 1
    }

    /// Returns the bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.shape.row_elements() * self.dtype.size_bytes()
    }

    /// Returns the bytes of all elements, gaps not counted.
    pub fn size_bytes(&self) -> usize {
        self.num_elements() * self.dtype.size_bytes()
    }

    /// Returns the rows of a range, sharing memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if the range is not within dimension 0.
    pub fn rows(&self, range: Range<usize>) -> Result<Self> {
        if range.start > range.end || range.end > self.dim(0) {
            return Err(Error::shape(
                "Tensor::rows",
                format!("a range within 0..{}", self.dim(0)),
                format!("{range:?}"),
            ));
        }
        let mut rows = self.clone();
        rows.ptr = self.ptr.offset_bytes(range.start * self.row_stride * self.dtype.size_bytes());
        rows.shape = self.shape.with_dim(0, range.len());
        Ok(rows)
    }

    /// Returns the columns of a range of a matrix, sharing memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if the rank is not 2 or the range is not within dimension 1.
    pub fn columns(&self, range: Range<usize>) -> Result<Self> {
        if self.rank() != 2 || range.start > range.end || range.end > self.dim(1) {
            let expected = "a matrix and a range within its columns";
            return Err(Error::shape("Tensor::columns", expected, format!("{:?} and {range:?}", self.shape)));
        }
        let mut columns = self.clone();
        columns.ptr = self.ptr.offset_bytes(range.start * self.dtype.size_bytes());
        columns.shape = self.shape.with_dim(1, range.len());
        Ok(columns)
    }

    /// Returns the same elements with other dimensions, sharing memory.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs, or if the tensor is row-sliced and dimension 0 changes.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let new = Shape::new("Tensor::reshape", shape)?;
        let keeps_rows = self.is_contiguous() || new.dims()[0] == self.dim(0);
        if new.num_elements() != self.num_elements() || !keeps_rows {
            let kind = if self.is_contiguous() { "" } else { "row-sliced " };
            return Err(Error::shape("Tensor::reshape", format!("{new:?}"), format!("{kind}{:?}", self.shape)));
        }
        let row_stride = if self.is_contiguous() { new.row_elements() } else { self.row_stride };
        Ok(Self { shape: new, row_stride, ..self.clone() })
    }

    pub(crate) fn check_dtype(&self, op: &'static str, dtype: DType) -> Result<()> {
        if self.dtype == dtype { Ok(()) } else { Err(Error::shape(op, dtype, self.dtype)) }
    }

    /// Returns the address of a persistent tensor on `device`.
    pub(crate) fn persistent_addr(&self, device: &Device) -> Result<DevicePtr> {
        match &self.storage {
            Storage::Persistent(buffer) if buffer.is_reachable_from(device) => Ok(self.ptr),
            Storage::Persistent(buffer) => Err(Error::foreign(buffer.device().name(), device.name())),
            Storage::Arena(_) => Err(Error::foreign(
                "a runner's arena",
                &format!("{} outside that runner (use Runner::read)", device.name()),
            )),
        }
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.storage {
            Storage::Persistent(_) => "persistent",
            Storage::Arena(_) => "arena",
        };
        write!(f, "Tensor({} {:?} {kind} at {:#x})", self.dtype, self.shape, self.ptr.as_u64())
    }
}

/// Tensors of a device, outside of any forward.
impl Device {
    /// Allocates a persistent tensor with undefined contents (NaN on the host device).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Shape`] for a rank above 4.
    pub fn empty(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::persistent(self, shape, dtype)
    }

    /// Allocates a persistent tensor in memory of this device that work of the devices `with` may read and write too, at the
    /// same address. What one device writes another one reads after an [`Event`](crate::Event), or once the host has waited
    /// for the writing.
    ///
    /// # Errors
    /// As [`Device::empty`]; [`Error::NoDevice`] for a GPU that cannot reach the memory; [`Error::Option`] for devices of
    /// several kinds.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
    /// let (near, far) = (Device::host(), Device::host());
    /// let shared = far.empty_shared(&[near.clone()], &[2], DType::I32)?;
    /// let numbers = near.tensor(&[2], &[1i32, 2])?;
    /// let mut runner = Runner::new(&near, RunnerOptions::default())?;
    /// runner.eager(&(), |cx| cx.copy(&shared, &numbers))?;
    /// runner.synchronize()?;
    /// assert_eq!(far.read::<i32>(&shared)?, [1, 2]);
    /// # Ok::<(), bcg_runtime::Error>(())
    /// ```
    pub fn empty_shared(&self, with: &[Device], shape: &[usize], dtype: DType) -> Result<Tensor> {
        let shape = Shape::new("Device::empty_shared", shape)?;
        let memory = SharedMemory::new(self, with, shape.num_elements() * dtype.size_bytes())?;
        Ok(Tensor::in_buffer(memory.ptr(), PersistentMemory::Shared(memory), shape, dtype))
    }

    /// Allocates a persistent tensor of zeros.
    ///
    /// # Errors
    /// As [`Device::empty`].
    pub fn zeros(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let tensor = self.empty(shape, dtype)?;
        self.fill_zero(&tensor)?;
        Ok(tensor)
    }

    /// As [`Device::empty_shared`], filled with zeros.
    ///
    /// # Errors
    /// As [`Device::empty_shared`].
    pub fn zeros_shared(&self, with: &[Device], shape: &[usize], dtype: DType) -> Result<Tensor> {
        let tensor = self.empty_shared(with, shape, dtype)?;
        self.fill_zero(&tensor)?;
        Ok(tensor)
    }

    fn fill_zero(&self, tensor: &Tensor) -> Result<()> {
        if tensor.size_bytes() > 0 {
            let stream = self.own_stream()?;
            let dst = tensor.persistent_addr(self)?;
            stream.backend.enqueue(stream.handle, &Op::Fill { dst, byte: 0, bytes: tensor.size_bytes() })?;
            stream.backend.synchronize_stream(stream.handle)?;
        }
        Ok(())
    }

    /// Allocates a persistent tensor that holds `data`, in row-major order.
    ///
    /// # Errors
    /// As [`Device::empty`]; [`Error::Shape`] if `data` has another length.
    pub fn tensor<T: Element>(&self, shape: &[usize], data: &[T]) -> Result<Tensor> {
        self.tensor_from_bytes(shape, T::DTYPE, bytemuck::cast_slice(data))
    }

    /// Allocates a persistent tensor from the raw bytes of its elements, in row-major order.
    ///
    /// # Errors
    /// As [`Device::tensor`].
    pub fn tensor_from_bytes(&self, shape: &[usize], dtype: DType, bytes: &[u8]) -> Result<Tensor> {
        let tensor = self.empty(shape, dtype)?;
        self.write_bytes(&tensor, bytes)?;
        Ok(tensor)
    }

    /// Reads a persistent tensor, in row-major order, after all work of the device.
    ///
    /// # Errors
    /// [`Error::Shape`] if `T` is not its dtype; [`Error::Foreign`] for a tensor of an arena (read that through its
    /// runner) or of another device; the first error of the work waited for.
    pub fn read<T: Element>(&self, tensor: &Tensor) -> Result<Vec<T>> {
        tensor.check_dtype("Device::read", T::DTYPE)?;
        let ptr = tensor.persistent_addr(self)?;
        let stream = self.own_stream()?;
        self.synchronize()?;
        read_rows(stream, tensor, ptr)
    }

    /// Writes a persistent tensor, in row-major order, after all work of the device and before any later work.
    ///
    /// # Errors
    /// As [`Device::read`]; [`Error::Shape`] if `data` has another length.
    pub fn write<T: Element>(&self, tensor: &Tensor, data: &[T]) -> Result<()> {
        tensor.check_dtype("Device::write", T::DTYPE)?;
        self.write_bytes(tensor, bytemuck::cast_slice(data))
    }

    fn write_bytes(&self, tensor: &Tensor, bytes: &[u8]) -> Result<()> {
        let ptr = tensor.persistent_addr(self)?;
        let stream = self.own_stream()?;
        self.synchronize()?;
        write_rows("Device::write", stream, tensor, ptr, bytes)?;
        stream.backend.synchronize_stream(stream.handle)
    }
}

/// Copies a tensor's elements to the host, in row-major order, and waits for them.
pub(crate) fn read_rows<T: Element>(stream: StreamRef<'_>, tensor: &Tensor, ptr: DevicePtr) -> Result<Vec<T>> {
    let mut data = vec![T::zeroed(); tensor.num_elements()];
    let pitch = tensor.row_stride * tensor.dtype.size_bytes();
    read_bytes(stream, bytemuck::cast_slice_mut(&mut data), ptr, tensor.row_bytes(), pitch)?;
    Ok(data)
}

/// Copies rows of `row_bytes` that lie `pitch` bytes apart to the host, and waits for them.
pub(crate) fn read_bytes(
    stream: StreamRef<'_>,
    into: &mut [u8],
    ptr: DevicePtr,
    row_bytes: usize,
    pitch: usize,
) -> Result<()> {
    let StreamRef { backend, handle } = stream;
    if into.is_empty() {
        return backend.synchronize_stream(handle);
    }
    if row_bytes == pitch || into.len() == row_bytes {
        return backend.copy_to_host(handle, into, ptr);
    }
    for (row, chunk) in into.chunks_mut(row_bytes).enumerate() {
        backend.copy_to_host(handle, chunk, ptr.offset_bytes(row * pitch))?;
    }
    Ok(())
}

/// Enqueues a copy of `bytes`, in row-major order, into a tensor.
pub(crate) fn write_rows(
    op: &'static str,
    stream: StreamRef<'_>,
    tensor: &Tensor,
    ptr: DevicePtr,
    bytes: &[u8],
) -> Result<()> {
    if bytes.len() != tensor.size_bytes() {
        let expected = format!("{} bytes for {:?} {}", tensor.size_bytes(), tensor.shape, tensor.dtype);
        return Err(Error::shape(op, expected, format!("{} bytes", bytes.len())));
    }
    let StreamRef { backend, handle } = stream;
    if bytes.is_empty() {
        return Ok(());
    }
    if tensor.is_contiguous() {
        return backend.copy_from_host(handle, ptr, bytes);
    }
    let pitch = tensor.row_stride * tensor.dtype.size_bytes();
    backend.copy_rows_from_host(handle, ptr, pitch, tensor.row_bytes(), bytes)
}
