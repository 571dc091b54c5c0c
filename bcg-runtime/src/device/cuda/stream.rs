//! Streams and the work on them.
//!
//! Streams never wait for the legacy default stream (`CU_STREAM_NON_BLOCKING`). On the launch path a call is one driver
//! call: no lock, no allocation, no hashing.

use super::super::traits::{StreamBackend, StreamHandle};
use super::CudaBackend;
use crate::launch::Launch;
use crate::op::{Op, RowCopy};
use crate::{DevicePtr, Result};

impl StreamBackend for CudaBackend {
    fn create_stream(&self, _name: &str) -> Result<StreamHandle> {
        let _relaxed = self.enter()?;
        let stream = self.driver.create_stream()?;
        self.gate().streams.push((self.context, stream));
        Ok(StreamHandle(stream))
    }

    fn destroy_stream(&self, stream: StreamHandle) {
        self.gate().streams.retain(|known| *known != (self.context, stream.0));
        self.enter_and_log(|driver| driver.destroy_stream(stream.0));
    }

    fn synchronize_stream(&self, stream: StreamHandle) -> Result<()> {
        let _relaxed = self.enter_if_capturing()?;
        self.refuse_while_capturing(
            stream.0,
            "synchronising a stream that captures; end the segment with a break first",
        )?;
        self.driver.synchronize_stream(stream.0)
    }

    fn synchronize(&self) -> Result<()> {
        let mut gate = self.gate();
        let what = "synchronising the device; end the segment with a break first";
        self.refuse_while_this_thread_captures(&mut gate, what)?;
        let _relaxed = self.enter()?;
        self.wait_for_all(&gate)
    }

    fn enqueue(&self, stream: StreamHandle, op: &Op) -> Result<()> {
        match op {
            Op::Launch(launch) => self.launch(stream, launch),
            Op::Fill { dst, byte, bytes } => self.fill(stream, *dst, *byte, *bytes),
            Op::Copy(copy) => self.copy(stream, copy),
            Op::CopyFromPinned { dst, src, bytes } => self.copy_from_pinned(stream, *dst, *src, *bytes),
        }
    }

    fn fill_u32(&self, stream: StreamHandle, dst: DevicePtr, value: u32, count: usize) -> Result<()> {
        if count == 0 {
            return Ok(());
        }
        self.bind()?;
        self.driver.fill_u32(dst.0, value, count, stream.0)
    }

    fn copy_from_host(&self, stream: StreamHandle, dst: DevicePtr, src: &[u8]) -> Result<()> {
        if src.is_empty() {
            return Ok(());
        }
        self.copy_rows_from_host(stream, dst, src.len(), src.len(), src)
    }

    fn copy_rows_from_host(
        &self,
        stream: StreamHandle,
        dst: DevicePtr,
        pitch: usize,
        row_bytes: usize,
        src: &[u8],
    ) -> Result<()> {
        let _relaxed = self.enter_if_capturing()?;
        self.refuse_while_capturing(stream.0, "copying pageable host memory; fill a PinnedBuffer before the capture")?;
        // SAFETY: `src` is borrowed until the end of this function. If it is pageable, the driver has copied it into
        // its own staging memory when the call returns (CUDA driver API, "API synchronization behavior", memcpy,
        // async); if it is page-locked, the wait below outlasts the copy.
        unsafe { self.driver.copy_rows_from_host(dst.0, pitch, row_bytes, src, stream.0) }?;
        if self.driver.is_page_locked(src.as_ptr()) || self.driver.is_page_locked(&raw const src[src.len() - 1]) {
            self.driver.synchronize_stream(stream.0)?;
        }
        Ok(())
    }

    fn copy_to_host(&self, stream: StreamHandle, dst: &mut [u8], src: DevicePtr) -> Result<()> {
        if dst.is_empty() {
            return Ok(());
        }
        let _relaxed = self.enter_if_capturing()?;
        self.refuse_while_capturing(stream.0, "copying to the host; read inside a break or after the forward")?;
        // SAFETY: `dst` is borrowed mutably until the end of this function, and the wait below outlasts the copy. If
        // the wait fails, the context is lost and the copy does not run any more.
        unsafe { self.driver.copy_to_host(dst.as_mut_ptr(), src.0, dst.len(), stream.0) }?;
        self.driver.synchronize_stream(stream.0)
    }

    fn copy_to_pinned(&self, stream: StreamHandle, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.refuse_while_capturing(stream.0, "copying to the host; read inside a break or after the forward")?;
        let dst = std::ptr::with_exposed_provenance_mut::<u8>(dst.0 as usize);
        // SAFETY: `dst` lies in a live pinned buffer with room for `bytes` (contract of `traits`), which stays
        // allocated until the copy has run: `CudaBackend::release` waits for the device before it frees one. Host code
        // reads it after an event that follows the copy.
        unsafe { self.driver.copy_to_host(dst, src.0, bytes, stream.0) }
    }
}

/// The kinds of work.
impl CudaBackend {
    fn launch(&self, stream: StreamHandle, launch: &Launch) -> Result<()> {
        self.bind()?;
        let function = self.launchable(launch)?;
        // SAFETY: `launchable` establishes that the arguments are as long as the kernel's parameter; their addresses
        // come from `OpStream::addr`, which checks that their tensors are alive.
        let launched = unsafe {
            self.driver.launch(
                function.raw,
                &launch.dims,
                launch.args.as_slice(),
                stream.0,
                self.can_overlap && launch.kernel.is_programmatic(),
            )
        };
        launched.inspect_err(|error| {
            tracing::error!(kernel = launch.kernel.name(), dims = ?launch.dims, %error, "a launch failed");
        })
    }

    fn fill(&self, stream: StreamHandle, dst: DevicePtr, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        self.driver.fill_u8(dst.0, byte, bytes, stream.0)
    }

    fn copy(&self, stream: StreamHandle, copy: &RowCopy) -> Result<()> {
        if copy.rows == 0 || copy.row_bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        let is_dense = copy.dst_pitch == copy.row_bytes && copy.src_pitch == copy.row_bytes;
        if copy.rows == 1 || is_dense {
            return self.driver.copy(copy.dst.0, copy.src.0, copy.rows * copy.row_bytes, stream.0);
        }
        self.driver.copy_2d(copy, stream.0)
    }

    fn copy_from_pinned(&self, stream: StreamHandle, dst: DevicePtr, src: DevicePtr, bytes: usize) -> Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.bind()?;
        // Host and device share the pinned address, and the driver tells from it where the memory lies. A captured copy
        // reads the buffer at each replay; the graph's owner keeps it alive.
        let src = std::ptr::with_exposed_provenance::<u8>(src.0 as usize);
        // SAFETY: `src` is a live pinned buffer of at least `bytes` (its guard checks, contract of `traits`), which
        // stays allocated until the copy has run: `CudaBackend::release` waits for the device before it frees one.
        unsafe { self.driver.copy_from_host(dst.0, src, bytes, stream.0) }
    }
}
