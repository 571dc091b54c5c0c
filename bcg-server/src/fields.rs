//! A request body, read field by field, so that every refusal names its field.
//!
//! No tree is built of a body: it is checked as a whole, its fields stay text, and each is read by whoever asks for it, as
//! the type that it must have. Fields that nobody asks for cost nothing.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::rc::Rc;

use serde::Deserialize;
use serde::de::{DeserializeOwned, DeserializeSeed, Error, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Deserializer, Map, Value};

use crate::error::ApiError;
use crate::json::{Budget, Checked, FreeForm, FreeObject, List};

/// The most fields of a body, or of an object in it that is read field by field.
const FIELDS_MAX: usize = 256;
/// Characters of what a client sent, or of a parser's message, that a refusal repeats.
const QUOTED_CHARS_MAX: usize = 200;
/// Bytes of a value that may ask for nothing; a longer one asks for something.
const NEUTRAL_BYTES_MAX: usize = 256;

/// The fields of a JSON object: a body, or an object in it.
#[derive(Debug, Clone)]
pub(crate) struct BodyFields<'a> {
    fields: BTreeMap<Cow<'a, str>, &'a RawValue>,
    /// Shared by everything that is read from one body.
    budget: Rc<Budget>,
}

impl<'a> BodyFields<'a> {
    /// Parses a body. Of a field that is there several times, the last one counts.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] if it is not a JSON object, or has too many fields.
    pub(crate) fn parse(body: &'a [u8]) -> Result<Self, ApiError> {
        let refused = |error| ApiError::bad_body(format!("The body is not valid JSON: {error}."));
        // RawValue looks for the end of a value and no closer, so the whole is read once before.
        serde_json::from_slice::<Checked>(body).map_err(refused)?;
        if body.trim_ascii_start().first() != Some(&b'{') {
            return Err(ApiError::bad_body("The body must be a JSON object."));
        }
        let TopFields(fields) = serde_json::from_slice(body)
            .map_err(|error| ApiError::bad_body(format!("The body cannot be read: {}.", brief(&error))))?;
        Ok(Self { fields, budget: Rc::default() })
    }

    /// Returns the text of a field; `null` counts as absent.
    fn raw(&self, name: &str) -> Option<&'a str> {
        self.fields.get(name).map(|value| value.get()).filter(|text| *text != "null")
    }

    /// Whether a field is there and not `null`.
    pub(crate) fn has(&self, name: &'static str) -> bool {
        self.raw(name).is_some()
    }

    /// Whether a field is a list whose first entry is a list.
    pub(crate) fn is_list_of_lists(&self, name: &'static str) -> bool {
        let entries = self.raw(name).and_then(|text| text.strip_prefix('['));
        entries.is_some_and(|entries| entries.trim_ascii_start().starts_with('['))
    }

    /// Reads an optional field in a way of one's own; `null` counts as absent.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] names the field and what the reader says.
    pub(crate) fn read<S: DeserializeSeed<'a>>(
        &self,
        name: &'static str,
        seed: S,
    ) -> Result<Option<S::Value>, ApiError> {
        let Some(text) = self.raw(name) else { return Ok(None) };
        let value = seed.deserialize(&mut Deserializer::from_str(text));
        value
            .map(Some)
            .map_err(|error| ApiError::invalid(name, format!("Invalid value for `{name}`: {}.", brief(&error))))
    }

    /// Reads an optional field of a type that takes no more memory than its text; `null` counts as absent.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] names the field if it has another type.
    pub(crate) fn get<T: DeserializeOwned>(&self, name: &'static str) -> Result<Option<T>, ApiError> {
        self.read(name, PhantomData::<T>)
    }

    /// Reads a field that must be there.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] if it is absent or the reader refuses it.
    pub(crate) fn require<S: DeserializeSeed<'a>>(&self, name: &'static str, seed: S) -> Result<S::Value, ApiError> {
        self.read(name, seed)?.ok_or_else(|| ApiError::invalid(name, format!("Missing required field `{name}`.")))
    }

    /// Reads an optional list of at most `max` entries.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] names the field and the limit.
    pub(crate) fn list<T: DeserializeOwned>(&self, name: &'static str, max: usize) -> Result<Option<Vec<T>>, ApiError> {
        self.read(name, List { max, entry: PhantomData::<T> })
    }

    /// Reads an optional field of free form.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] if the body has too many values of free form.
    pub(crate) fn value(&self, name: &'static str) -> Result<Option<Value>, ApiError> {
        self.read(name, FreeForm(&self.budget))
    }

    /// Reads an optional object of free form.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] if it is no object, or the body has too many values of free form.
    pub(crate) fn object(&self, name: &'static str) -> Result<Option<Map<String, Value>>, ApiError> {
        self.read(name, FreeObject(&self.budget))
    }

    /// Reads an optional list of at most `max` values of free form.
    ///
    /// # Errors
    /// As [`list`](Self::list) and [`value`](Self::value).
    pub(crate) fn values(&self, name: &'static str, max: usize) -> Result<Option<Vec<Value>>, ApiError> {
        self.read(name, List { max, entry: FreeForm(&self.budget) })
    }

    /// Reads JSON of free form that a field holds as text; `None` if it is not JSON.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] if the field is no string.
    pub(crate) fn value_in_text(&self, name: &'static str) -> Result<Option<Option<Value>>, ApiError> {
        let Some(text) = self.get::<String>(name)?.filter(|text| !text.is_empty()) else { return Ok(None) };
        let mut parser = Deserializer::from_str(&text);
        let value = FreeForm(&self.budget).deserialize(&mut parser).and_then(|value| parser.end().map(|()| value));
        Ok(Some(value.ok()))
    }

    /// Returns the fields of an object in this one.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] if it is no object.
    pub(crate) fn nested(&self, name: &'static str) -> Result<Self, ApiError> {
        let TopFields(fields) = self.read(name, PhantomData::<TopFields<'a>>)?.unwrap_or_default();
        Ok(Self { fields, budget: self.budget.clone() })
    }

    /// What is left of the values of free form that the body may have.
    pub(crate) fn budget(&self) -> &Budget {
        &self.budget
    }

    /// Reads a number and checks its range.
    ///
    /// # Errors
    /// [`ApiError::InvalidRequest`] names the field and the range.
    pub(crate) fn number<T>(&self, name: &'static str, least: T, most: T) -> Result<Option<T>, ApiError>
    where
        T: Copy + DeserializeOwned + PartialOrd + fmt::Display,
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
        let Some(text) = self.raw(name) else { return Ok(()) };
        let short = Some(text).filter(|text| text.len() <= NEUTRAL_BYTES_MAX);
        let value = short.and_then(|text| serde_json::from_str::<Value>(text).ok());
        if value.is_some_and(|value| neutral.iter().any(|neutral| equal(neutral, &value))) {
            return Ok(());
        }
        Err(ApiError::invalid(name, format!("`{name}` is not supported by this server; {accepted}.")))
    }
}

/// Fields of an object, as text.
#[derive(Debug, Default)]
struct TopFields<'a>(BTreeMap<Cow<'a, str>, &'a RawValue>);

/// A field's name, which stays where it is unless it is escaped.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for TopFields<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self::default())
    }
}

impl<'de> Visitor<'de> for TopFields<'de> {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Self, A::Error> {
        while let Some(Name(name)) = entries.next_key::<Name<'de>>()? {
            self.0.insert(name, entries.next_value::<&RawValue>()?);
            if self.0.len() > FIELDS_MAX {
                return Err(A::Error::custom(format_args!("it has more than {FIELDS_MAX} fields")));
            }
        }
        Ok(self)
    }
}

/// A text of a client's without what is too long to repeat.
pub(crate) fn quoted(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(QUOTED_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]).into(),
        None => text.into(),
    }
}

/// An error's text without the place in the field, and without the long value that it may quote.
fn brief(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    quoted(text.strip_suffix(&place).unwrap_or(&text)).into_owned()
}

/// Equality that takes 1 and 1.0 for the same number.
fn equal(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}

/// The fields of a body that is never freed.
#[cfg(test)]
pub(crate) fn leaked(body: &Value) -> BodyFields<'static> {
    BodyFields::parse(body.to_string().leak().as_bytes()).expect("an object")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(text: &str) -> Result<BodyFields<'_>, ApiError> {
        BodyFields::parse(text.as_bytes())
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

    #[test]
    fn what_nobody_reads_is_checked_too() {
        for text in ["{\"a\": 1e400}", "{\"a\": \"\\ud800\"}", "{\"a\": [1,]}", "{\"a\": 1} 2"] {
            assert_eq!(fields(text).expect_err(text).status(), 400);
        }
        let deep = format!("{{\"a\": {}{}}}", "[".repeat(200), "]".repeat(200));
        assert!(fields(&deep).is_err());
    }

    #[test]
    fn the_last_of_several_counts_and_their_number_is_bounded() {
        let twice = fields(r#"{"a": 1, "\u0061": 2}"#).expect("parses");
        assert_eq!(twice.get::<u32>("a"), Ok(Some(2)));
        let same = format!("{{{}}}", vec!["\"a\":1"; 10_000].join(","));
        assert_eq!(fields(&same).expect("one field").get::<u32>("a"), Ok(Some(1)));
        let many = |count: usize| {
            let fields: Vec<String> = (0..count).map(|index| format!("\"{index}\":0")).collect();
            format!("{{{}}}", fields.join(","))
        };
        assert!(fields(&many(FIELDS_MAX)).is_ok());
        let error = fields(&many(FIELDS_MAX + 1)).expect_err("too many").to_string();
        assert!(error.contains("more than 256 fields"), "{error}");
    }

    #[test]
    fn a_list_is_bounded_and_says_its_limit() {
        let fields = fields(r#"{"ids": [1, 2, 3]}"#).expect("parses");
        assert_eq!(fields.list::<u64>("ids", 3), Ok(Some(vec![1, 2, 3])));
        let error = fields.list::<u64>("ids", 2).expect_err("too many").to_string();
        assert_eq!(error, "Invalid value for `ids`: it has more than 2 entries.");
    }

    #[test]
    fn an_object_in_a_body_is_read_by_field_too() {
        let fields = fields(r#"{"params": {"n": 2}, "other": 3}"#).expect("parses");
        assert_eq!(fields.nested("params").and_then(|params| params.get::<u32>("n")), Ok(Some(2)));
        assert_eq!(fields.nested("absent").and_then(|params| params.get::<u32>("n")), Ok(None));
        assert!(fields.nested("other").is_err());
    }
}
