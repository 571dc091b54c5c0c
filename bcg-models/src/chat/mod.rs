//! Chat messages to one prompt, by the checkpoint's own Jinja template.
//!
//! Templates are written for transformers; the environment here is its environment: trimmed blocks, loop controls,
//! Python methods on values, `raise_exception`, `strftime_now`, and a `tojson` that spaces like Python and escapes
//! nothing. A template is a program of the checkpoint's author: the `sandbox` sees to it that it ends, and soon. What a
//! client sends makes no control tokens: `trust` tells what the template wrote.

mod functions;
#[cfg(test)]
mod hostile;
mod meter;
mod sandbox;
mod trust;

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;

use minijinja::Environment;
use minijinja::value::{Serde, Value as Jinja};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::{self, CONFIG_BYTES_MAX, TEMPLATE_BYTES_MAX};
use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;
use trust::Marks;

pub use meter::{RENDER_BYTES_MAX, RENDER_INSTRUCTIONS_MAX, RENDER_TIME_MAX, RENDER_VALUES_MAX};
pub use sandbox::{TAG_TOKENS_MAX, TEMPLATE_TOKENS_MAX};

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text; absent in an assistant's message that only calls tools.
    #[serde(default)]
    pub content: Option<Content>,
    /// Everything else (`name`, `tool_calls`, `tool_call_id`, …), which the template may read.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

impl ChatMessage {
    /// A message of plain text.
    pub fn new(role: impl Into<String>, text: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(Content::Text(text.into())), extra: Map::new() }
    }

    /// What the template sees.
    fn to_template(&self) -> Result<Value> {
        let mut message = Map::new();
        message.insert("role".into(), self.role.clone().into());
        message
            .insert("content".into(), Value::String(self.content.as_ref().map_or(Ok(String::new()), Content::text)?));
        for (key, value) in &self.extra {
            message.insert(key.clone(), value.clone());
        }
        if let Some(calls) = message.get_mut("tool_calls").and_then(Value::as_array_mut) {
            calls.iter_mut().for_each(parse_arguments);
        }
        Ok(Value::Object(message))
    }
}

/// Clients send a call's arguments as a string of JSON; templates want the object.
fn parse_arguments(call: &mut Value) {
    let Some(arguments) = call.pointer_mut("/function/arguments") else { return };
    if let Some(parsed) = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok())
        && parsed.is_object()
    {
        *arguments = parsed;
    }
}

/// The content of a message: text, or parts that are joined.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Content {
    /// Plain text.
    Text(String),
    /// A list of parts; only text parts can be rendered.
    Parts(Vec<ContentPart>),
}

impl Content {
    /// The text of all parts, joined.
    ///
    /// # Errors
    /// [`Error::Chat`] if a part is not text.
    pub fn text(&self) -> Result<String> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Parts(parts) => parts
                .iter()
                .map(|part| match (part.kind.as_str(), &part.text) {
                    ("text", Some(text)) => Ok(text.as_str()),
                    (kind, _) => {
                        Err(Error::Chat(format!("a content part of type `{kind}`: this model reads text only")))
                    }
                })
                .collect(),
        }
    }
}

/// One part of a message's content.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContentPart {
    /// `text`, `image_url`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The text of a text part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Fields of other kinds of parts.
    #[serde(flatten)]
    pub extra: Map<String, Value>,
}

/// A chat as text, of which is known what the template wrote.
#[derive(Debug)]
pub struct RenderedChat {
    text: String,
    trust: Trust,
}

/// Which control tokens in a text are meant.
#[derive(Debug)]
enum Trust {
    /// All, also those that a normaliser makes.
    Unchecked,
    /// All that the text spells.
    All,
    /// Those whose first and last character lie at these bytes.
    Edges(HashSet<usize>),
}

impl RenderedChat {
    /// Returns the text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Turns it into the token ids of the tokenizer that it was rendered for.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode_content`].
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let Self { text, trust } = self;
        let encoding = match trust {
            Trust::Unchecked => return tokenizer.encode(text),
            Trust::All => tokenizer.encode_trusted(text, |_| true)?,
            Trust::Edges(edges) => {
                let last = |end: usize| text[..end].char_indices().next_back().map(|(at, _)| at);
                tokenizer.encode_trusted(text, |range: &Range<usize>| {
                    edges.contains(&range.start) && last(range.end).is_some_and(|last| edges.contains(&last))
                })?
            }
        };
        Ok(encoding.get_ids().to_vec())
    }
}

/// The chat template of a checkpoint.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    limits: meter::Limits,
    /// The template as the sandbox renders it.
    source: String,
    /// The name of its file, for messages.
    name: String,
    /// `bos_token` and its like.
    special_tokens: Map<String, Value>,
}

impl ChatTemplate {
    /// Reads `chat_template.jinja`, or else `chat_template` in `tokenizer_config.json`; `None` if there is neither.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Format`] if a file cannot be read or the template does not parse.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let config_file = dir.join("tokenizer_config.json");
        let config: Value = match checkpoint::read_optional(&config_file, CONFIG_BYTES_MAX)? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(|error| Error::format(&config_file, error))?,
            None => Value::Null,
        };
        let template_file = dir.join("chat_template.jinja");
        let (file, source) = if let Some(bytes) = checkpoint::read_optional(&template_file, TEMPLATE_BYTES_MAX)? {
            let text = String::from_utf8(bytes).map_err(|error| Error::format(&template_file, error))?;
            (template_file, text)
        } else if let Some(text) = template_in(&config) {
            if text.len() as u64 > TEMPLATE_BYTES_MAX {
                return Err(Error::format(&config_file, "`chat_template` is larger than 1 MiB; check it"));
            }
            (config_file, text.to_owned())
        } else {
            return Ok(None);
        };
        let special_tokens = ["bos_token", "eos_token", "pad_token", "unk_token"]
            .into_iter()
            .filter_map(|name| {
                let token = config.get(name)?;
                let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
                Some((name.to_owned(), text.into()))
            })
            .collect();
        Self::parse(&file, &source, special_tokens).map(Some)
    }

    fn parse(file: &Path, source: &str, special_tokens: Map<String, Value>) -> Result<Self> {
        let prepared = sandbox::on_a_large_stack(|| sandbox::prepare(source).map_err(|error| error.to_string()));
        let source = prepared.flatten().map_err(|error| Error::format(file, error))?;
        let mut environment = sandbox::environment();
        functions::add_to(&mut environment);
        let limits = meter::Limits::default();
        environment.set_fuel(Some(limits.instructions));
        let name = file.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(Self { environment, limits, source, name, special_tokens })
    }

    /// Renders a chat to the prompt's text. `tools` and `extra` (such as `enable_thinking`) are passed to the template.
    ///
    /// # Errors
    /// [`Error::Chat`] if the template refuses the messages, or a content part is not text.
    pub fn render(
        &self,
        messages: &[ChatMessage],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let content = content(messages, tools, add_generation_prompt, extra)?;
        self.run(&self.special_tokens.clone().into_iter().chain(content).collect(), None)
    }

    /// Renders a chat so that it can be turned into token ids. Control tokens come of what the template wrote, and not of
    /// what is in the messages, the tools or `extra`, unless that
    /// [is allowed](Tokenizer::allow_control_tokens_in_content); a chat that spells none in them has the ids of its
    /// [rendered](Self::render) text.
    ///
    /// # Errors
    /// Those of [`render`](Self::render).
    pub fn render_for(
        &self,
        tokenizer: &Tokenizer,
        messages: &[ChatMessage],
        tools: Option<&Value>,
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<RenderedChat> {
        let content = content(messages, tools, add_generation_prompt, extra)?;
        let marks = match tokenizer.allows_control_tokens() {
            true => None,
            false => Marks::choose(tokenizer.control_tokens(), &content).map_err(Error::Chat)?,
        };
        let with_special = |special: Map<String, Value>| special.into_iter().chain(content.clone()).collect();
        let Some(marks) = marks else {
            let text = self.run(&with_special(self.special_tokens.clone()), None)?;
            let trust = if tokenizer.allows_control_tokens() { Trust::Unchecked } else { Trust::All };
            return Ok(RenderedChat { text, trust });
        };
        let mark = |text: &str| marks.mark(text);
        let special = self.special_tokens.iter();
        let special = special.map(|(name, text)| (name.clone(), mark(text.as_str().unwrap_or_default()).into()));
        let (text, places) = marks.remove(&self.run(&with_special(special.collect()), Some(&mark))?);
        Ok(RenderedChat { text, trust: Trust::Edges(places) })
    }

    fn run(&self, context: &Map<String, Value>, rewrite: sandbox::Rewrite<'_>) -> Result<String> {
        let rendered = sandbox::on_a_large_stack(|| {
            sandbox::render(&self.environment, self.limits, &self.source, Jinja::from(Serde(context)), rewrite)
        });
        rendered.map_err(Error::Chat)?.map_err(|error| self.failed(&error))
    }

    /// What `raise_exception` said is for the client; the rest of the message is about the template.
    fn failed(&self, error: &minijinja::Error) -> Error {
        Error::Chat(match (meter::limit(error), error.detail()) {
            (Some(limit), _) => format!("{} {limit} for this conversation", self.name),
            (None, Some(said)) => said.to_owned(),
            (None, None) => error.to_string(),
        })
    }
}

/// What a template sees, apart from the checkpoint's special tokens.
fn content(
    messages: &[ChatMessage],
    tools: Option<&Value>,
    add_generation_prompt: bool,
    extra: &Map<String, Value>,
) -> Result<Map<String, Value>> {
    let messages = messages.iter().map(ChatMessage::to_template).collect::<Result<Vec<_>>>()?;
    let mut content = extra.clone();
    content.insert("messages".into(), Value::Array(messages));
    content.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
    content.insert("documents".into(), Value::Null);
    content.insert("add_generation_prompt".into(), add_generation_prompt.into());
    Ok(content)
}

/// `chat_template` as a string, or the one named `default` (else the first) of a list.
fn template_in(config: &Value) -> Option<&str> {
    let template = config.get("chat_template")?;
    if let Some(text) = template.as_str() {
        return Some(text);
    }
    let list = template.as_array()?;
    let default = list.iter().find(|entry| entry.get("name").and_then(Value::as_str) == Some("default"));
    default.or_else(|| list.first())?.get("template")?.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::parse(Path::new("chat_template.jinja"), source, Map::new()).expect("a template")
    }

    fn messages(value: Value) -> Vec<ChatMessage> {
        serde_json::from_value(value).expect("messages")
    }

    #[test]
    fn the_tiny_checkpoint_renders_chatml() {
        let template = ChatTemplate::load(&crate::testing::tiny_qwen3()).expect("load").expect("a template");
        let chat = messages(json!([
            {"role": "user", "content": [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "you"}]},
        ]));
        let text = template.render(&chat, None, true, &Map::new()).expect("a prompt");
        assert_eq!(text, "<|im_start|>user\nHello, you<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn templates_use_pythons_methods_tools_and_json() {
        let template = template(
            "{%- for m in messages %}\n    {%- if m.content.startswith('a') %}{{ m.content.split('b')[-1].strip() }}{% break %}\
             {% endif %}\n{%- endfor %}{{ tools | tojson }}{{ tools[0] | tojson(indent=1) }}",
        );
        let tools = json!([{"z": "<é>", "a": 1}]);
        let text =
            template.render(&messages(json!([{"role": "user", "content": "ab c "}])), Some(&tools), false, &Map::new());
        assert_eq!(text.expect("a prompt"), "c[{\"z\": \"<é>\", \"a\": 1}]{\n \"z\": \"<é>\",\n \"a\": 1\n}");
    }

    #[test]
    fn what_the_template_raises_is_the_error() {
        let template = template("{{ raise_exception('roles must alternate') }}");
        let error = template.render(&[], None, false, &Map::new()).expect_err("raised");
        assert_eq!(error.to_string(), "chat template: roles must alternate");
    }

    #[test]
    fn a_panic_of_the_template_engine_is_an_error() {
        let error = template("{% for m in messages[::-1] %}{% endfor %}").render(&[], None, false, &Map::new());
        assert_eq!(error.expect_err("a panic").to_string(), "chat template: the template cannot render these messages");
    }

    #[test]
    fn a_part_that_is_not_text_is_refused() {
        let chat = messages(json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]));
        let error =
            template("{{ messages[0].content }}").render(&chat, None, false, &Map::new()).expect_err("an image");
        assert!(error.to_string().contains("`image_url`"), "{error}");
    }

    #[test]
    fn tool_calls_and_extra_variables_reach_the_template() {
        let chat = messages(json!([{"role": "assistant", "content": null, "tool_calls": [
            {"function": {"name": "f", "arguments": "{\"x\": 1}"}}]}]));
        let source = "{{ messages[0].tool_calls[0].function.arguments.x }}{{ messages[0].content }}{{ thinking }}";
        let extra = Map::from_iter([("thinking".to_owned(), json!("on"))]);
        assert_eq!(template(source).render(&chat, None, false, &extra).expect("a prompt"), "1on");
    }

    #[test]
    fn a_template_may_stand_in_the_tokenizers_configuration() {
        let dir = crate::testing::TempDir::new("chat-config");
        assert!(ChatTemplate::load(dir.path()).expect("no files").is_none());
        let config = json!({"eos_token": {"content": "</s>"}, "chat_template": [
            {"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes{{ eos_token }}"}]});
        dir.write("tokenizer_config.json", config.to_string().as_bytes());
        let template = ChatTemplate::load(dir.path()).expect("load").expect("a template");
        assert_eq!(template.render(&[], None, false, &Map::new()).expect("a prompt"), "yes</s>");
        dir.write("chat_template.jinja", b"{% if %}");
        let error = ChatTemplate::load(dir.path()).expect_err("malformed").to_string();
        assert!(error.contains("chat_template.jinja"), "{error}");
    }
}
