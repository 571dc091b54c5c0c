//! `prompt`, `text` and `input_ids`: one text, several, or their tokens.

use std::fmt;

use bcg_engine::Prompt;
use serde::de::{DeserializeSeed, Deserializer, Error, SeqAccess, Visitor};

use crate::error::ApiError;
use crate::fields::BodyFields;
use crate::request::CHOICES_MAX;

/// What a field that holds prompts may be.
const ACCEPTED: &str = "give a string, an array of strings, token ids, or an array of arrays of token ids";

/// One prompt or several.
#[derive(Debug, PartialEq)]
pub(crate) struct Prompts {
    /// At least one.
    pub(crate) list: Vec<Prompt>,
    /// Whether they came as a list, even if it has one entry.
    pub(crate) is_batch: bool,
}

/// Reads a prompt or several, each as text or token ids; `None` if there are none.
///
/// # Errors
/// [`ApiError::InvalidRequest`] names the field and what is accepted.
pub(crate) fn read(fields: &BodyFields, name: &'static str) -> Result<Option<Prompts>, ApiError> {
    fields.read(name, Reader).map_err(|error| {
        let message = error.to_string();
        ApiError::invalid(name, format!("{}; {ACCEPTED}.", message.trim_end_matches('.')))
    })
}

/// Reads the field's value.
struct Reader;

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Prompts;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Prompts, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader {
    type Value = Prompts;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or an array")
    }

    fn visit_str<E>(self, text: &str) -> Result<Prompts, E> {
        Ok(Prompts { list: vec![Prompt::Text(text.to_owned())], is_batch: false })
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Prompts, A::Error> {
        let mut list = Vec::new();
        match items.next_element_seed(Entry)? {
            None => return Err(A::Error::custom("the array is empty")),
            Some(Item::Token(first)) => {
                let tokens = rest_of_tokens(vec![first], items)?;
                return Ok(Prompts { list: vec![Prompt::Tokens(tokens)], is_batch: false });
            }
            Some(Item::Prompt(first)) => list.push(first),
        }
        while let Some(item) = items.next_element_seed(Entry)? {
            let Item::Prompt(prompt) = item else { return Err(A::Error::custom("an entry is no prompt")) };
            if list.len() == CHOICES_MAX {
                return Err(A::Error::custom(format_args!("it has more than {CHOICES_MAX} prompts")));
            }
            list.push(prompt);
        }
        Ok(Prompts { list, is_batch: true })
    }
}

/// An entry of the array.
enum Item {
    Token(u32),
    Prompt(Prompt),
}

/// Reads an entry of the array.
struct Entry;

impl<'de> DeserializeSeed<'de> for Entry {
    type Value = Item;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Item, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entry {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a prompt: a string, or token ids, which are integers from 0")
    }

    fn visit_u64<E: Error>(self, id: u64) -> Result<Item, E> {
        u32::try_from(id).map(Item::Token).map_err(|_| E::custom(format_args!("no token has the id {id}")))
    }

    fn visit_str<E>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Prompt(Prompt::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Item, A::Error> {
        rest_of_tokens(Vec::new(), items).map(|tokens| Item::Prompt(Prompt::Tokens(tokens)))
    }
}

/// Reads token ids to the end of their array.
fn rest_of_tokens<'de, A: SeqAccess<'de>>(mut tokens: Vec<u32>, mut items: A) -> Result<Vec<u32>, A::Error> {
    while let Some(token) = items.next_element()? {
        tokens.push(token);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fields::leaked;

    fn prompts(value: &Value) -> Result<Prompts, ApiError> {
        read(&leaked(&json!({ "prompt": value })), "prompt").map(|prompts| prompts.expect("a prompt"))
    }

    #[test]
    fn prompts_are_text_or_tokens() {
        let (a, b) = (Prompt::Text("a".into()), Prompt::Tokens(vec![1, 2]));
        for (value, list, is_batch) in [
            (json!("a"), vec![&a], false),
            (json!([1, 2]), vec![&b], false),
            (json!(["a"]), vec![&a], true),
            (json!([[1, 2], [1, 2]]), vec![&b, &b], true),
            (json!(["a", [1, 2]]), vec![&a, &b], true),
        ] {
            let list = list.into_iter().cloned().collect();
            assert_eq!(prompts(&value), Ok(Prompts { list, is_batch }), "{value}");
        }
        assert_eq!(read(&leaked(&json!({"prompt": null})), "prompt"), Ok(None));
    }

    #[test]
    fn other_prompts_are_refused_by_name() {
        for bad in [
            json!([]),
            json!([1, -2]),
            json!(7),
            json!([1, "a"]),
            json!(["a", 1]),
            json!([[1.5]]),
            json!([[[1]]]),
            json!([4_294_967_296_u64]),
            json!([{}]),
            json!(vec!["a"; CHOICES_MAX + 1]),
        ] {
            let error = prompts(&bad).expect_err("refused");
            assert!(matches!(error, ApiError::InvalidRequest { param: Some("prompt"), .. }), "{bad:.60}");
            assert!(
                error.to_string().ends_with(
                    "; give a string, an array of strings, token ids, or an array of \
                                                 arrays of token ids."
                ),
                "{error}"
            );
        }
    }
}
