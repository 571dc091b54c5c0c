//! Large or frequent transfers between host and device, beside the forwards of a runner.
//!
//! [`Staging`] carries the inputs of a forward, [`Readback`] its results, and [`Uploader`] whole checkpoints. All three
//! go through page-locked memory, so that neither side waits for the other.

mod readback;
mod staging;
mod upload;

pub use readback::Readback;
pub use staging::Staging;
pub use upload::{UploadOptions, UploadSource, Uploader};
