//! Matrix products by cuBLASLt.
//!
//! - The algorithm of a shape is chosen once: the one that was tuned, now or by an earlier process, else the first that
//!   the library's heuristics name. It stays until tuning replaces it, so a shape gives the same bits each time.
//! - All algorithms are deterministic: sums are split only with partial sums in the workspace, in f32.
//! - The library and its state are made at the first product. That, and the first launch of an algorithm, which loads a
//!   kernel, are legal during a capture (the thread steps out of the capture's protection), but slow: warm up first.

use std::collections::HashMap;
use std::sync::{OnceLock, PoisonError, RwLock};

use super::super::traits::{Matmul, MatmulBackend, MatmulPlan, MatmulShape, StreamHandle};
use super::CudaBackend;
use super::cublaslt::{CublasLt, Descriptors, Handle};
use super::plans::PlanFile;
use crate::compile::Cache;
use crate::device::traits::MatmulTuning;
use crate::{Error, Result};

/// The most workspace that an algorithm may ask for; what NVIDIA recommends for Hopper, the largest it names.
pub(super) const WORKSPACE_BYTES_MAX: usize = 32 << 20;

/// The products of a device, once there is one.
pub(super) type Matmuls = OnceLock<State>;

pub(super) struct State {
    pub(super) handle: Handle,
    pub(super) file: PlanFile,
    plans: RwLock<HashMap<MatmulShape, Known>>,
}

/// The plan of a shape.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) plan: MatmulPlan,
    pub(super) is_tuned: bool,
}

impl State {
    /// The plans in use.
    pub(super) fn snapshot(&self) -> HashMap<MatmulShape, Known> {
        self.plans.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set(&self, shape: MatmulShape, known: Known) {
        self.plans.write().unwrap_or_else(PoisonError::into_inner).insert(shape, known);
    }

    fn get(&self, shape: &MatmulShape) -> Option<Known> {
        self.plans.read().unwrap_or_else(PoisonError::into_inner).get(shape).copied()
    }

    /// The plan of a shape, chosen now if there is none yet.
    pub(super) fn known(&self, shape: &MatmulShape) -> Result<Known> {
        if let Some(known) = self.get(shape) {
            return Ok(known);
        }
        let known = self.choose(shape)?;
        self.set(*shape, known);
        Ok(known)
    }

    /// Chooses the plan of a shape: from disk, else the first heuristic.
    fn choose(&self, shape: &MatmulShape) -> Result<Known> {
        let descriptors = Descriptors::new(self.handle.library, shape)?;
        if let Some(algorithm) = self.file.get(shape) {
            match self.handle.workspace_bytes(&descriptors, &algorithm) {
                Ok(workspace_bytes) if workspace_bytes <= WORKSPACE_BYTES_MAX => {
                    return Ok(Known { plan: MatmulPlan { workspace_bytes, algorithm }, is_tuned: true });
                }
                Ok(_) => tracing::warn!(%shape, "an algorithm on disk needs too much workspace; choosing again"),
                Err(error) => tracing::warn!(%shape, %error, "an algorithm on disk does not fit; choosing again"),
            }
        }
        let first = self.handle.heuristics(&descriptors, shape, WORKSPACE_BYTES_MAX, 1)?[0];
        let plan = MatmulPlan { workspace_bytes: first.workspace_bytes, algorithm: first.algorithm };
        Ok(Known { plan, is_tuned: false })
    }
}

impl CudaBackend {
    /// Returns the device's products, which the first use makes. The caller has entered (`CudaBackend::enter`).
    pub(super) fn matmuls(&self) -> Result<&State> {
        if let Some(state) = self.matmuls.get() {
            return Ok(state);
        }
        let handle = Handle::new(CublasLt::get()?)?;
        let model = self.name.split_once(' ').map_or(self.name.as_str(), |(_, model)| model);
        let device = format!("{model}, {}, {} multiprocessors", self.arch, self.num_multiprocessors);
        let file = PlanFile::open(Cache::of_user(), &device, handle.library.version());
        Ok(self.matmuls.get_or_init(|| State { handle, file, plans: RwLock::default() }))
    }
}

impl MatmulBackend for CudaBackend {
    fn plan_matmul(&self, shape: &MatmulShape) -> Result<MatmulPlan> {
        if let Some(known) = self.matmuls.get().and_then(|state| state.get(shape)) {
            return Ok(known.plan);
        }
        let _relaxed = self.enter()?;
        Ok(self.matmuls()?.known(shape)?.plan)
    }

    fn matmul_workspace_bytes_max(&self) -> usize {
        WORKSPACE_BYTES_MAX
    }

    fn matmul(&self, stream: StreamHandle, product: &Matmul) -> Result<()> {
        let _relaxed = self.enter_if_capturing()?;
        let state = self.matmuls()?;
        let descriptors = Descriptors::new(state.handle.library, &product.shape)?;
        state.handle.matmul(&descriptors, product, stream.0).inspect_err(|error: &Error| {
            tracing::error!(shape = %product.shape, %error, "a matrix product failed");
        })
    }

    fn tune_matmuls(&self, rows: &[usize], progress: &mut dyn FnMut(usize, usize)) -> Result<MatmulTuning> {
        self.tune(rows, progress)
    }

    fn matmul_plans(&self) -> Vec<(MatmulShape, MatmulPlan)> {
        let plans = self.matmuls.get().map(State::snapshot).unwrap_or_default();
        plans.into_iter().map(|(shape, known)| (shape, known.plan)).collect()
    }

    fn set_matmul_plans(&self, plans: &[(MatmulShape, MatmulPlan)]) -> Result<()> {
        let _relaxed = self.enter()?;
        let state = self.matmuls()?;
        plans.iter().for_each(|(shape, plan)| state.set(*shape, Known { plan: *plan, is_tuned: true }));
        Ok(())
    }
}
