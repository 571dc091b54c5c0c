//! What a break holds: everything of a [`Context`], and the live batch, and the right to wait and to read back.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::watch::Needs;
use crate::tensor::{read_rows, write_rows};
use crate::{Context, Element, LiveBatch, Result, Tensor};

/// What the body of an [`eager_on_graph`](crate::eager_on_graph) function sees. Derefs to [`Context`].
///
/// # Example
/// ```
/// use bcg_runtime::{Context, DType, Device, Eager, Result, Runner, RunnerOptions, Tensor, eager_on_graph};
///
/// #[eager_on_graph]
/// fn reversed(cx: &mut Eager<'_, ()>, x: &Tensor) -> Result<Tensor> {
///     let mut values = cx.read::<i32>(x)?; // waits: legal in a break only
///     values.reverse();
///     let out = cx.empty(x.shape(), DType::I32)?;
///     cx.upload(&out, &values)?;
///     Ok(out)
/// }
///
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let x = device.tensor(&[3], &[1, 2, 3])?;
/// let out = runner.eager(&(), |cx: &mut Context<'_, ()>| reversed(cx, &x))?;
/// assert_eq!(runner.read::<i32>(&out)?, [3, 2, 1]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub struct Eager<'a, L> {
    cx: Context<'a, L>,
}

impl<'a, L: LiveBatch> Eager<'a, L> {
    /// Wraps a context whose segment is closed, so that nested breaks are plain calls.
    pub(crate) fn new(cx: &'a mut Context<'_, L>) -> Self {
        Self { cx: Context { stream: cx.stream, live: cx.live, writer: None } }
    }

    pub(crate) fn from_parts(stream: &'a mut crate::OpStream, live: &'a L) -> Self {
        Self { cx: Context { stream, live, writer: None } }
    }

    /// Returns the batch of *this* run, never the captured one.
    pub fn live(&self) -> &'a L {
        self.cx.live
    }

    /// Reads a tensor, in row-major order, after the work enqueued so far. Waits for the device.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if `T` is not its dtype; those of [`crate::OpStream::addr`]; the first error of the
    /// work waited for.
    pub fn read<T: Element>(&mut self, tensor: &Tensor) -> Result<Vec<T>> {
        tensor.check_dtype("Eager::read", T::DTYPE)?;
        self.leave_list("Eager::read", Needs::Results)?;
        let ptr = self.addr(tensor)?;
        let values = read_rows(self.stream.main().stream_ref(), tensor, ptr)?;
        self.check_ranks()?;
        Ok(values)
    }

    /// Enqueues a copy of `data`, in row-major order, into a tensor. `data` may be reused at once.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] if dtype or length differ; those of [`crate::OpStream::addr`]; the driver's.
    pub fn upload<T: Element>(&mut self, tensor: &Tensor, data: &[T]) -> Result<()> {
        tensor.check_dtype("Eager::upload", T::DTYPE)?;
        self.leave_list("Eager::upload", Needs::Results)?;
        let ptr = self.addr(tensor)?;
        write_rows("Eager::upload", self.stream.main().stream_ref(), tensor, ptr, bytemuck::cast_slice(data))
    }

    /// Waits until the work enqueued so far has run.
    ///
    /// # Errors
    /// The first error of that work.
    pub fn synchronize(&mut self) -> Result<()> {
        self.stream.main().synchronize()?;
        self.check_ranks()
    }
}

impl<'a, L> Deref for Eager<'a, L> {
    type Target = Context<'a, L>;

    fn deref(&self) -> &Context<'a, L> {
        &self.cx
    }
}

impl<L> DerefMut for Eager<'_, L> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.cx
    }
}

impl<L> fmt::Debug for Eager<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Eager").finish_non_exhaustive()
    }
}

/// A host value that a break returns and a later break reads.
///
/// Captured code may pass it on but cannot look inside, so it is never baked into a graph: at each replay, the later
/// break sees the value of that replay.
///
/// # Example
/// ```
/// use bcg_runtime::{Context, Device, Eager, Live, Result, Runner, RunnerOptions, eager_on_graph};
///
/// #[eager_on_graph]
/// fn plan(cx: &mut Eager<'_, ()>) -> Result<Live<usize>> { Ok(Live::new(7)) }
///
/// #[eager_on_graph]
/// fn use_plan(cx: &mut Eager<'_, ()>, plan: &Live<usize>) -> Result<()> {
///     assert_eq!(plan.get(cx), 7);
///     Ok(())
/// }
///
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// runner.eager(&(), |cx: &mut Context<'_, ()>| {
///     let plan = plan(cx)?;
///     use_plan(cx, &plan)
/// })?;
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub struct Live<T>(Arc<Mutex<Option<T>>>);

impl<T: Clone> Live<T> {
    /// Wraps a value of this run.
    pub fn new(value: T) -> Self {
        Self(Arc::new(Mutex::new(Some(value))))
    }

    /// Returns this run's value, inside a break.
    ///
    /// # Panics
    /// If no break produced a value in this run, which the runtime does not let happen.
    pub fn get<L: LiveBatch>(&self, _cx: &Eager<'_, L>) -> T {
        self.value()
    }

    pub(crate) fn value(&self) -> T {
        let value = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        value.expect("a break put a value here in this run")
    }
}

impl<T> Live<T> {
    pub(crate) fn share(&self) -> Self {
        Self(Arc::clone(&self.0))
    }

    /// Moves the value of `from` here.
    pub(crate) fn carry_from(&self, from: &Self) {
        if Arc::ptr_eq(&self.0, &from.0) {
            return;
        }
        let value = from.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = value;
    }
}

impl<T> fmt::Debug for Live<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Live(..)")
    }
}
