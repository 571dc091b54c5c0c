//! What captured code holds: a queue, and no way to the live batch (law L1).

use std::fmt;
use std::ops::{Deref, DerefMut};

use super::writer::TapeWriter;
use crate::{OpStream, Result, Rows};

/// The host and device state of the batch being run now; differs at every replay.
///
/// Only breaks can read it, through [`crate::Eager::live`]. See [`Rows`](crate::Rows) for an example.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a live batch",
    label = "`impl LiveBatch for {Self} {{}}` makes it one",
    note = "implement `rows` if the forward's rows are padded to a capture size"
)]
pub trait LiveBatch: 'static {
    /// Returns the valid and padded rows of this run, if rows can be padded.
    ///
    /// The runtime zeroes the rows `[valid, padded)` of every bridge that has `padded` rows, after its break, and
    /// tells the device how many rows are valid (law L11).
    fn rows(&self) -> Option<Rows> {
        None
    }
}

impl LiveBatch for () {}

/// A forward that can be captured.
pub(crate) type Forward<L, O> = dyn Fn(&mut Context<'_, L>) -> Result<O> + Send + Sync;

/// What captured code sees: an [`OpStream`], to which it derefs.
///
/// It has no access to the live batch, so a live value cannot be baked into a graph: that does not compile.
///
/// # Example
/// ```compile_fail
/// use bcg_runtime::{Context, LiveBatch};
/// struct Batch { num_sequences: usize }
/// impl LiveBatch for Batch {}
/// fn captured(cx: &mut Context<'_, Batch>) -> usize {
///     cx.live().num_sequences // no such method: only `Eager` has it
/// }
/// ```
pub struct Context<'a, L> {
    pub(crate) stream: &'a mut OpStream,
    pub(crate) live: &'a L,
    pub(crate) writer: Option<&'a mut TapeWriter<L>>,
}

impl<L: LiveBatch> Context<'_, L> {
    /// Ends the open segment and begins another one, without a break between them. Outside a capture it does nothing.
    ///
    /// # Errors
    /// Those of ending and beginning a segment.
    pub fn break_graph(&mut self) -> Result<()> {
        match self.writer.as_deref_mut() {
            Some(writer) => writer.split(self.stream),
            None => Ok(()),
        }
    }
}

impl<L> Deref for Context<'_, L> {
    type Target = OpStream;

    fn deref(&self) -> &OpStream {
        self.stream
    }
}

impl<L> DerefMut for Context<'_, L> {
    fn deref_mut(&mut self) -> &mut OpStream {
        self.stream
    }
}

impl<L> fmt::Debug for Context<'_, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("is_capturing", &self.is_capturing()).finish_non_exhaustive()
    }
}
