//! Events: points in a stream's order. They carry no time stamps (`CU_EVENT_DISABLE_TIMING`), which makes them cheap.
//!
//! A wait by a capturing stream on an event that was recorded outside the capture is the driver's
//! `CUDA_ERROR_STREAM_CAPTURE_ISOLATION`: it spoils the capture and is reported, never dropped.

use super::super::traits::{EventBackend, EventHandle, StreamHandle};
use super::CudaBackend;
use crate::Result;

impl EventBackend for CudaBackend {
    fn create_event(&self) -> Result<EventHandle> {
        let _relaxed = self.enter()?;
        self.driver.create_event().map(EventHandle)
    }

    fn destroy_event(&self, event: EventHandle) {
        self.enter_and_log(|driver| driver.destroy_event(event.0));
    }

    fn record_event(&self, event: EventHandle, stream: StreamHandle) -> Result<()> {
        self.bind()?;
        self.driver.record_event(event.0, stream.0)
    }

    fn wait_event(&self, stream: StreamHandle, event: EventHandle) -> Result<()> {
        self.bind()?;
        self.driver.wait_event(stream.0, event.0)
    }

    fn synchronize_event(&self, event: EventHandle) -> Result<()> {
        let _relaxed = self.enter_if_capturing()?;
        self.driver.synchronize_event(event.0)
    }
}
