//! Rotary positions of latent attention: plain, or stretched by YaRN.

use std::f64::consts::TAU;

use bcg_kernels as ops;
use bcg_runtime::{Device, Tensor};
use serde_json::Value;

use super::attention::rope_base;
use crate::config::Fields;

/// Rotary frequencies, and what stretched positions do to rotated parts and scores.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryScaling {
    /// The angle per position of each pair.
    pub inv_freq: Vec<f32>,
    /// The factor of rotated queries and keys.
    pub rope_scale: f32,
    /// The factor of attention scores.
    pub score_scale: f32,
}

/// The fields of YaRN.
struct Yarn<'a> {
    fields: &'a Fields,
    object: &'static str,
}

impl RotaryScaling {
    /// Reads `rope_parameters` (transformers 5) or `rope_scaling` for rope parts of `dim` dimensions: no scaling, or
    /// `yarn`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read(fields: &Fields, dim: usize) -> crate::Result<Self> {
        let theta = rope_base(fields)?;
        let object = if fields.get("rope_parameters").is_some() { "rope_parameters" } else { "rope_scaling" };
        let mut kinds = ["rope_type", "type"].map(|key| format!("{object}.{key}")).into_iter();
        match kinds.find_map(|field| fields.get(&field).map(|kind| (field, kind))) {
            Some((_, kind)) if kind.as_str() == Some("yarn") => Yarn { fields, object }.read(theta, dim),
            Some((field, kind)) if kind.as_str() != Some("default") => {
                Err(fields.error(&field, "\"default\" or \"yarn\"", kind, "no other scaling is implemented"))
            }
            _ => Ok(Self { inv_freq: ops::rope_inv_freq(theta, dim), rope_scale: 1.0, score_scale: 1.0 }),
        }
    }

    /// The frequencies on a device, `[dim / 2]` f32.
    ///
    /// # Errors
    /// The device's.
    pub fn upload(&self, device: &Device) -> crate::Result<Tensor> {
        Ok(device.tensor(&[self.inv_freq.len()], &self.inv_freq)?)
    }
}

impl Yarn<'_> {
    fn number(&self, key: &str) -> crate::Result<Option<f64>> {
        self.fields.number(&format!("{}.{key}", self.object))
    }

    /// A number that counts as absent if it is 0.
    fn scale(&self, key: &str) -> crate::Result<Option<f64>> {
        let is_zero = self.fields.get(&format!("{}.{key}", self.object)).is_some_and(|v| v.as_f64() == Some(0.0));
        if is_zero { Ok(None) } else { self.number(key) }
    }

    /// Pairs that turn often within the original context keep their frequency, those that turn seldom are slowed down
    /// by `factor`, and a ramp lies between.
    fn read(&self, theta: f64, dim: usize) -> crate::Result<RotaryScaling> {
        let longest = self.fields.count("max_position_embeddings")? as f64;
        let original = self.number("original_max_position_embeddings")?.unwrap_or(longest);
        let factor = self.number("factor")?.unwrap_or(longest / original);
        let (fast, slow) = (self.number("beta_fast")?.unwrap_or(32.0), self.number("beta_slow")?.unwrap_or(1.0));
        let pair_of = |turns: f64| dim as f64 * (original / (turns * TAU)).ln() / (2.0 * theta.ln());
        let is_whole = self.fields.get(&format!("{}.truncate", self.object)).and_then(Value::as_bool).unwrap_or(true);
        let (first, last) = (pair_of(fast), pair_of(slow));
        let (first, last) = if is_whole { (first.floor(), last.ceil()) } else { (first, last) };
        let (first, last) = (first.max(0.0), last.min(dim as f64 - 1.0));
        let width = if first == last { 0.001 } else { last - first };
        let slowed = |(i, freq): (usize, f32)| {
            let share = ((i as f64 - first) / width).clamp(0.0, 1.0);
            (f64::from(freq) * (share / factor + (1.0 - share))) as f32
        };
        let stretch = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
        let (mscale, mscale_all_dim) = (self.scale("mscale")?, self.scale("mscale_all_dim")?);
        let rope_scale = match (self.number("attention_factor")?, mscale, mscale_all_dim) {
            (Some(scale), ..) => scale,
            (None, Some(mscale), Some(all)) => stretch(mscale) / stretch(all),
            _ => stretch(1.0),
        };
        Ok(RotaryScaling {
            inv_freq: ops::rope_inv_freq(theta, dim).into_iter().enumerate().map(slowed).collect(),
            rope_scale: rope_scale as f32,
            score_scale: mscale_all_dim.map_or(1.0, |all| stretch(all).powi(2)) as f32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(changes: &Value) -> crate::Result<RotaryScaling> {
        let mut root = json!({"rope_theta": 10_000, "max_position_embeddings": 163_840});
        for (key, value) in changes.as_object().expect("an object") {
            root[key] = value.clone();
        }
        RotaryScaling::read(&Fields::new("config.json", root), 64)
    }

    #[test]
    fn without_scaling_the_frequencies_are_plain() {
        let plain = RotaryScaling { inv_freq: ops::rope_inv_freq(1e4, 64), rope_scale: 1.0, score_scale: 1.0 };
        assert_eq!(read(&json!({})).expect("no scaling"), plain);
        let five = json!({"rope_theta": null, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}});
        assert_eq!(read(&five).expect("no scaling"), plain);
    }

    /// The numbers that transformers computes for the published configuration of DeepSeek-V3.
    #[test]
    fn yarn_slows_the_pairs_that_turn_seldom() {
        let yarn = json!({
            "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        });
        let v3 = read(&json!({"rope_scaling": yarn})).expect("YaRN");
        let plain = ops::rope_inv_freq(1e4, 64);
        assert_eq!(v3.inv_freq[..11], plain[..11]);
        for (i, expected) in YARN {
            assert!((v3.inv_freq[i] / expected - 1.0).abs() < 1e-5, "{i}: {} {expected}", v3.inv_freq[i]);
        }
        assert_eq!(v3.rope_scale, 1.0);
        assert!((v3.score_scale - 1.873_854).abs() < 1e-5, "{}", v3.score_scale);
    }

    const YARN: [(usize, f32); 3] = [(11, 0.039_006_927), (16, 0.005_5), (31, 3.333_803_5e-6)];

    #[test]
    fn another_scaling_is_refused_by_name() {
        let error = read(&json!({"rope_scaling": {"rope_type": "llama3"}})).expect_err("refused").to_string();
        assert!(error.contains("rope_scaling.rope_type") && error.contains("\"yarn\""), "{error}");
    }
}
