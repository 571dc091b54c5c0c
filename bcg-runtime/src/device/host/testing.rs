//! What the unit tests of the host device share: one device with short names for its calls, and two kernels.

use super::{HostBackend, HostControl, HostMemory, HostOptions};
use crate::compile::Source;
use crate::device::traits::{
    EventBackend, EventHandle, ExecHandle, GraphBackend, MemoryBackend, StreamBackend, StreamHandle,
};
use crate::launch::Launch;
use crate::op::{Op, RowCopy};
use crate::{DevicePtr, Dims, Kernel, KernelArgs, Result};

#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct AppendArgs {
    /// Number of entries, then the entries.
    log: DevicePtr,
    value: i32,
    pad: i32,
}

/// Arguments that nobody reads.
#[repr(C)]
#[derive(Clone, Copy, KernelArgs)]
pub(super) struct PanicArgs {
    pub(super) value: u32,
}

static SOURCE: Source = Source::new("testing.cu", "").takes::<AppendArgs>().takes::<PanicArgs>();

/// Appends a value to a list in device memory, so that the list tells in which order work ran.
// SAFETY: the source has no kernel; `append` checks every access, as all host references do.
pub(super) static APPEND: Kernel<AppendArgs> = unsafe { Kernel::new("append", &SOURCE, append) };

fn append(args: &AppendArgs, _: &Dims, memory: &HostMemory<'_>) -> Result<()> {
    let len = memory.view::<i32>(args.log, 1)?[0].get();
    let list = memory.view::<i32>(args.log, len as usize + 2)?;
    list[0].set(len + 1);
    list[len as usize + 1].set(args.value);
    Ok(())
}

/// Panics.
// SAFETY: the source has no kernel, and the host reference touches nothing.
pub(super) static PANIC: Kernel<PanicArgs> = unsafe { Kernel::new("panic", &SOURCE, |_, _, _| panic!("asked for")) };

/// How many values a log holds at most.
const LOG_LEN: usize = 256;

pub(super) struct Rig {
    pub(super) backend: HostBackend,
    pub(super) control: HostControl,
}

impl Rig {
    pub(super) fn new() -> Self {
        Self::with(HostOptions::default())
    }

    pub(super) fn with(options: HostOptions) -> Self {
        let backend = HostBackend::new(options);
        let control = backend.control();
        Self { backend, control }
    }

    pub(super) fn stream(&self, name: &str) -> StreamHandle {
        self.backend.create_stream(name).unwrap()
    }

    pub(super) fn event(&self) -> EventHandle {
        self.backend.create_event().unwrap()
    }

    /// Allocates an empty log.
    pub(super) fn log(&self) -> DevicePtr {
        let log = self.backend.alloc(4 * (1 + LOG_LEN)).unwrap();
        let stream = self.stream("log");
        self.backend.enqueue(stream, &Op::Fill { dst: log, byte: 0, bytes: 4 }).unwrap();
        self.backend.synchronize().unwrap();
        log
    }

    pub(super) fn append(&self, stream: StreamHandle, log: DevicePtr, value: i32) -> Result<()> {
        let args = AppendArgs { log, value, pad: 0 };
        self.backend.enqueue(stream, &Op::Launch(Launch::new(&APPEND, Dims::linear(1, 1), &args)))
    }

    /// Runs everything and returns what the log holds.
    pub(super) fn read_log(&self, log: DevicePtr) -> Vec<i32> {
        self.backend.synchronize().unwrap();
        let stream = self.stream("log");
        let len = self.read::<i32>(stream, log, 1).unwrap()[0];
        self.read(stream, log, 1 + len as usize).unwrap()[1..].to_vec()
    }

    pub(super) fn read<T: crate::Element>(&self, stream: StreamHandle, ptr: DevicePtr, len: usize) -> Result<Vec<T>> {
        let mut data = vec![T::zeroed(); len];
        self.backend.copy_to_host(stream, bytemuck::cast_slice_mut(&mut data), ptr)?;
        Ok(data)
    }

    pub(super) fn copy(&self, stream: StreamHandle, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<()> {
        let copy = RowCopy { dst, dst_pitch: bytes, src, src_pitch: bytes, row_bytes: bytes, rows: 1 };
        self.backend.enqueue(stream, &Op::Copy(copy))
    }

    /// Makes `to` wait for the work that `from` holds now.
    pub(super) fn order(&self, from: StreamHandle, to: StreamHandle) -> Result<()> {
        let event = self.event();
        self.backend.record_event(event, from)?;
        self.backend.wait_event(to, event)
    }

    /// Captures what `f` enqueues on `stream` and instantiates it.
    pub(super) fn capture(&self, stream: StreamHandle, f: impl FnOnce()) -> Result<ExecHandle> {
        self.backend.begin_capture(stream)?;
        f();
        let graph = self.backend.end_capture(stream)?;
        let exec = self.backend.instantiate(graph);
        self.backend.destroy_graph(graph);
        exec
    }

    /// Enqueues work that fails with [`crate::Error::Memory`].
    pub(super) fn fail_later(&self, stream: StreamHandle) {
        self.backend.enqueue(stream, &Op::Fill { dst: DevicePtr::NULL, byte: 0, bytes: 1 }).unwrap();
    }
}
