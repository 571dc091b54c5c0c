//! Addresses of device memory.

/// An address in a device's memory.
///
/// # Example
/// ```
/// use bcg_runtime::DevicePtr;
/// assert!(DevicePtr::NULL.is_null());
/// assert_eq!(DevicePtr::NULL.offset_bytes(16).as_u64(), 16);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(transparent)]
pub struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// The address that no memory has; stands for an absent argument.
    pub const NULL: Self = Self(0);

    /// Returns the address `bytes` further on.
    pub const fn offset_bytes(self, bytes: usize) -> Self {
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
