//! The kinds of layers that a hybrid model is stacked from, as its configuration lists them.

use serde_json::Value;

use super::Fields;
use crate::error::Result;

/// What a layer of a hybrid model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// A state-space mixer.
    Mamba2,
    /// Attention.
    Attention,
    /// An MLP.
    Mlp,
}

impl LayerKind {
    /// Reads the kind of each layer: names in `layers_block_type` (transformers 5), or letters in
    /// `hybrid_override_pattern`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) names the field that is absent, or that has another kind or
    /// number of layers.
    pub fn read_all(fields: &Fields) -> Result<Vec<Self>> {
        let (field, names) = match (fields.get("layers_block_type"), fields.get("hybrid_override_pattern")) {
            (Some(Value::Array(names)), _) => ("layers_block_type", names.clone()),
            (None, Some(Value::String(pattern))) => {
                ("hybrid_override_pattern", pattern.chars().map(|letter| letter.to_string().into()).collect())
            }
            (value, pattern) => {
                let got = value.or(pattern).unwrap_or(&Value::Null);
                let remedy = "add `layers_block_type` or `hybrid_override_pattern`";
                return Err(fields.error("layers_block_type", "the kinds of the layers", got, remedy));
            }
        };
        fields.check_layers(field, names.len())?;
        let kinds: Vec<Self> = names.iter().map(|name| Self::of(fields, field, name)).collect::<Result<_>>()?;
        match fields.optional_count("num_hidden_layers")? {
            Some(layers) if layers != kinds.len() => {
                let expected = format!("{}, as `{field}` has", kinds.len());
                Err(fields.error("num_hidden_layers", expected, layers, "check the checkpoint's conversion"))
            }
            _ => Ok(kinds),
        }
    }

    fn of(fields: &Fields, field: &str, name: &Value) -> Result<Self> {
        match name.as_str() {
            Some("linear_attention" | "mamba" | "M") => Ok(Self::Mamba2),
            Some("full_attention" | "attention" | "*") => Ok(Self::Attention),
            Some("mlp" | "-") => Ok(Self::Mlp),
            Some("moe" | "E") => {
                let remedy = "mixtures of experts are not implemented in this family";
                Err(fields.error(field, "Mamba2, attention and MLP layers", name, remedy))
            }
            _ => Err(fields.error(field, "Mamba2, attention and MLP layers", name, "no other kind is implemented")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kinds(root: Value) -> Result<Vec<LayerKind>> {
        LayerKind::read_all(&Fields::new("config.json", root))
    }

    #[test]
    fn both_spellings_of_the_layers_are_read() {
        let expected = [LayerKind::Mamba2, LayerKind::Mlp, LayerKind::Attention];
        let five = json!(["linear_attention", "mlp", "full_attention"]);
        assert_eq!(kinds(json!({"layers_block_type": five})).expect("names"), expected);
        assert_eq!(kinds(json!({"layers_block_type": ["mamba", "mlp", "attention"]})).expect("names"), expected);
        assert_eq!(
            kinds(json!({"hybrid_override_pattern": "M-*", "num_hidden_layers": 3})).expect("letters"),
            expected
        );
    }

    #[test]
    fn other_layers_are_refused_by_name() {
        for (root, says) in [
            (json!({"layers_block_type": ["mlp", "moe"]}), "got \"moe\"; mixtures of experts are not implemented"),
            (json!({"hybrid_override_pattern": "ME"}), "got \"E\"; mixtures of experts are not implemented"),
            (json!({"layers_block_type": ["conv"]}), "got \"conv\"; no other kind"),
            (json!({"hybrid_override_pattern": "M-", "num_hidden_layers": 3}), "`num_hidden_layers`: expected 2"),
            (json!({"hybrid_override_pattern": "M".repeat(1_025)}), "expected at most 1024 layers, got 1025"),
            (json!({}), "add `layers_block_type` or `hybrid_override_pattern`"),
        ] {
            let error = kinds(root).expect_err(says).to_string();
            assert!(error.contains(says), "{error}");
        }
    }
}
