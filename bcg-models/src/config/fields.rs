//! The fields of one configuration file, read by name; an error names file, field, what was expected, and the remedy.

use std::path::PathBuf;

use bcg_runtime::DType;
use serde_json::Value;

use super::LAYERS_MAX;
use crate::checkpoint::{self, CONFIG_BYTES_MAX};
use crate::error::{Error, Result};

/// The top-level object of one configuration file, with readers that name the file and the field when they fail.
///
/// A field may be dotted, for one of a nested object; `null` counts as absent.
#[derive(Debug, Clone, PartialEq)]
pub struct Fields {
    file: PathBuf,
    root: Value,
}

impl Fields {
    #[cfg(test)]
    pub(crate) fn new(file: &str, root: Value) -> Self {
        Self { file: PathBuf::from(file), root }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Format`] if it is absent or holds no JSON object.
    pub(super) fn read(file: PathBuf) -> Result<Self> {
        let bytes = checkpoint::read(&file, CONFIG_BYTES_MAX)?;
        Self::parse(file, &bytes)
    }

    /// Reads a file that may be absent.
    ///
    /// # Errors
    /// As [`read`](Self::read), if it is there.
    pub(super) fn read_optional(file: PathBuf) -> Result<Option<Self>> {
        let bytes = checkpoint::read_optional(&file, CONFIG_BYTES_MAX)?;
        bytes.map(|bytes| Self::parse(file, &bytes)).transpose()
    }

    fn parse(file: PathBuf, bytes: &[u8]) -> Result<Self> {
        let parsed = match std::str::from_utf8(bytes) {
            Ok(text) => serde_json::from_str(&as_json(text)).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let root: Value = parsed.map_err(|error| Error::format(&file, format!("expected a JSON object: {error}")))?;
        if !root.is_object() {
            return Err(Error::format(&file, "expected a JSON object"));
        }
        Ok(Self { file, root })
    }

    /// The value of a field.
    pub fn get(&self, field: &str) -> Option<&Value> {
        field.split('.').try_fold(&self.root, |value, key| value.get(key)).filter(|value| !value.is_null())
    }

    /// Makes the error about a field.
    pub fn error(
        &self,
        field: &str,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
        remedy: &str,
    ) -> Error {
        Error::Config {
            file: self.file.clone(),
            field: field.to_owned(),
            expected: expected.to_string(),
            got: got.to_string(),
            remedy: remedy.to_owned(),
        }
    }

    /// A positive integer, if the field is there.
    ///
    /// # Errors
    /// [`Error::Config`] for any other value.
    pub fn optional_count(&self, field: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_u64() {
            Some(count @ 1..=0xffff_ffff) => Ok(Some(count as usize)),
            _ => Err(self.error(field, "a positive integer", value, "check the checkpoint's conversion")),
        }
    }

    /// A positive integer.
    ///
    /// # Errors
    /// [`Error::Config`] for any other value, and if the field is absent.
    pub fn count(&self, field: &str) -> Result<usize> {
        self.optional_count(field)?.ok_or_else(|| {
            self.error(field, "a positive integer", "nothing", "the file is cut short or of another architecture")
        })
    }

    /// A count that may be 0, as it is if the field is absent.
    ///
    /// # Errors
    /// [`Error::Config`] for any other value.
    pub fn optional_size(&self, field: &str) -> Result<usize> {
        match self.get(field) {
            Some(value) if value.as_u64() == Some(0) => Ok(0),
            _ => Ok(self.optional_count(field)?.unwrap_or(0)),
        }
    }

    /// Refuses more layers than any model has: memory is asked for all of them before the first one is read.
    pub(super) fn check_layers(&self, field: &str, layers: usize) -> Result<()> {
        match layers {
            ..=LAYERS_MAX => Ok(()),
            _ => Err(self.error(field, format!("at most {LAYERS_MAX} layers"), layers, "check the checkpoint")),
        }
    }

    /// A positive number, if the field is there.
    ///
    /// # Errors
    /// [`Error::Config`] for any other value.
    pub fn number(&self, field: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number > 0.0 => Ok(Some(number)),
            _ => Err(self.error(field, "a positive number", value, "check the checkpoint's conversion")),
        }
    }

    /// A boolean; false if the field is absent.
    ///
    /// # Errors
    /// [`Error::Config`] for any other value.
    pub fn flag(&self, field: &str) -> Result<bool> {
        let Some(value) = self.get(field) else { return Ok(false) };
        value.as_bool().ok_or_else(|| self.error(field, "true or false", value, "check the checkpoint's conversion"))
    }

    /// Refuses a flag that is set.
    ///
    /// # Errors
    /// [`Error::Config`] with `remedy`.
    pub fn refuse_flag(&self, field: &str, remedy: &str) -> Result<()> {
        if self.flag(field)? { Err(self.error(field, "false", true, remedy)) } else { Ok(()) }
    }

    /// Refuses a text that is there and is not `expected`.
    ///
    /// # Errors
    /// [`Error::Config`] with `remedy`.
    pub fn refuse_other(&self, field: &str, expected: &str, remedy: &str) -> Result<()> {
        match self.get(field) {
            Some(value) if value.as_str() != Some(expected) => {
                Err(self.error(field, format!("{expected:?}"), value, remedy))
            }
            _ => Ok(()),
        }
    }

    pub(super) fn architecture(&self) -> Result<String> {
        let first = self.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str);
        first.map(str::to_owned).ok_or_else(|| {
            self.error(
                "architectures",
                "a list with the name of the model class",
                self.get("architectures").unwrap_or(&Value::Null),
                "is this a Hugging Face checkpoint folder?",
            )
        })
    }

    /// `dtype` (transformers 5) or `torch_dtype`; bf16 if neither stands there.
    pub(super) fn dtype(&self) -> Result<DType> {
        let (field, value) = match (self.get("dtype"), self.get("torch_dtype")) {
            (Some(value), _) => ("dtype", value),
            (None, Some(value)) => ("torch_dtype", value),
            (None, None) => return Ok(DType::Bf16),
        };
        match value.as_str() {
            Some("bfloat16") => Ok(DType::Bf16),
            Some("float16") => Ok(DType::F16),
            Some("float32") => Ok(DType::F32),
            _ => Err(self.error(
                field,
                "\"bfloat16\", \"float16\" or \"float32\"",
                value,
                "quantised checkpoints are not supported",
            )),
        }
    }

    /// A token id or a list of them; none if the field is absent.
    pub(super) fn token_ids(&self, field: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(field) else { return Ok(Vec::new()) };
        let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
        list.iter()
            .map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()))
            .collect::<Option<Vec<_>>>()
            .ok_or_else(|| self.error(field, "a token id or a list of token ids", value, "check the checkpoint"))
    }
}

/// Spells the numbers that Python writes but JSON lacks as transformers 5 does: `{"__float__": "Infinity"}`.
fn as_json(text: &str) -> String {
    let mut json = String::with_capacity(text.len());
    let (mut rest, mut is_text) = (text, false);
    while let Some(first) = rest.chars().next() {
        let number = ["Infinity", "-Infinity", "NaN"].into_iter().find(|name| !is_text && rest.starts_with(name));
        let len = match (number, first) {
            (Some(number), _) => number.len(),
            (None, '\\') => 1 + rest[1..].chars().next().map_or(0, char::len_utf8), // what is escaped ends no text
            (None, _) => first.len_utf8(),
        };
        match number {
            Some(number) => json.extend([r#"{"__float__": ""#, number, r#""}"#]),
            None => json.push_str(&rest[..len]),
        }
        is_text ^= first == '"';
        rest = &rest[len..];
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_lacks_are_read_outside_of_texts() {
        let text = r#"{"limits": [0.0, Infinity, -Infinity, NaN], "say \"NaN": "Infinity \\", "é": "\"NaN"}"#;
        let root: Value = serde_json::from_str(&as_json(text)).expect("JSON");
        let limits: Vec<_> = root["limits"].as_array().expect("a list").iter().map(|v| &v["__float__"]).collect();
        assert_eq!(limits, [&Value::Null, &"Infinity".into(), &"-Infinity".into(), &"NaN".into()]);
        assert_eq!((&root["say \"NaN"], &root["é"]), (&"Infinity \\".into(), &"\"NaN".into()));
    }
}
