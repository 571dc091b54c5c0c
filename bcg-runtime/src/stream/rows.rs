//! The rows of a forward: how many are real, and where the device finds that number (law L11).

use crate::{DevicePtr, Error, OpStream, Result};

/// The rows of a forward: how many are real, and how many the tensors have.
///
/// # Example
/// ```
/// use bcg_runtime::{LiveBatch, Rows};
/// struct Batch { num_tokens: usize, capture_size: usize }
/// impl LiveBatch for Batch {
///     fn rows(&self) -> Option<Rows> {
///         Some(Rows { valid: self.num_tokens, padded: self.capture_size })
///     }
/// }
/// assert_eq!(Batch { num_tokens: 5, capture_size: 8 }.rows().unwrap().padded, 8);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rows {
    /// The number of real rows, at most `padded`.
    pub valid: usize,
    /// The number of rows that the tensors have: the capture size.
    pub padded: usize,
}

impl OpStream {
    /// Returns the address of an `i32` on the device: the valid rows of the forward that runs now (law L11). Without
    /// rows in the live batch it holds `i32::MAX`.
    pub fn valid_rows_ptr(&self) -> DevicePtr {
        self.valid_rows.ptr()
    }

    /// Begins a forward in which the first `extent` bytes of the arena are taken.
    pub(crate) fn begin_forward(&mut self, rows: Option<Rows>, extent: usize) -> Result<()> {
        if let Some(Rows { valid, padded }) = rows
            && valid > padded
        {
            let message = format!("{valid} valid rows do not fit into {padded} padded rows");
            return Err(Error::Option { option: "LiveBatch::rows", message });
        }
        let Ok(valid) = rows.map_or(Ok(i32::MAX), |rows| i32::try_from(rows.valid)) else {
            let message = format!("{rows:?} are more than the {} that a device counts", i32::MAX);
            return Err(Error::Option { option: "LiveBatch::rows", message });
        };
        self.check_ranks()?;
        self.reset_forks();
        self.arena().begin_forward(extent)?;
        self.set_valid_rows(valid.cast_unsigned())
    }

    /// In poison mode, fills the arena memory of a replay with NaN: all of it is dead when the replay begins.
    pub(crate) fn poison_extent(&mut self, extent: usize) -> Result<()> {
        if !self.is_poisoned() {
            return Ok(());
        }
        let base = self.arena().base();
        self.fill_range(base, 0xFF, extent)
    }

    /// Tells the device how many rows of the coming forward are valid.
    fn set_valid_rows(&mut self, valid: u32) -> Result<()> {
        if self.valid_rows_now == Some(valid) {
            return Ok(());
        }
        self.valid_rows_now = None;
        let ptr = self.valid_rows.ptr();
        self.device.backend().fill_u32(self.main.handle(), ptr, valid, 1)?;
        self.valid_rows_now = Some(valid);
        Ok(())
    }
}
