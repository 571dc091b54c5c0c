//! A request body, read field by field, so that every refusal names its field.

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::error::ApiError;

/// Characters of a parser's message that a refusal repeats.
const QUOTED_CHARS_MAX: usize = 200;

/// The fields of a JSON object body.
#[derive(Debug, Clone)]
pub(crate) struct BodyFields(Map<String, Value>);

impl BodyFields {
    /// Takes the fields of an object inside a body.
    pub(crate) fn nested(object: Map<String, Value>) -> Self {
        Self(object)
    }

    /// Parses a body.
    ///
    /// # Errors
    /// [`ApiError::BodyTooLarge`] above the limit; [`ApiError::InvalidRequest`] if it is not a JSON object.
    pub(crate) fn parse(body: Result<Bytes, BytesRejection>, limit: usize) -> Result<Self, ApiError> {
        let body = body.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::BodyTooLarge { limit },
            _ => ApiError::bad_body(format!("The body could not be read: {}", rejection.body_text())),
        })?;
        match serde_json::from_slice(&body) {
            Ok(Value::Object(fields)) => Ok(Self(fields)),
            Ok(_) => Err(ApiError::bad_body("The body must be a JSON object.")),
            Err(error) => Err(ApiError::bad_body(format!("The body is not valid JSON: {error}."))),
        }
    }

    /// Reads an optional field; `null` counts as absent.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] names the field if it has another type.
    pub(crate) fn get<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, ApiError> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => T::deserialize(value)
                .map(Some)
                .map_err(|error| ApiError::invalid(name, format!("Invalid value for `{name}`: {}.", brief(&error)))),
        }
    }

    /// Reads a field that must be there.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] if it is absent or has another type.
    pub(crate) fn require<T: DeserializeOwned>(&self, name: &'static str) -> Result<T, ApiError> {
        self.get(name)?.ok_or_else(|| ApiError::invalid(name, format!("Missing required field `{name}`.")))
    }

    /// Reads a number and checks its range.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] names the field and the range.
    pub(crate) fn number<T>(&self, name: &'static str, least: T, most: T) -> Result<Option<T>, ApiError>
    where
        T: Copy + DeserializeOwned + PartialOrd + std::fmt::Display,
    {
        let Some(value) = self.get::<T>(name)? else { return Ok(None) };
        if value < least || value > most {
            return Err(ApiError::invalid(
                name,
                format!("Invalid value for `{name}`: {value} is not between {least} and {most}."),
            ));
        }
        Ok(Some(value))
    }

    /// Refuses a field that this server does not support, unless its value asks for nothing.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] names the field and what is accepted.
    pub(crate) fn refuse(&self, name: &'static str, neutral: &[Value], accepted: &str) -> Result<(), ApiError> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if neutral.iter().any(|neutral| equal(neutral, value)) => Ok(()),
            Some(_) => Err(ApiError::invalid(name, format!("`{name}` is not supported by this server; {accepted}."))),
        }
    }
}

/// An error's text without the long value that it may quote.
fn brief(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Equality that takes 1 and 1.0 for the same number.
fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(text: &'static str) -> Result<BodyFields, ApiError> {
        BodyFields::parse(Ok(Bytes::from_static(text.as_bytes())), 100)
    }

    #[test]
    fn bad_json_is_a_bad_request() {
        for text in ["{", "[]", "", "{\"a\": }"] {
            assert_eq!(fields(text).expect_err(text).status(), 400);
        }
    }

    #[test]
    fn a_wrong_type_names_its_field() {
        let fields = fields(r#"{"temperature": "hot", "top_p": null}"#).expect("parses");
        let error = fields.get::<f32>("temperature").expect_err("not a number");
        assert!(matches!(error, ApiError::InvalidRequest { param: Some("temperature"), .. }));
        assert_eq!(fields.get::<f32>("top_p"), Ok(None));
    }

    #[test]
    fn a_number_out_of_range_names_the_range() {
        let fields = fields(r#"{"temperature": 3}"#).expect("parses");
        let error = fields.number::<f32>("temperature", 0.0, 2.0).expect_err("too hot");
        assert!(error.to_string().contains("between 0 and 2"), "{error}");
    }

    #[test]
    fn unsupported_fields_are_refused_unless_neutral() {
        let fields = fields(r#"{"n": 1.0, "echo": true}"#).expect("parses");
        assert_eq!(fields.refuse("n", &[json!(1)], "only 1"), Ok(()));
        assert!(fields.refuse("echo", &[json!(false)], "only false").is_err());
    }
}
