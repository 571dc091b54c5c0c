//! Element types of tensors.

use std::fmt;

/// The type of a tensor's elements.
///
/// # Example
/// ```
/// use bcg_runtime::DType;
/// assert_eq!((DType::Bf16.size_bytes(), DType::Bf16.to_string()), (2, "bf16".to_owned()));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// bfloat16: 8 exponent bits, 7 mantissa bits.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
    /// Signed 32-bit integer.
    I32,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned byte.
    U8,
}

impl DType {
    /// Returns the bytes that one element takes.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::Bf16 | Self::F16 => 2,
            Self::F32 | Self::I32 => 4,
            Self::I64 => 8,
        }
    }

    /// Returns the name used in messages and kernel entry points, such as `bf16`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that can be an element of a tensor.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Element};
/// assert_eq!(<f32 as Element>::DTYPE, DType::F32);
/// ```
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug + PartialEq {
    /// The tensor dtype with this layout.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($ty:ty => $dtype:ident),*) => { $(impl Element for $ty { const DTYPE: DType = DType::$dtype; })* };
}

elements!(half::bf16 => Bf16, half::f16 => F16, f32 => F32, i32 => I32, i64 => I64, u8 => U8);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_as_wide_as_its_dtype_says() {
        fn check<T: Element>() {
            assert_eq!(size_of::<T>(), T::DTYPE.size_bytes(), "{}", T::DTYPE);
        }
        check::<half::bf16>();
        check::<half::f16>();
        check::<f32>();
        check::<i32>();
        check::<i64>();
        check::<u8>();
    }
}
