//! State-space layers of Mamba2.

mod state_slots;

pub use state_slots::StateSlots;

ops! {
    causal_conv1d,
    ssd_scan,
    ssm_update,
}
