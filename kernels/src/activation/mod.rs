//! Activations of gated and plain layers.

ops! {
    relu2,
    silu_mul,
}
