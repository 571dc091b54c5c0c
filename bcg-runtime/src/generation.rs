//! Generations: what a graph was captured with, and whether that still stands (law L12).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::{Error, Result};

/// A counter that a resource (weights, a KV cache, a state pool) advances when its tensors are replaced.
///
/// Tensors carry the generation they were made in ([`crate::Tensor::stamped`]). A graph remembers the generations of
/// all tensors that it touches, and a replay against a newer one is refused. Updating a tensor in place keeps the
/// generation.
///
/// # Example
/// ```
/// use bcg_runtime::{DType, Device, Error, Generation, Runner, RunnerOptions};
/// let device = Device::host();
/// let mut runner = Runner::new(&device, RunnerOptions::default())?;
/// let weights = Generation::new("weights");
/// let w = device.zeros(&[4], DType::F32)?.stamped(&weights)?;
/// weights.advance(); // `w` was replaced by something newer
/// let used = runner.eager(&(), |cx| cx.addr(&w));
/// assert!(matches!(used, Err(Error::Generation { .. })));
/// # Ok::<(), bcg_runtime::Error>(())
/// ```
#[derive(Clone)]
pub struct Generation(Arc<Inner>);

struct Inner {
    what: String,
    current: AtomicU64,
}

impl Generation {
    /// Starts the generations of the resource called `what`.
    pub fn new(what: impl Into<String>) -> Self {
        Self(Arc::new(Inner { what: what.into(), current: AtomicU64::new(0) }))
    }

    /// Makes everything stamped so far outdated.
    pub fn advance(&self) {
        self.0.current.fetch_add(1, Ordering::AcqRel);
    }

    /// Returns the current generation.
    pub fn current(&self) -> u64 {
        self.0.current.load(Ordering::Acquire)
    }

    pub(crate) fn stamp(&self) -> Stamp {
        Stamp { generation: self.clone(), value: self.current() }
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Generation({} {})", self.0.what, self.current())
    }
}

/// A generation as it was when a tensor was made.
#[derive(Clone, Debug)]
pub(crate) struct Stamp {
    generation: Generation,
    value: u64,
}

impl Stamp {
    pub(crate) fn check(&self) -> Result<()> {
        let current = self.generation.current();
        if current == self.value {
            return Ok(());
        }
        Err(Error::Generation { what: self.generation.0.what.clone(), captured: self.value, current })
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.generation.0, &other.generation.0) && self.value == other.value
    }
}
