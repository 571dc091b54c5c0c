//! The views of memory that a kernel's host reference gets.
//!
//! Invariant: a view is `&[Cell<T>]`, given out by a type that cannot cross threads, while the device's lock is held.
//!
//! A [`Kernel`](crate::Kernel) names [`HostMemory`] in the type of its host reference, so this file knows addresses and
//! regions, and neither kernels nor the device.

use std::cell::Cell;
use std::fmt;

use super::backing::ALIGN;
use super::regions::Memory;
use crate::{DevicePtr, Element, Error, Result};

/// What a kernel's host reference sees of the host device's memory: every access is checked.
///
/// # Example
/// ```
/// use bcg_runtime::{DevicePtr, HostMemory, Result};
/// fn negate(memory: &HostMemory<'_>, x: DevicePtr, len: usize) -> Result<()> {
///     memory.view::<f32>(x, len)?.iter().for_each(|v| v.set(-v.get()));
///     Ok(())
/// }
/// # let _ = negate;
/// ```
pub struct HostMemory<'a> {
    /// [`Memory`] holds cells, so this reference, and with it every view, stays on its thread.
    memory: &'a Memory,
    kernel: &'a str,
}

impl<'a> HostMemory<'a> {
    pub(super) fn new(memory: &'a Memory, kernel: &'a str) -> Self {
        Self { memory, kernel }
    }

    /// Returns `len` elements at `ptr`. Views may overlap, and a write through one is seen through the others.
    ///
    /// # Errors
    /// [`Error::Memory`] if the range is not inside one live allocation or mapped range, or `ptr` is not aligned to
    /// `T`. An empty range is always valid.
    pub fn view<T: Element>(&self, ptr: DevicePtr, len: usize) -> Result<&'a [Cell<T>]> {
        const { assert!(align_of::<T>() <= ALIGN, "the element is aligned more than the memory behind it") };
        if len == 0 {
            return Ok(&[]);
        }
        let Some(bytes) = len.checked_mul(size_of::<T>()) else {
            return Err(self.memory.access_error(self.kernel, ptr, usize::MAX));
        };
        if !ptr.0.is_multiple_of(align_of::<T>() as u64) {
            let message = format!("{bytes} bytes at {:#x}: not aligned for {}", ptr.0, T::DTYPE);
            return Err(Error::Memory { kernel: self.kernel.to_owned(), message });
        }
        let start = self.memory.resolve(self.kernel, ptr, bytes)?.cast::<Cell<T>>();
        // SAFETY: `resolve` returned `bytes` initialised bytes that live while `memory` is borrowed ('a); they are
        // aligned, since regions and backings both begin at multiples of `ALIGN` and `ptr` was checked above; any bits
        // are a valid `T` (`Element: Pod`). Only cells and raw copies on this thread reach them: `memory` is not
        // `Sync`, whoever holds `&mut Memory` holds no view, and while work runs this thread has the turn to use memory
        // that devices share (`Memory::turn`, taken in `Queue::run`).
        Ok(unsafe { std::slice::from_raw_parts(start.as_ptr(), len) })
    }

    /// Returns `len` elements from the one `offset` elements after `ptr` on, as [`view`](Self::view) does.
    ///
    /// # Errors
    /// As [`HostMemory::view`].
    pub fn view_at<T: Element>(&self, ptr: DevicePtr, offset: usize, len: usize) -> Result<&'a [Cell<T>]> {
        let address = offset.checked_mul(size_of::<T>()).and_then(|bytes| ptr.0.checked_add(bytes as u64));
        match address {
            Some(address) => self.view(DevicePtr(address), len),
            None => Err(self.memory.access_error(self.kernel, ptr, usize::MAX)),
        }
    }

    /// Copies `len` elements at `ptr` out.
    ///
    /// # Errors
    /// As [`HostMemory::view`].
    pub fn load<T: Element>(&self, ptr: DevicePtr, len: usize) -> Result<Vec<T>> {
        self.view::<T>(ptr, len)?;
        let mut data = vec![T::zeroed(); len];
        self.memory.read(self.kernel, bytemuck::cast_slice_mut(&mut data), ptr)?;
        Ok(data)
    }

    /// Copies `data` to `ptr`.
    ///
    /// # Errors
    /// As [`HostMemory::view`].
    pub fn store<T: Element>(&self, ptr: DevicePtr, data: &[T]) -> Result<()> {
        self.view::<T>(ptr, data.len())?;
        self.memory.write(self.kernel, ptr, bytemuck::cast_slice(data))
    }
}

impl fmt::Debug for HostMemory<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostMemory").field("kernel", &self.kernel).finish_non_exhaustive()
    }
}
