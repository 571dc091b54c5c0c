//! What failed, in which segment, at which break, with the driver's code kept.

use std::fmt::{self, Display, Formatter};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::break_site::BreakSite;

/// A result whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The driver's results after which a process has no working context any more, by code and name.
///
/// `cuda.h` says of nearly all that the process must be terminated and relaunched. After uncorrectable errors of memory
/// and of links (214, 220) and after a context was destroyed (709) nothing on it can be trusted or used either.
const CONTEXT_LOST: &[(i32, &str)] = &[
    (214, "CUDA_ERROR_ECC_UNCORRECTABLE"),
    (220, "CUDA_ERROR_NVLINK_UNCORRECTABLE"),
    (226, "CUDA_ERROR_CONTAINED"),
    (700, "CUDA_ERROR_ILLEGAL_ADDRESS"),
    (702, "CUDA_ERROR_LAUNCH_TIMEOUT"),
    (709, "CUDA_ERROR_CONTEXT_IS_DESTROYED"),
    (710, "CUDA_ERROR_ASSERT"),
    (714, "CUDA_ERROR_HARDWARE_STACK_ERROR"),
    (715, "CUDA_ERROR_ILLEGAL_INSTRUCTION"),
    (716, "CUDA_ERROR_MISALIGNED_ADDRESS"),
    (717, "CUDA_ERROR_INVALID_ADDRESS_SPACE"),
    (718, "CUDA_ERROR_INVALID_PC"),
    (719, "CUDA_ERROR_LAUNCH_FAILED"),
    (721, "CUDA_ERROR_TENSOR_MEMORY_LEAK"),
    (810, "CUDA_ERROR_MPS_CLIENT_TERMINATED"),
    (911, "CUDA_ERROR_EXTERNAL_DEVICE"),
];

/// Returns the name of a driver's result after which the context is lost.
pub(crate) fn context_lost_name(code: i32) -> Option<&'static str> {
    CONTEXT_LOST.iter().find(|(known, _)| *known == code).map(|(_, name)| *name)
}

/// Everything that can go wrong in the runtime.
///
/// An error is reported once, where it first happened: later failures that it causes never replace it (law L5).
///
/// # Example
/// ```
/// use bcg_runtime::{Device, Error};
/// let refused = Device::host().tensor(&[3], &[1.0f32]).unwrap_err();
/// assert!(matches!(refused, Error::Shape { .. }));
/// assert_eq!(refused.to_string(), "Device::write: expected 12 bytes for [3] f32, got 4 bytes");
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A call of the device's driver failed.
    #[error("{call} failed: {name} (code {code})")]
    Driver {
        /// The driver's function, such as `cuGraphLaunch`.
        call: &'static str,
        /// The driver's result code, such as 700.
        code: i32,
        /// The code's name, such as `CUDA_ERROR_ILLEGAL_ADDRESS`.
        name: String,
    },
    /// The device has too little free memory.
    #[error(
        "{device}: out of memory: {requested_bytes} bytes requested, {free_bytes} free; lower the model's memory use (KV cache tokens, largest capture size)"
    )]
    OutOfMemory {
        /// The device's name.
        device: String,
        /// The bytes that were asked for.
        requested_bytes: usize,
        /// The bytes that the driver reports free.
        free_bytes: usize,
    },
    /// Memory was asked for outside the arena after the world of the device's rank was sealed (law L14).
    #[error(
        "{device}: no memory is allocated once its world is sealed, because that waits for GPUs on which ranks wait for each other; allocate before World::seal, or take memory of the arena (OpStream::empty)"
    )]
    Sealed {
        /// The device's name.
        device: String,
    },
    /// No device of the wanted kind can be used.
    #[error("no usable device: {0}")]
    NoDevice(String),
    /// Running kernels cannot be watched.
    #[error("cannot trace kernels: {0}")]
    Trace(String),
    /// A kernel's source did not compile or load.
    #[error("kernel {kernel}: {message}")]
    Kernel {
        /// The kernel's entry name.
        kernel: String,
        /// The compiler's or the driver's words.
        message: String,
    },
    /// A kernel of the host device touched memory that it must not touch.
    #[error("kernel {kernel}: {message}")]
    Memory {
        /// The kernel, copy or fill at fault.
        kernel: String,
        /// The address, its length and what is there.
        message: String,
    },
    /// A tensor has another shape or dtype than an operation needs.
    #[error("{op}: expected {expected}, got {got}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What the operation needs.
        expected: String,
        /// What the operation was given.
        got: String,
    },
    /// A tensor is used outside the forward that owns its memory.
    #[error(
        "stale tensor: it belongs to forward {tensor} of its arena, which now runs forward {current}; keep a copy in a persistent tensor (Device::empty) to use it later"
    )]
    Stale {
        /// The forward in which the tensor was made.
        tensor: u64,
        /// The forward that the arena runs now.
        current: u64,
    },
    /// A tensor of another arena or device is used.
    #[error("foreign tensor: it lives on {tensor}, but the work goes to {current}")]
    Foreign {
        /// Where the tensor lives.
        tensor: String,
        /// Where the work is enqueued.
        current: String,
    },
    /// Something that a graph was captured with was replaced since (law L12).
    #[error(
        "{what} changed after the capture (generation {captured} captured, {current} now); capture the graph again"
    )]
    Generation {
        /// The resource's name, such as `kv cache`.
        what: String,
        /// The resource's generation at capture.
        captured: u64,
        /// The resource's generation now.
        current: u64,
    },
    /// The arena would have to grow inside a segment, or beyond its bound.
    #[error("arena: {requested_bytes} bytes do not fit: {in_use_bytes} of {limit_bytes} bytes in use{hint}")]
    ArenaFull {
        /// The bytes that were asked for.
        requested_bytes: usize,
        /// The bytes in use.
        in_use_bytes: usize,
        /// The bytes that may be used now.
        limit_bytes: usize,
        /// What the reader can do about it.
        hint: &'static str,
    },
    /// A transition that the capture's state machine refuses.
    #[error("capture: cannot {transition} while {state}")]
    CaptureState {
        /// The refused transition.
        transition: &'static str,
        /// The state, unchanged by the refusal.
        state: &'static str,
    },
    /// Something that CUDA forbids during a capture.
    #[error("not allowed during a capture: {what}")]
    CaptureForbidden {
        /// The call and the remedy.
        what: String,
    },
    /// A capture that runs nothing met a call that needs results; it is captured again, with a run.
    #[error("{what} in a break needs a run of the forward")]
    NeedsRun {
        /// The call.
        what: &'static str,
    },
    /// A side stream was not joined before its segment or break ended.
    #[error(
        "side stream `{stream}` was not joined before {place}; wait on its event from the capturing stream, or use a scope"
    )]
    UnjoinedStream {
        /// The side stream's name.
        stream: String,
        /// Where the join was missing.
        place: String,
    },
    /// A break failed.
    #[error("break `{name}` after segment {segment} ({file}:{line}): {cause}")]
    Break {
        /// The annotated function.
        name: &'static str,
        /// Index of the segment that the break ended.
        segment: usize,
        /// Source file of the annotated function.
        file: &'static str,
        /// The line of the annotated function.
        line: u32,
        /// What failed. The text tells it, so it is not also the `source()` of this error.
        cause: Box<Error>,
    },
    /// A segment failed to end, instantiate or launch.
    #[error("segment {segment}: {cause}")]
    Segment {
        /// Index of the segment.
        segment: usize,
        /// What failed. The text tells it, so it is not also the `source()` of this error.
        cause: Box<Error>,
    },
    /// A function panicked.
    #[error("panicked: {message}")]
    Panic {
        /// The panic's message.
        message: String,
    },
    /// A break returned something else than at capture.
    #[error("output {path}: expected {expected}, got {got}")]
    Output {
        /// Which output, such as `.0`.
        path: String,
        /// What was captured.
        expected: String,
        /// What was returned at replay.
        got: String,
    },
    /// The number of breaks is not the stated one.
    #[error(
        "break census: expected {expected} breaks, captured {got} ({names}); annotate the missing function, or correct the expected number"
    )]
    Census {
        /// The stated number, or that of the other sizes.
        expected: usize,
        /// The captured number.
        got: usize,
        /// The captured breaks.
        names: String,
    },
    /// A replay of a graph that holds no capture.
    #[error("graph `{name}` holds no capture: {reason}")]
    NotCaptured {
        /// The graph.
        name: String,
        /// Why there is none.
        reason: &'static str,
    },
    /// Verification found a replay that differs from the eager run.
    #[error("graph `{graph}`: replay differs from eager first in {place}: {detail}")]
    Mismatch {
        /// The graph.
        graph: String,
        /// The first segment or output that differs.
        place: String,
        /// Which tensor differs, and by how many bytes.
        detail: String,
    },
    /// A rank of a world failed, came too late, or did something else than the others: the world is lost (law L18). All other
    /// ranks get this error, the same one; the rank that failed gets its own.
    #[error("rank {rank} is lost{}: {cause}; no rank of this world goes on: make the world anew", Place(.collective, *.segment))]
    RankLost {
        /// The rank at fault.
        rank: usize,
        /// What the others waited for, such as `all_reduce`; empty if nobody waited.
        collective: String,
        /// The segment that the collective stands in, if it is captured.
        segment: Option<usize>,
        /// What the rank did, or did not do.
        cause: String,
    },
    /// The nodes of a world of several processes did not come together: one did not come, or was started otherwise than the
    /// others.
    #[error("the nodes of this world do not come together: {0}")]
    Nodes(String),
    /// A step of all ranks failed on one of them, or was not the same on all of them. No rank did it, and the world goes on.
    #[error("{what}: {message}")]
    Ranks {
        /// The step, such as `a capture`.
        what: &'static str,
        /// Which rank, and why.
        message: String,
    },
    /// An option has a value that cannot work.
    #[error("{option}: {message}")]
    Option {
        /// The option's name.
        option: &'static str,
        /// What is wrong and what to do.
        message: String,
    },
    /// An error of the model author's own.
    #[error(transparent)]
    Other(#[from] Box<dyn std::error::Error + Send + Sync>),
}

/// Where ranks waited for one that did not come.
struct Place<'a>(&'a str, Option<usize>);

impl Display for Place<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match (self.0, self.1) {
            ("", _) => Ok(()),
            (collective, None) => write!(f, " at `{collective}`"),
            (collective, Some(segment)) => write!(f, " at `{collective}` of segment {segment}"),
        }
    }
}

impl Error {
    /// Makes an [`Error::Shape`].
    pub fn shape(op: &'static str, expected: impl Display, got: impl Display) -> Self {
        Self::Shape { op, expected: expected.to_string(), got: got.to_string() }
    }

    /// Wraps an error, or a message, of the caller's own.
    pub fn other(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Other(error.into())
    }

    /// Returns the error at the root of a chain of breaks and segments.
    pub fn root(&self) -> &Self {
        match self {
            Self::Break { cause, .. } | Self::Segment { cause, .. } => cause.root(),
            other => other,
        }
    }

    /// Tells whether the device's context is lost for good: a kernel trapped or touched memory that is not its own, or
    /// the hardware failed. Every later call of this process fails then, on a new context too, so only a new process can
    /// go on. After any other error of the driver, such as a lack of memory or a refused value, the context works on.
    ///
    /// # Example
    /// ```
    /// use bcg_runtime::Error;
    /// let name = "CUDA_ERROR_LAUNCH_FAILED".to_owned();
    /// assert!(Error::Driver { call: "cuStreamSynchronize", code: 719, name }.is_context_lost());
    /// let name = "CUDA_ERROR_INVALID_VALUE".to_owned();
    /// assert!(!Error::Driver { call: "cuLaunchKernel", code: 1, name }.is_context_lost());
    /// ```
    pub fn is_context_lost(&self) -> bool {
        matches!(self.root(), Self::Driver { code, .. } if context_lost_name(*code).is_some())
    }

    /// Makes the error of a failed driver call.
    pub(crate) fn driver(call: &'static str, code: i32, name: impl Into<String>) -> Self {
        Self::Driver { call, code, name: name.into() }
    }

    /// Makes an [`Error::Foreign`].
    pub(crate) fn foreign(tensor: &str, current: &str) -> Self {
        Self::Foreign { tensor: tensor.to_owned(), current: current.to_owned() }
    }

    /// Says at which break the error happened, unless that is known already.
    pub(crate) fn in_break(self, site: &'static BreakSite, segment: usize) -> Self {
        match self {
            located @ Self::Break { .. } => located,
            cause => {
                let BreakSite { name, file, line, .. } = *site;
                Self::Break { name, segment, file, line, cause: Box::new(cause) }
            }
        }
    }

    /// Says in which segment the error happened, unless a segment or break is known already.
    pub(crate) fn in_segment(self, segment: usize) -> Self {
        match self {
            located @ (Self::Break { .. } | Self::Segment { .. }) => located,
            cause => Self::Segment { segment, cause: Box::new(cause) },
        }
    }
}

/// Runs `f` and turns a panic into [`Error::Panic`], so that the caller's guards and the first error survive (law L5).
pub(crate) fn catch_panic<R>(f: impl FnOnce() -> Result<R>) -> Result<R> {
    catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|payload| {
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "a panic without a message".to_owned());
        Err(Error::Panic { message })
    })
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        static SITE: BreakSite = BreakSite { name: "attend", file: "model.rs", line: 7, is_rank_coupled: false };
        let failed = || Error::driver("cuGraphLaunch", 700, "CUDA_ERROR_ILLEGAL_ADDRESS");
        for error in [failed().in_segment(2), failed().in_break(&SITE, 2)] {
            assert_eq!(error.to_string().matches("cuGraphLaunch failed").count(), 1, "{error}");
            assert!(error.source().is_none(), "who joins an error with its sources tells the cause once too");
            assert!(matches!(error.root(), Error::Driver { code: 700, .. }));
        }
    }

    #[test]
    fn a_context_is_lost_after_what_the_driver_says_ends_the_process_and_after_nothing_else() {
        let lost = [214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911];
        let failed = |code| Error::driver("cuStreamSynchronize", code, "A NAME");
        let found: Vec<i32> = (-1..=1000).filter(|code| failed(*code).is_context_lost()).collect();
        // Among the others: 1 a refused value, 2 no memory, 701 no resources for a launch, 720 a cooperative launch that
        // is too large, 901 a spoiled capture, 999 an injected fault.
        assert_eq!(found, lost);
        assert!(failed(719).in_segment(3).is_context_lost(), "wherever it happened");
        assert!(!Error::OutOfMemory { device: "host:0".into(), requested_bytes: 1, free_bytes: 0 }.is_context_lost());
    }
}
