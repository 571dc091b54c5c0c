//! Prefill apart from decode: two roles on two devices, each with a model, a scheduler and a worker of its own, behind one
//! front door.
//!
//! A request is admitted by the prefill role once the decode role has room for it ([`DecodeRoom`]). It is prefilled there,
//! and what its steps write is pushed to its pages in the decode role as well. The prefill role hands out the first token;
//! then the request moves, with all that is known of it, and runs in the decode role until it ends. One that is preempted
//! there is computed again there: the decode role is a whole engine.
//!
//! A request moves after its last step of the prefill role was collected: the host has waited for the stream that pushed,
//! so whatever the decode role launches from then on sees the rows.
//!
//! Reading order: `room` is what bounds how many come, `partner` what a worker knows of the other one, `pair` runs both.

mod load;
mod pair;
mod partner;
mod room;

use std::fmt;
use std::str::FromStr;

pub(crate) use load::start_with;
pub(crate) use pair::PairThread;
pub use pair::Roles;
pub use partner::{Moved, MovedBytes, Partner};
pub use room::{DecodePlace, DecodeRoom, Destination};

/// One of the two roles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RoleName {
    /// Runs prompts.
    Prefill,
    /// Runs answers.
    Decode,
}

impl RoleName {
    /// The role's name in options, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// A role and the number of its GPU, `prefill:0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RoleDevice {
    /// The role.
    pub role: RoleName,
    /// The number of the GPU.
    pub gpu: usize,
}

impl FromStr for RoleDevice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let roles = [RoleName::Prefill, RoleName::Decode];
        let read = text.split_once(':').and_then(|(name, gpu)| {
            let role = roles.into_iter().find(|role| role.name() == name)?;
            Some(Self { role, gpu: gpu.parse().ok()? })
        });
        read.ok_or_else(|| format!("`{text}` is not a role and the number of its GPU, such as prefill:0 or decode:1"))
    }
}

impl fmt::Display for RoleDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.role.name(), self.gpu)
    }
}

#[cfg(test)]
mod tests;
