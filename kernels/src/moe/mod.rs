//! Mixtures of experts: which token goes to which expert, and the way back.

ops! {
    combine,
    message,
    permute,
    place,
    route,
}
