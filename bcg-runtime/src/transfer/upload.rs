//! Large host data on its way to the device: checkpoints.
//!
//! Several threads read pieces of the data into pinned buffers of their own, two each: while one buffer is on its way
//! to the device, the thread fills the other. One stream carries all copies, and one wait at the end covers them.
//!
//! - No thread waits for another one: pieces are handed out by a counter, and a buffer is reused after its own event.
//! - The first error in time ends all threads before their next piece, and is what the caller gets.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};

use crate::device::{Event, PinnedBuffer, Stream};
use crate::error::catch_panic;
use crate::op::Op;
use crate::{Device, DevicePtr, Error, Result, Tensor};

/// What a thread reads before it writes that to a pinned buffer: small enough to stay in the cache.
const SCRATCH_BYTES: usize = 256 << 10;

/// Where the elements of a tensor come from.
///
/// # Example
/// ```
/// use bcg_runtime::{Result, UploadSource};
/// /// Bytes that count upwards.
/// struct Counting;
/// impl UploadSource for Counting {
///     fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
///         into.iter_mut().enumerate().for_each(|(i, byte)| *byte = (offset + i) as u8);
///         Ok(())
///     }
/// }
/// # let _ = Counting;
/// ```
pub trait UploadSource: Send + Sync {
    /// Fills `into` with the bytes of the tensor's elements from `offset` on, in row-major order.
    ///
    /// Called by several threads at once; offsets and lengths are multiples of 8 but for the end of the tensor.
    ///
    /// # Errors
    /// What the source says; it ends the whole upload.
    fn read(&self, offset: usize, into: &mut [u8]) -> Result<()>;
}

impl UploadSource for Vec<u8> {
    fn read(&self, offset: usize, into: &mut [u8]) -> Result<()> {
        into.copy_from_slice(&self[offset..offset + into.len()]);
        Ok(())
    }
}

/// How an [`Uploader`] works.
///
/// # Example
/// ```
/// assert!(bcg_runtime::UploadOptions::default().num_threads >= 1);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct UploadOptions {
    /// The number of threads that read, at least 1.
    pub num_threads: usize,
    /// The bytes of each of a thread's two pinned buffers; rounded up to a multiple of 8.
    pub staging_bytes: usize,
}

impl Default for UploadOptions {
    /// As many threads as the machine runs at once, eight at most, which come near the rate of the link to the device.
    /// Buffers of 1 MiB stay in the processor's cache; larger ones measured slower.
    fn default() -> Self {
        let parallelism = std::thread::available_parallelism().map_or(1, usize::from);
        Self { num_threads: parallelism.min(8), staging_bytes: 1 << 20 }
    }
}

/// Writes many persistent tensors at the speed of their sources or of the link to the device, whichever is lower.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, UploadOptions, Uploader};
/// let device = Device::host();
/// let matrix = device.empty(&[2, 2], DType::U8)?;
/// let mut uploader = Uploader::new(&device, UploadOptions::default());
/// uploader.add(&matrix.rows(1..2)?, vec![3u8, 4])?;
/// uploader.add(&matrix.rows(0..1)?, vec![1u8, 2])?;
/// uploader.run(&mut |done_bytes| assert!(done_bytes <= 4))?;
/// assert_eq!(device.read::<u8>(&matrix)?, [1, 2, 3, 4]);
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
pub struct Uploader {
    device: Device,
    options: UploadOptions,
    items: Vec<Item>,
}

struct Item {
    /// Keeps the memory.
    tensor: Tensor,
    ptr: DevicePtr,
    source: Box<dyn UploadSource>,
}

/// A part of an item that fits a pinned buffer.
struct Piece<'a> {
    item: &'a Item,
    offset: usize,
    bytes: usize,
}

/// A pinned buffer and the point at which its latest copy has run.
struct Staging {
    buffer: PinnedBuffer,
    sent: Event,
}

impl Staging {
    fn new(device: &Device, bytes: usize) -> Result<Self> {
        Ok(Self { buffer: PinnedBuffer::new(device, bytes)?, sent: Event::new(device)? })
    }
}

impl Uploader {
    /// Makes an uploader with nothing to do yet.
    pub fn new(device: &Device, options: UploadOptions) -> Self {
        Self { device: device.clone(), options, items: Vec::new() }
    }

    /// Adds a tensor to write and the source of its elements. Nothing is read or written before [`run`](Self::run).
    ///
    /// # Errors
    /// [`Error::Foreign`] for a tensor of an arena or of another device; [`Error::Shape`] for a row-sliced one.
    pub fn add(&mut self, tensor: &Tensor, source: impl UploadSource + 'static) -> Result<()> {
        let ptr = tensor.persistent_addr(&self.device)?;
        if !tensor.is_contiguous() {
            let got = format!("rows {} elements apart", tensor.row_stride());
            return Err(Error::shape("Uploader::add", "a contiguous tensor", got));
        }
        self.items.push(Item { tensor: tensor.clone(), ptr, source: Box::new(source) });
        Ok(())
    }

    /// Returns the bytes of all tensors that were added.
    pub fn total_bytes(&self) -> usize {
        self.items.iter().map(|item| item.tensor.size_bytes()).sum()
    }

    /// Writes all tensors, after all work of the device and before any later work, in the order in which they were
    /// added as far as threads keep it. Calls `progress` on this thread with the bytes that were read so far.
    ///
    /// # Errors
    /// The first error of a source, of the driver or of a copy, [`Error::Panic`] if a source panics; some of the
    /// tensors are written then.
    pub fn run(self, progress: &mut dyn FnMut(usize)) -> Result<()> {
        let pieces = self.pieces();
        self.device.synchronize()?;
        let stream = Stream::new(&self.device, "upload")?;
        let run = Run {
            uploader: &self,
            pieces: &pieces,
            next: AtomicUsize::new(0),
            stream: &stream,
            failed: OnceLock::new(),
        };
        let (sender, receiver) = channel();
        // Pinned buffers are given back after the wait: freeing one waits for the device.
        let buffers: Vec<_> = std::thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> = (0..self.options.num_threads.clamp(1, pieces.len().max(1)))
                .map_while(|_| {
                    let sender = sender.clone();
                    let thread = std::thread::Builder::new().name("bcg-upload".into());
                    thread
                        .spawn_scoped(scope, move || run.work(&sender))
                        .map_err(|error| run.fail(Error::other(error)))
                        .ok()
                })
                .collect();
            drop(sender);
            let mut done_bytes = 0;
            for bytes in receiver {
                done_bytes += bytes;
                progress(done_bytes);
            }
            threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
        });
        let waited = stream.synchronize();
        drop(buffers);
        run.failed.into_inner().map_or(waited, Err)
    }

    fn pieces(&self) -> Vec<Piece<'_>> {
        let most = self.staging_bytes();
        let mut pieces = Vec::new();
        for item in &self.items {
            let total = item.tensor.size_bytes();
            let offsets = (0..total).step_by(most);
            pieces.extend(offsets.map(|offset| Piece { item, offset, bytes: most.min(total - offset) }));
        }
        pieces
    }

    fn staging_bytes(&self) -> usize {
        self.options.staging_bytes.clamp(1, usize::MAX - 7).next_multiple_of(8)
    }
}

/// One run of an uploader, as its threads share it.
struct Run<'a> {
    uploader: &'a Uploader,
    pieces: &'a [Piece<'a>],
    next: AtomicUsize,
    stream: &'a Stream,
    failed: OnceLock<Error>,
}

impl Run<'_> {
    /// What one thread does; returns its buffers, whose copies may still run.
    fn work(&self, done: &Sender<usize>) -> Vec<Staging> {
        let mut buffers = Vec::new();
        let result = catch_panic(|| {
            let mut scratch = vec![0; SCRATCH_BYTES.min(self.uploader.staging_bytes())];
            for turn in 0.. {
                let Some(piece) = self.next_piece() else { break };
                if buffers.len() < 2 {
                    buffers.push(Staging::new(&self.uploader.device, self.uploader.staging_bytes())?);
                }
                self.send(piece, &buffers[turn % 2], &mut scratch)?;
                let _ = done.send(piece.bytes); // nobody listens if the caller's `progress` panicked
            }
            Ok(())
        });
        if let Err(error) = result {
            self.fail(error);
        }
        buffers
    }

    fn next_piece(&self) -> Option<&Piece<'_>> {
        if self.failed.get().is_some() {
            return None;
        }
        self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// Reads a piece into a pinned buffer, once that is free, and enqueues its copy.
    fn send(&self, piece: &Piece<'_>, staging: &Staging, scratch: &mut [u8]) -> Result<()> {
        staging.sent.synchronize()?;
        for offset in (0..piece.bytes).step_by(scratch.len()) {
            let bytes = scratch.len().min(piece.bytes - offset);
            piece.item.source.read(piece.offset + offset, &mut scratch[..bytes])?;
            staging.buffer.write_bytes_at(offset, &scratch[..bytes])?;
        }
        let backend = self.uploader.device.backend();
        let dst = piece.item.ptr.offset_bytes(piece.offset);
        backend.enqueue(
            self.stream.handle(),
            &Op::CopyFromPinned { dst, src: staging.buffer.ptr(), bytes: piece.bytes },
        )?;
        staging.sent.record(self.stream)
    }

    fn fail(&self, error: Error) {
        let _ = self.failed.set(error); // a later error follows from the first or is no news
    }
}

impl std::fmt::Debug for Uploader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tensors = self.items.len();
        f.debug_struct("Uploader").field("tensors", &tensors).field("options", &self.options).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;

    const LENGTHS: [usize; 5] = [1, 64, 100, 1000, 7];

    fn bytes(index: usize) -> Vec<u8> {
        (0..LENGTHS[index]).map(|i| (i * 7 + index) as u8).collect()
    }

    fn tensors(device: &Device) -> Vec<Tensor> {
        LENGTHS.iter().map(|length| device.empty(&[*length], DType::U8).expect("a tensor")).collect()
    }

    fn upload(device: &Device, tensors: &[Tensor], num_threads: usize) -> Result<usize> {
        let mut uploader = Uploader::new(device, UploadOptions { num_threads, staging_bytes: 57 });
        for (index, tensor) in tensors.iter().enumerate() {
            uploader.add(tensor, bytes(index))?;
        }
        let total = uploader.total_bytes();
        let mut last = 0;
        uploader.run(&mut |done| {
            assert!(last < done && done <= total, "{done} after {last} of {total}");
            last = done;
        })?;
        Ok(last)
    }

    #[test]
    fn every_byte_arrives_whatever_the_number_of_threads() {
        for num_threads in [1, 2, 5] {
            let device = Device::host();
            let tensors = tensors(&device);
            assert_eq!(upload(&device, &tensors, num_threads).expect("an upload"), LENGTHS.iter().sum());
            for (index, tensor) in tensors.iter().enumerate() {
                assert_eq!(device.read::<u8>(tensor).expect("read"), bytes(index), "{num_threads} threads");
            }
            drop(tensors);
            assert_eq!(device.live_objects(), Default::default());
        }
    }

    #[test]
    fn a_fault_in_any_call_is_reported_and_leaks_nothing() {
        let device = Device::host();
        let control = device.host_control().expect("a host device");
        let targets = tensors(&device);
        let mark = control.num_calls();
        upload(&device, &targets, 1).expect("an upload");
        let calls = control.calls_since(mark);
        assert!(calls.len() > 60, "{calls:?}");
        for (index, call) in calls.iter().enumerate() {
            for num_threads in [1, 3] {
                control.fail_call(index as u64 + 1);
                let result = upload(&device, &targets, num_threads);
                control.clear_faults();
                if num_threads == 1 {
                    let error = result.expect_err(call);
                    let is_injected = error.to_string().contains("INJECTED");
                    assert!(is_injected || matches!(error, Error::OutOfMemory { .. }), "{call}: {error}");
                }
                let live = device.live_objects();
                assert_eq!((live.allocations, live.streams, live.events), (targets.len(), 0, 0), "{call}");
            }
        }
        upload(&device, &targets, 3).expect("the device is usable");
    }

    struct Broken;

    impl UploadSource for Broken {
        fn read(&self, offset: usize, _: &mut [u8]) -> Result<()> {
            assert!(offset < 500, "read beyond the first error");
            if offset < 300 { Ok(()) } else { Err(Error::other("disk on fire")) }
        }
    }

    #[test]
    fn the_error_of_a_source_ends_the_upload() {
        let device = Device::host();
        let tensor = device.empty(&[100_000], DType::U8).expect("a tensor");
        let mut uploader = Uploader::new(&device, UploadOptions { num_threads: 1, staging_bytes: 64 });
        uploader.add(&tensor, Broken).expect("a contiguous tensor");
        assert_eq!(uploader.run(&mut |_| ()).expect_err("broken").to_string(), "disk on fire");
    }

    #[test]
    fn a_source_that_panics_ends_the_upload_with_an_error() {
        let device = Device::host();
        let tensor = device.empty(&[8], DType::U8).expect("a tensor");
        let mut uploader = Uploader::new(&device, UploadOptions::default());
        uploader.add(&tensor, vec![0; 4]).expect("the length shows at the read");
        assert!(matches!(uploader.run(&mut |_| ()), Err(Error::Panic { .. })));
    }

    #[test]
    fn what_cannot_be_written_is_refused() {
        let (device, other) = (Device::host(), Device::host());
        let matrix = device.empty(&[2, 4], DType::U8).expect("a tensor");
        let mut uploader = Uploader::new(&device, UploadOptions::default());
        let column = matrix.columns(0..1).expect("a column");
        assert!(matches!(uploader.add(&column, vec![0; 2]), Err(Error::Shape { .. })));
        let foreign = other.empty(&[1], DType::U8).expect("a tensor");
        assert!(matches!(uploader.add(&foreign, vec![0]), Err(Error::Foreign { .. })));
        uploader.run(&mut |_| panic!("there is nothing to do")).expect("nothing to do");
    }
}
