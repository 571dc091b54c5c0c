//! Side streams: how they open, how their work is joined, and what is noted meanwhile.
//!
//! Invariants: work on a side stream is joined before the segment, the break or the forward ends, and a missing join
//! names the stream; while a side stream is open, the arena keeps freed blocks back.

use std::sync::Arc;

use super::work_list::Destination;
use crate::device::traits::{EventHandle, StreamHandle};
use crate::{Error, Event, OpStream, Result, Stream};

/// A side stream with work that the main stream does not wait for yet.
#[derive(Debug)]
pub(super) struct Fork {
    stream: StreamHandle,
    name: Arc<str>,
    /// The event that covers all its work, if its latest work was to record one.
    covered_by: Option<EventHandle>,
}

#[derive(Debug)]
pub(super) struct PooledStream {
    stream: Arc<Stream>,
    forked: Event,
    done: Event,
    /// The scope that uses it now.
    scope: Option<usize>,
}

/// A side stream of the scope that opened it.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Runner, RunnerOptions};
/// let mut runner = Runner::new(&Device::host(), RunnerOptions::default())?;
/// let (a, b) = runner.eager(&(), |cx| {
///     let (a, b) = (cx.empty(&[2], DType::U8)?, cx.empty(&[2], DType::U8)?);
///     cx.scope(|cx| {
///         let side = cx.side_stream("side")?;
///         cx.on(&side, |cx| cx.fill_bytes(&a, 1))?; // beside …
///         cx.fill_bytes(&b, 2) // … this; both are done when the scope ends
///     })?;
///     Ok((a, b))
/// })?;
/// assert_eq!((runner.read::<u8>(&a)?, runner.read::<u8>(&b)?), (vec![1, 1], vec![2, 2]));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SideStream {
    index: usize,
    scope: usize,
}

impl OpStream {
    /// Runs `f` and joins the side streams that it opened, whether it succeeds or fails.
    ///
    /// # Errors
    /// The first error of `f`; the driver's.
    pub fn scope<R>(&mut self, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        self.scope_depth += 1;
        let scope = self.scope_depth;
        let result = f(self);
        let joined = self.join_scope(scope);
        self.scope_depth -= 1;
        self.update_keep_back();
        let value = result?;
        joined?;
        Ok(value)
    }

    /// Opens a side stream that begins after the work enqueued so far and is joined when the scope ends.
    ///
    /// # Errors
    /// [`Error::Option`] outside a scope; the driver's.
    pub fn side_stream(&mut self, name: &str) -> Result<SideStream> {
        if self.scope_depth == 0 {
            let message = format!("side stream `{name}` needs a scope, which joins it: use OpStream::scope");
            return Err(Error::Option { option: "OpStream::side_stream", message });
        }
        let is_free = |side: &PooledStream| side.scope.is_none() && side.stream.name() == name;
        let index = match self.side_streams.iter().position(is_free) {
            Some(index) => index,
            None => {
                let stream = Arc::new(Stream::new(&self.device, name)?);
                let (forked, done) = (Event::new(&self.device)?, Event::new(&self.device)?);
                self.side_streams.push(PooledStream { stream, forked, done, scope: None });
                self.side_streams.len() - 1
            }
        };
        let scope = self.scope_depth;
        self.side_streams[index].scope = Some(scope);
        let (from, side) = (self.current.handle(), self.side_streams[index].stream.handle());
        let forked = self.side_streams[index].forked.handle();
        self.enqueue("a side stream", |device, _| device.backend().record_event(forked, from))?;
        self.enqueue("a side stream", |device, _| device.backend().wait_event(side, forked))?;
        self.touch_side(index);
        Ok(SideStream { index, scope })
    }

    /// Runs `f` with its work going to a side stream of an open scope.
    ///
    /// # Errors
    /// [`Error::Option`] if the side stream's scope has ended; those of `f`.
    pub fn on<R>(&mut self, side: &SideStream, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        let Some(stream) = self.side_streams.get(side.index).filter(|pooled| pooled.scope == Some(side.scope)) else {
            let message = "the side stream's scope has ended; open another one in this scope".to_owned();
            return Err(Error::Option { option: "OpStream::on", message });
        };
        let stream = Arc::clone(&stream.stream);
        self.on_stream(&stream, f)
    }

    /// Runs `f` with its work going to a stream of the caller's own, which forks and joins through events:
    /// [`OpStream::wait`] first, [`OpStream::record`] last.
    ///
    /// # Errors
    /// [`Error::Foreign`] if the stream is another device's; those of `f`.
    pub fn on_stream<R>(&mut self, stream: &Arc<Stream>, f: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        if !stream.device().is(&self.device) {
            return Err(Error::foreign(stream.device().name(), self.device.name()));
        }
        let before = std::mem::replace(&mut self.current, Arc::clone(stream));
        let result = f(self);
        self.current = before;
        result
    }

    /// Records an event after the work enqueued so far on the current stream.
    ///
    /// # Errors
    /// The driver's.
    pub fn record(&mut self, event: &Event) -> Result<()> {
        self.enqueue("an event", |device, stream| device.backend().record_event(event.handle(), stream))?;
        let current = self.current.handle();
        for fork in &mut self.forks {
            if fork.stream == current {
                fork.covered_by = Some(event.handle());
            } else if fork.covered_by == Some(event.handle()) {
                fork.covered_by = None;
            }
        }
        Ok(())
    }

    /// Makes later work of the current stream wait for an event.
    ///
    /// # Errors
    /// The driver's; during a capture, an event that was recorded outside of it.
    pub fn wait(&mut self, event: &Event) -> Result<()> {
        self.enqueue("an event", |device, stream| device.backend().wait_event(stream, event.handle()))?;
        let current = self.current.handle();
        self.forks.retain(|fork| fork.stream == current || fork.covered_by != Some(event.handle()));
        self.update_keep_back();
        Ok(())
    }
}

/// For the runtime itself.
impl OpStream {
    /// Fails if a side stream was not joined before `place`.
    pub(crate) fn check_joined(&self, place: &str) -> Result<()> {
        match self.forks.first() {
            None => Ok(()),
            Some(fork) => Err(Error::UnjoinedStream { stream: fork.name.to_string(), place: place.to_owned() }),
        }
    }

    /// Tells whether side streams or scopes are open, so that freed blocks are kept back.
    pub(crate) fn is_forked(&self) -> bool {
        self.scope_depth > 0 || !self.forks.is_empty()
    }

    /// Forgets what a failed forward left open.
    pub(crate) fn reset_forks(&mut self) {
        self.destination = Destination::Device;
        if self.forks.is_empty() && self.scope_depth == 0 && Arc::ptr_eq(&self.current, &self.main) {
            return; // the usual case, on the replay path
        }
        self.forks.clear();
        self.scope_depth = 0;
        self.current = Arc::clone(&self.main);
        self.side_streams.iter_mut().for_each(|side| side.scope = None);
        self.arena.set_keep_back(false);
    }

    /// Notes that a side stream has work that nobody waits for.
    pub(super) fn touch(&mut self, stream: StreamHandle, name: &Arc<str>) {
        match self.forks.iter_mut().find(|fork| fork.stream == stream) {
            Some(fork) => fork.covered_by = None,
            None => self.forks.push(Fork { stream, name: Arc::clone(name), covered_by: None }),
        }
        self.update_keep_back();
    }

    fn touch_side(&mut self, index: usize) {
        let stream = Arc::clone(&self.side_streams[index].stream);
        self.touch(stream.handle(), &stream.shared_name());
    }

    pub(super) fn update_keep_back(&self) {
        self.arena.set_keep_back(self.is_forked());
    }

    fn join_scope(&mut self, scope: usize) -> Result<()> {
        let mut first_error = Ok(());
        for index in 0..self.side_streams.len() {
            if self.side_streams[index].scope != Some(scope) {
                continue;
            }
            self.side_streams[index].scope = None;
            let (stream, done) = (self.side_streams[index].stream.handle(), self.side_streams[index].done.handle());
            let joined =
                self.enqueue("a side stream", |device, _| device.backend().record_event(done, stream)).and_then(|()| {
                    self.enqueue("a side stream", |device, current| device.backend().wait_event(current, done))
                });
            if joined.is_ok() {
                self.forks.retain(|fork| fork.stream != stream);
            }
            first_error = first_error.and(joined);
        }
        first_error
    }
}
