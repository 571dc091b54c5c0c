//! Products with weights.

ops! {
    dense,
    grouped,
    head,
}
