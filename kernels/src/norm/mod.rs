//! RMS norms.

pub(crate) mod rms;

ops! {
    add_rms_norm,
    gated_rms_norm,
    rms_norm,
}
