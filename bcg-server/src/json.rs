//! Reads JSON that clients wrote, with bounds: text is checked without building anything of it, and what has no fixed
//! form becomes a tree of a bounded number of values.

use std::cell::Cell;
use std::fmt;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The most JSON values of free form in one body: those of tools, of schemas, of template arguments and of the further
/// fields of messages. A value takes up to a few hundred bytes of memory, and two bytes of a body.
pub(crate) const JSON_VALUES_MAX: usize = 64 << 10;

/// How many more values a body may have.
#[derive(Debug)]
pub(crate) struct Budget(Cell<usize>);

impl Default for Budget {
    fn default() -> Self {
        Self(Cell::new(JSON_VALUES_MAX))
    }
}

impl Budget {
    fn take<E: Error>(&self) -> Result<(), E> {
        let left = self.0.get().checked_sub(1).ok_or_else(|| {
            E::custom(format_args!(
                "the body has more than {JSON_VALUES_MAX} JSON values in tools, schemas and other fields of free form"
            ))
        })?;
        self.0.set(left);
        Ok(())
    }
}

/// Reads any value, as long as there is room for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FreeForm<'b>(pub(crate) &'b Budget);

impl<'de> DeserializeSeed<'de> for FreeForm<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        self.0.take()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FreeForm<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            array.push(item);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<Value, A::Error> {
        FreeObject(self.0).visit_map(entries).map(Value::Object)
    }
}

/// Reads an object of free form.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FreeObject<'b>(pub(crate) &'b Budget);

impl<'de> DeserializeSeed<'de> for FreeObject<'_> {
    type Value = Map<String, Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        self.0.take()?;
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for FreeObject<'_> {
    type Value = Map<String, Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
        let mut object = Map::new();
        while let Some(name) = entries.next_key::<String>()? {
            object.insert(name, entries.next_value_seed(FreeForm(self.0))?);
        }
        Ok(object)
    }
}

/// Reads a list with at most so many entries.
#[derive(Debug, Clone, Copy)]
pub(crate) struct List<S> {
    /// The most entries.
    pub(crate) max: usize,
    /// Reads an entry.
    pub(crate) entry: S,
}

impl<'de, S: DeserializeSeed<'de> + Copy> DeserializeSeed<'de> for List<S> {
    type Value = Vec<S::Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, S: DeserializeSeed<'de> + Copy> Visitor<'de> for List<S> {
    type Value = Vec<S::Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self.entry)? {
            if list.len() == self.max {
                return Err(A::Error::custom(format_args!("it has more than {} entries", self.max)));
            }
            list.push(item);
        }
        Ok(list)
    }
}

/// Reads any value and keeps nothing: whether a text is JSON that the readers here accept.
#[derive(Debug)]
pub(crate) struct Checked;

impl<'de> Deserialize<'de> for Checked {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Self)
    }
}

impl<'de> Visitor<'de> for Checked {
    type Value = Self;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Self, E> {
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self, A::Error> {
        while items.next_element::<Self>()?.is_some() {}
        Ok(self)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self, A::Error> {
        while entries.next_entry::<Self, Self>()?.is_some() {}
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Value, serde_json::Error> {
        let budget = Budget::default();
        FreeForm(&budget).deserialize(&mut serde_json::Deserializer::from_str(text))
    }

    #[test]
    fn a_value_of_free_form_is_what_serde_json_reads() {
        for text in ["null", "[1, -2, 1.5, true, \"a\\n\"]", "{\"a\": {\"b\": []}, \"c\": \"\", \"a\": 1}"] {
            assert_eq!(read(text).expect(text), serde_json::from_str::<Value>(text).expect(text));
        }
    }

    #[test]
    fn values_and_their_depth_are_bounded() {
        let many = |count: usize| format!("[{}]", vec!["0"; count].join(","));
        assert!(read(&many(JSON_VALUES_MAX - 1)).is_ok());
        let error = read(&many(JSON_VALUES_MAX)).expect_err("too many").to_string();
        assert!(error.contains(&JSON_VALUES_MAX.to_string()), "{error}");
        let deep = "[".repeat(5000) + &"]".repeat(5000);
        assert!(read(&deep).is_err() && serde_json::from_str::<Checked>(&deep).is_err());
    }
}
