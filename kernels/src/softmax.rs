//! The softmax of attention, as the host references compute it.

/// The mean of the rows of `values`, `width` elements each, weighted by the softmax of `scores`; zeros where there is no
/// score. A row without score does not count.
pub(crate) fn softmax_mean(mut scores: Vec<f32>, values: &[f32], width: usize) -> Vec<f32> {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    scores.iter_mut().for_each(|score| *score = (*score - max).exp());
    let sum: f32 = scores.iter().sum();
    let mut out = vec![0.0; width];
    for (weight, value) in scores.iter().zip(values.chunks(width)) {
        out.iter_mut().zip(value).for_each(|(out, value)| *out += weight * value);
    }
    let inverse = if sum > 0.0 { 1.0 / sum } else { 0.0 };
    out.iter_mut().for_each(|out| *out *= inverse);
    out
}
