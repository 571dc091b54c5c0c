//! Which layers of a model of experts have an MLP in their place.

use serde_json::Value;

use super::Fields;
use crate::error::Result;

/// The layers that have an MLP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DenseLayers {
    named: Vec<usize>,
    /// Every layer that is not named has experts if its number, counted from 1, is a multiple of this.
    sparse_step: usize,
}

impl DenseLayers {
    /// Reads `mlp_only_layers` and `decoder_sparse_step`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field.
    pub fn read(fields: &Fields) -> Result<Self> {
        let sparse_step = fields.optional_count("decoder_sparse_step")?.unwrap_or(1);
        let Some(value) = fields.get("mlp_only_layers") else { return Ok(Self { named: vec![], sparse_step }) };
        let number = |layer: &Value| layer.as_u64().map(|layer| layer as usize);
        let named = value.as_array().and_then(|layers| layers.iter().map(number).collect());
        let remedy = "check the checkpoint's conversion";
        let named = named.ok_or_else(|| fields.error("mlp_only_layers", "a list of layers", value, remedy))?;
        Ok(Self { named, sparse_step })
    }

    /// Tells whether the layer of this number has an MLP.
    pub fn has(&self, layer: usize) -> bool {
        self.named.contains(&layer) || !(layer + 1).is_multiple_of(self.sparse_step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn dense_layers_are_named_or_between_sparse_ones() {
        let dense = |root| -> Vec<usize> {
            let dense = DenseLayers::read(&Fields::new("config.json", root)).expect("layers");
            (0..6).filter(|layer| dense.has(*layer)).collect()
        };
        assert_eq!(dense(json!({})), [0; 0]);
        assert_eq!(dense(json!({"mlp_only_layers": [0, 4], "decoder_sparse_step": 1})), [0, 4]);
        assert_eq!(dense(json!({"mlp_only_layers": [1], "decoder_sparse_step": 2})), [0, 1, 2, 4]);
        let error = DenseLayers::read(&Fields::new("config.json", json!({"mlp_only_layers": "all"})));
        assert!(error.is_err_and(|error| error.to_string().contains("field `mlp_only_layers`")));
    }
}
