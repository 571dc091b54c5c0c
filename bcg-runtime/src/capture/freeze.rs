//! How the arguments of a break outlive its capture (law L2).
//!
//! Freezing keeps a tensor's address and shape, a share of an `Arc`, or a copy of a plain value. Thawing happens only
//! while a replay runs its break, at the point of the forward where the frozen memory holds what it held at capture;
//! so no claim on arena memory is needed between the two, and none is held.

use std::sync::Arc;

use crate::arena::Arena;
use crate::frozen::FrozenTensor;
use crate::generation::Stamp;
use crate::tensor::Storage;
use crate::{Live, OpStream, Result, Tensor};

/// A type that may be an argument of an annotated function.
///
/// Implemented for [`Tensor`], [`Arc`], [`Live`], plain scalars, `&'static str`, and options, vectors, arrays and
/// tuples of these. `#[derive(Freeze)]` implements it for a struct of such fields.
///
/// # Example
/// ```
/// use std::sync::Arc;
/// use bcg_runtime::{Freeze, Tensor};
///
/// #[derive(Clone, Freeze)]
/// struct LayerCache { k: Tensor, v: Tensor, page_size: usize }
///
/// fn takes_freeze<T: Freeze>() {}
/// takes_freeze::<(LayerCache, Option<Tensor>, Vec<f32>, Arc<String>)>();
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot be an argument of an `#[eager_on_graph]` function",
    label = "this argument cannot be kept from capture to replay",
    note = "pass a `Tensor`, an `Arc<T>`, a plain scalar, or an option, vector or tuple of these; put `#[derive(Freeze)]` on your own struct",
    note = "a value that differs at every replay belongs into the live batch: read it with `cx.live()`"
)]
pub trait Freeze: Sized + 'static {
    /// What is kept from capture to replay.
    type Frozen: Send + Sync + 'static;

    /// Keeps what a replay needs to rebuild this value.
    ///
    /// # Errors
    /// Those of [`OpStream::addr`] for each tensor.
    fn freeze(&self, freezer: &mut Freezer<'_>) -> Result<Self::Frozen>;

    /// Rebuilds the value at replay.
    fn thaw(frozen: &Self::Frozen, thaw: &Thaw<'_>) -> Self;
}

/// Freezes values, and collects the tensors and generations that they refer to.
#[derive(Debug)]
pub struct Freezer<'a> {
    stream: &'a mut OpStream,
    pub(crate) tensors: Vec<FrozenTensor>,
    pub(crate) stamps: Vec<Stamp>,
}

impl<'a> Freezer<'a> {
    pub(crate) fn new(stream: &'a mut OpStream) -> Self {
        Self::with_scratch(stream, Vec::new())
    }

    /// Collects the tensors into an empty vector that the caller has.
    pub(crate) fn with_scratch(stream: &'a mut OpStream, tensors: Vec<FrozenTensor>) -> Self {
        Self { stream, tensors, stamps: Vec::new() }
    }

    fn tensor(&mut self, tensor: &Tensor) -> Result<FrozenTensor> {
        self.stream.addr(tensor)?;
        let frozen = FrozenTensor::new(tensor);
        self.tensors.push(frozen.clone());
        if let Storage::Persistent(buffer) = &tensor.storage
            && let Some(stamp) = buffer.stamp()
        {
            self.stamps.push(stamp.clone());
        }
        Ok(frozen)
    }
}

/// The right to rebuild frozen values; exists only while a replay runs.
#[derive(Debug)]
pub struct Thaw<'a> {
    pub(crate) arena: &'a Arena,
}

impl Freeze for Tensor {
    type Frozen = FrozenTensorHandle;

    fn freeze(&self, freezer: &mut Freezer<'_>) -> Result<FrozenTensorHandle> {
        freezer.tensor(self).map(FrozenTensorHandle)
    }

    fn thaw(frozen: &FrozenTensorHandle, thaw: &Thaw<'_>) -> Self {
        frozen.0.thaw(thaw.arena)
    }
}

/// A frozen [`Tensor`]: its address, shape and dtype.
#[derive(Clone, Debug)]
pub struct FrozenTensorHandle(pub(crate) FrozenTensor);

impl<T: ?Sized + Send + Sync + 'static> Freeze for Arc<T> {
    type Frozen = Self;

    fn freeze(&self, _freezer: &mut Freezer<'_>) -> Result<Self> {
        Ok(Self::clone(self))
    }

    fn thaw(frozen: &Self, _thaw: &Thaw<'_>) -> Self {
        Self::clone(frozen)
    }
}

impl<T: Send + 'static> Freeze for Live<T> {
    type Frozen = Self;

    fn freeze(&self, _freezer: &mut Freezer<'_>) -> Result<Self> {
        Ok(self.share())
    }

    fn thaw(frozen: &Self, _thaw: &Thaw<'_>) -> Self {
        frozen.share()
    }
}

macro_rules! freeze_copies {
    ($($ty:ty),*) => { $(
        impl Freeze for $ty {
            type Frozen = Self;

            fn freeze(&self, _freezer: &mut Freezer<'_>) -> Result<Self> {
                Ok(*self)
            }

            fn thaw(frozen: &Self, _thaw: &Thaw<'_>) -> Self {
                *frozen
            }
        }
    )* };
}

freeze_copies!(
    (),
    bool,
    char,
    i8,
    i16,
    i32,
    i64,
    i128,
    isize,
    u8,
    u16,
    u32,
    u64,
    u128,
    usize,
    f32,
    f64,
    half::bf16,
    half::f16,
    &'static str,
    crate::DType
);

impl<T: Freeze> Freeze for Option<T> {
    type Frozen = Option<T::Frozen>;

    fn freeze(&self, freezer: &mut Freezer<'_>) -> Result<Self::Frozen> {
        self.as_ref().map(|value| value.freeze(freezer)).transpose()
    }

    fn thaw(frozen: &Self::Frozen, thaw: &Thaw<'_>) -> Self {
        frozen.as_ref().map(|value| T::thaw(value, thaw))
    }
}

impl<T: Freeze> Freeze for Vec<T> {
    type Frozen = Vec<T::Frozen>;

    fn freeze(&self, freezer: &mut Freezer<'_>) -> Result<Self::Frozen> {
        self.iter().map(|value| value.freeze(freezer)).collect()
    }

    fn thaw(frozen: &Self::Frozen, thaw: &Thaw<'_>) -> Self {
        frozen.iter().map(|value| T::thaw(value, thaw)).collect()
    }
}

impl<T: Freeze, const N: usize> Freeze for [T; N] {
    type Frozen = Vec<T::Frozen>;

    fn freeze(&self, freezer: &mut Freezer<'_>) -> Result<Self::Frozen> {
        self.iter().map(|value| value.freeze(freezer)).collect()
    }

    fn thaw(frozen: &Self::Frozen, thaw: &Thaw<'_>) -> Self {
        std::array::from_fn(|index| T::thaw(&frozen[index], thaw))
    }
}

macro_rules! freeze_tuples {
    ($(($($T:ident $index:tt),+))*) => { $(
        impl<$($T: Freeze),+> Freeze for ($($T,)+) {
            type Frozen = ($($T::Frozen,)+);

            fn freeze(&self, freezer: &mut Freezer<'_>) -> Result<Self::Frozen> {
                Ok(($(self.$index.freeze(freezer)?,)+))
            }

            fn thaw(frozen: &Self::Frozen, thaw: &Thaw<'_>) -> Self {
                ($($T::thaw(&frozen.$index, thaw),)+)
            }
        }
    )* };
}

freeze_tuples! {
    (A 0)
    (A 0, B 1)
    (A 0, B 1, C 2)
    (A 0, B 1, C 2, D 3)
    (A 0, B 1, C 2, D 3, E 4)
    (A 0, B 1, C 2, D 3, E 4, F 5)
    (A 0, B 1, C 2, D 3, E 4, F 5, G 6)
    (A 0, B 1, C 2, D 3, E 4, F 5, G 6, H 7)
}
