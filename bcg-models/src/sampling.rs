//! How the next token is chosen from the logits.

use crate::error::{Error, Result};

/// The sampling parameters of one sequence.
///
/// # Example
/// ```
/// use bcg_models::SamplingParams;
/// assert!(SamplingParams::greedy().is_greedy());
/// let error = SamplingParams { top_p: 1.5, ..SamplingParams::default() }.validate().unwrap_err();
/// assert_eq!(error.to_string(), "sampling parameter `top_p`: expected a number in (0, 1], got 1.5");
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 chooses the most likely token.
    pub temperature: f32,
    /// Keeps the `k` most likely tokens; `None` keeps all.
    pub top_k: Option<u32>,
    /// Keeps the most likely tokens that together reach this probability; 1 keeps all.
    pub top_p: f32,
    /// Drops tokens less likely than this fraction of the most likely one; 0 drops none.
    pub min_p: f32,
    /// Seeds the sequence's random numbers: the same seed and the same number of tokens drawn before choose the same
    /// token from the same logits.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

impl SamplingParams {
    /// The parameters that always choose the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether no random number is needed.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 || self.top_k == Some(1)
    }

    /// Checks every parameter's range.
    ///
    /// # Errors
    /// [`Error::Sampling`] names the first parameter out of range.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field, expected, got: &dyn std::fmt::Display| {
            Err(Error::Sampling { field, expected, got: got.to_string() })
        };
        if !(0.0..=100.0).contains(&self.temperature) {
            return refuse("temperature", "a number in [0, 100]", &self.temperature);
        }
        if self.top_k == Some(0) {
            return refuse("top_k", "a positive integer", &0);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return refuse("top_p", "a number in (0, 1]", &self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return refuse("min_p", "a number in [0, 1]", &self.min_p);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parameter_out_of_range_is_named() {
        let good = SamplingParams::default();
        good.validate().expect("defaults are in range");
        for (field, params) in [
            ("temperature", SamplingParams { temperature: -0.1, ..good }),
            ("temperature", SamplingParams { temperature: f32::NAN, ..good }),
            ("top_k", SamplingParams { top_k: Some(0), ..good }),
            ("top_p", SamplingParams { top_p: 0.0, ..good }),
            ("top_p", SamplingParams { top_p: f32::NAN, ..good }),
            ("min_p", SamplingParams { min_p: 1.1, ..good }),
        ] {
            let error = params.validate().expect_err(field).to_string();
            assert!(error.contains(&format!("`{field}`")), "{error}");
        }
    }
}
