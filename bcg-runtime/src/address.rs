//! Addresses of device memory.

/// An address in a device's memory, which [`OpStream::addr`](crate::OpStream::addr) gives.
///
/// Safe code can neither make one from a number nor move one, so the arguments of a kernel hold addresses of tensors, or
/// none. What lies further on is reached by a view of the tensor, by the kernel's own arithmetic, and in a host reference by
/// [`HostMemory::view_at`](crate::HostMemory::view_at).
///
/// # Example
/// ```
/// use bcg_runtime::DevicePtr;
/// assert!(DevicePtr::NULL.is_null());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(transparent)]
pub struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// The address that no memory has; stands for an absent argument.
    pub const NULL: Self = Self(0);

    /// Returns the address `bytes` further on.
    pub(crate) const fn offset_bytes(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    /// Returns the address as a number, for messages.
    pub const fn as_u64(self) -> u64 {
        self.0
    }

    /// Tells whether this is [`DevicePtr::NULL`].
    pub const fn is_null(self) -> bool {
        self.0 == 0
    }
}
