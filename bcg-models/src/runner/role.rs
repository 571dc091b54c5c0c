//! What a runner does of a pair of which one prefills and the other one decodes.
//!
//! The decode role is loaded first. Its caches lie in memory that the prefill role's device reaches. The prefill role runs
//! prompts only, all of them as prefills, and each layer's break pushes what the layer wrote to the pages and slots that
//! the decode role holds for the sequence ([`Push`](crate::batch::Push)). Once the host has waited for the step that ends
//! a prompt, all of it has arrived.

use std::sync::Arc;

use bcg_runtime::{DType, Device};

use crate::batch::{InputBuffers, Phase, SequenceInput};
use crate::error::{Error, Result};
use crate::state::{CacheLayout, Caches, KvCache, StateCache};

/// What a runner does.
#[derive(Debug, Clone, Default)]
pub enum Role {
    /// All of it.
    #[default]
    Alone,
    /// Decodes, and prefills what it has to compute again.
    Decode {
        /// The device of the prefill role.
        prefill: Device,
    },
    /// Prefills.
    Prefill {
        /// The caches of the decode role.
        decode: Arc<Caches>,
    },
}

impl Role {
    /// The phase that a batch runs in. Attention of a prefill is a break, which can push.
    pub(super) fn phase_of(&self, batch: &[SequenceInput<'_>]) -> Phase {
        match self {
            Self::Alone | Self::Decode { .. } => Phase::of(batch),
            Self::Prefill { .. } => Phase::Prefill,
        }
    }

    /// Whether batches may run in a phase.
    pub(super) fn has(&self, phase: Phase) -> bool {
        !matches!((self, phase), (Self::Prefill { .. }, Phase::Decode))
    }

    /// The devices beside its own one that reach its caches.
    fn with(&self) -> &[Device] {
        match self {
            Self::Decode { prefill } => std::slice::from_ref(prefill),
            Self::Alone | Self::Prefill { .. } => &[],
        }
    }

    pub(super) fn kv_cache(
        &self,
        device: &Device,
        dtype: DType,
        layout: &CacheLayout,
        pages: [usize; 2],
    ) -> bcg_runtime::Result<KvCache> {
        let cache = KvCache::new_shared(device, self.with(), dtype, layout, pages)?;
        match self {
            Self::Prefill { decode } => cache.pushing_to(&decode.kv),
            Self::Alone | Self::Decode { .. } => Ok(cache),
        }
    }

    pub(super) fn states(
        &self,
        device: &Device,
        dtype: DType,
        layout: &CacheLayout,
        slots: usize,
    ) -> bcg_runtime::Result<StateCache> {
        let states = StateCache::new_shared(device, self.with(), dtype, layout.states.as_ref(), slots)?;
        match self {
            Self::Prefill { decode } => states.pushing_to(&decode.states),
            Self::Alone | Self::Decode { .. } => Ok(states),
        }
    }

    pub(super) fn inputs(&self, inputs: InputBuffers, device: &Device) -> bcg_runtime::Result<InputBuffers> {
        match self {
            Self::Prefill { .. } => inputs.pushing(device),
            Self::Alone | Self::Decode { .. } => Ok(inputs),
        }
    }

    /// Refuses to push where the decode role has no room, before anything runs.
    pub(super) fn check(&self, sequence: &SequenceInput<'_>) -> Result<()> {
        let (Self::Prefill { decode }, Some(push)) = (self, sequence.push) else { return Ok(()) };
        let wanted = sequence.kv_len().div_ceil(decode.kv.page_size());
        if push.pages.len() < wanted {
            return Err(Error::batch("pages to push to", format!("at least {wanted}"), push.pages.len()));
        }
        if let Some(page) = push.pages.iter().find(|&&page| page as usize >= decode.kv.num_pages()) {
            return Err(Error::batch("page to push to", format!("below {}", decode.kv.num_pages()), page));
        }
        Ok(())
    }
}
