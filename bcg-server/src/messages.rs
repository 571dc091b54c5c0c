//! `messages`: what was said in a conversation.

use std::cell::Cell;
use std::fmt;

use bcg_engine::{ChatMessage, Content, ContentPart};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::Map;

use crate::error::ApiError;
use crate::fields::{BodyFields, quoted};
use crate::json::{Budget, FreeForm};

/// The most messages of a conversation.
pub(crate) const MESSAGES_MAX: usize = 4096;
/// The most parts of the contents of all messages together.
pub(crate) const PARTS_MAX: usize = 4096;
/// Who may have said something.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

const PARAM: &str = "messages";

/// Reads `messages`.
///
/// # Errors
/// [`ApiError::InvalidRequest`] names the field and what is wrong with it.
pub(crate) fn read(fields: &BodyFields) -> Result<Vec<ChatMessage>, ApiError> {
    let parts = Cell::new(0);
    let messages = fields.require(PARAM, Messages { budget: fields.budget(), parts: &parts })?;
    if messages.is_empty() {
        return Err(ApiError::invalid(PARAM, "`messages` needs at least one message."));
    }
    Ok(messages)
}

/// Reads the whole list.
#[derive(Clone, Copy)]
struct Messages<'b> {
    budget: &'b Budget,
    /// Parts so far, of all messages.
    parts: &'b Cell<usize>,
}

impl<'de> DeserializeSeed<'de> for Messages<'_> {
    type Value = Vec<ChatMessage>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Messages<'_> {
    type Value = Vec<ChatMessage>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of messages")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut messages = Vec::new();
        while messages.len() < MESSAGES_MAX {
            let Some(message) = items.next_element_seed(Message { index: messages.len(), of: self })? else {
                return Ok(messages);
            };
            messages.push(message);
        }
        match items.next_element::<IgnoredAny>()? {
            None => Ok(messages),
            Some(_) => Err(A::Error::custom(format_args!("it has more than {MESSAGES_MAX} messages"))),
        }
    }
}

/// Reads one message.
#[derive(Clone, Copy)]
struct Message<'b> {
    /// Its place, for refusals.
    index: usize,
    of: Messages<'b>,
}

impl<'de> DeserializeSeed<'de> for Message<'_> {
    type Value = ChatMessage;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<ChatMessage, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Message<'_> {
    type Value = ChatMessage;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a message, an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<ChatMessage, A::Error> {
        let (mut role, mut content, mut extra) = (None, None, Map::new());
        while let Some(name) = entries.next_key::<String>()? {
            match name.as_str() {
                "role" => role = Some(entries.next_value::<String>()?),
                "content" => content = entries.next_value_seed(MessageContent(self.of))?,
                _ => {
                    extra.insert(name, entries.next_value_seed(FreeForm(self.of.budget))?);
                }
            }
        }
        let role = role.ok_or_else(|| A::Error::missing_field("role"))?;
        if !ROLES.contains(&role.as_str()) {
            let (index, role, roles) = (self.index, quoted(&role), ROLES.join("`, `"));
            return Err(A::Error::custom(format_args!(
                "the `role` of message {index} is `{role}`; it must be one of `{roles}`"
            )));
        }
        Ok(ChatMessage { role, content, extra })
    }
}

/// Reads what was said: text, parts, or nothing.
struct MessageContent<'b>(Messages<'b>);

impl<'de> DeserializeSeed<'de> for MessageContent<'_> {
    type Value = Option<Content>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for MessageContent<'_> {
    type Value = Option<Content>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a `content` of text or an array of parts")
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Some(Content::Text(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut parts = Vec::new();
        while let Some(part) = items.next_element_seed(Part(self.0.budget))? {
            parts.push(part);
            let total = self.0.parts.replace(self.0.parts.get() + 1) + 1;
            if total > PARTS_MAX {
                return Err(A::Error::custom(format_args!("the contents have more than {PARTS_MAX} parts")));
            }
        }
        Ok(Some(Content::Parts(parts)))
    }
}

/// Reads one part.
struct Part<'b>(&'b Budget);

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = ContentPart;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<ContentPart, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = ContentPart;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a part of a `content`, an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<ContentPart, A::Error> {
        let (mut kind, mut text, mut extra) = (None, None, Map::new());
        while let Some(name) = entries.next_key::<String>()? {
            match name.as_str() {
                "type" => kind = Some(entries.next_value()?),
                "text" => text = entries.next_value()?,
                _ => {
                    extra.insert(name, entries.next_value_seed(FreeForm(self.0))?);
                }
            }
        }
        Ok(ContentPart { kind: kind.ok_or_else(|| A::Error::missing_field("type"))?, text, extra })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fields::leaked;

    fn messages(messages: &Value) -> Result<Vec<ChatMessage>, String> {
        read(&leaked(&json!({ "messages": messages }))).map_err(|error| {
            assert!(matches!(error, ApiError::InvalidRequest { param: Some(PARAM), .. }), "{error}");
            error.to_string()
        })
    }

    #[test]
    fn messages_are_read_as_the_templates_type_is() {
        let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let all = json!([
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": "u"}}]},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"tool_call_id": "c", "role": "tool", "content": "1"},
            {"role": "function", "name": "f"},
            {"role": "developer", "content": []},
        ]);
        let expected: Vec<ChatMessage> = serde_json::from_value(all.clone()).expect("messages");
        assert_eq!(messages(&all), Ok(expected));
    }

    #[test]
    fn roles_come_from_a_closed_list() {
        for role in ["User", "", "system\n", "<|im_start|>system", "admin"] {
            let error = messages(&json!([{"role": "user"}, {"role": role}])).expect_err(role);
            assert!(error.contains("message 1") && error.contains("`developer`, `user`"), "{error}");
        }
        let error = messages(&json!([{"role": "x".repeat(100_000)}])).expect_err("long");
        assert!(error.len() < 1000, "{error}");
    }

    #[test]
    fn malformed_messages_say_what_is_wrong() {
        let text_part = json!({"type": "text", "text": "a"});
        for (bad, needle) in [
            (json!("hi"), "array of messages"),
            (json!([7]), "a message, an object"),
            (json!([{"content": "a"}]), "missing field `role`"),
            (json!([{"role": 1}]), "invalid type"),
            (json!([{"role": "user", "content": 1}]), "text or an array of parts"),
            (json!([{"role": "user", "content": ["a"]}]), "part of a `content`"),
            (json!([{"role": "user", "content": [{"text": "a"}]}]), "missing field `type`"),
            (json!(vec![json!({"role": "user"}); MESSAGES_MAX + 1]), "more than 4096 messages"),
            (json!([{"role": "user", "content": vec![text_part; PARTS_MAX + 1]}]), "more than 4096 parts"),
            (json!([{"role": "user", "x": vec![0; 70_000]}]), "JSON values"),
            (json!([]), "at least one"),
            (json!(null), "Missing"),
        ] {
            let error = messages(&bad).expect_err(needle);
            assert!(error.contains(needle) && error.len() < 500, "{error}");
        }
        assert!(messages(&json!(vec![json!({"role": "user"}); MESSAGES_MAX])).is_ok());
    }
}
