//! Chat messages to one prompt, by the checkpoint's own Jinja template.
//!
//! Templates are written for transformers; the environment here is its environment: trimmed blocks, loop controls,
//! Python methods on values, `raise_exception`, `strftime_now`, and a `tojson` that spaces like Python and escapes
//! nothing.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::checkpoint::{self, CONFIG_BYTES_MAX, TEMPLATE_BYTES_MAX};
use crate::error::{Error, Result};

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

/// The chat template of a checkpoint.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
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
        Self::parse(&source, special_tokens).map(Some).map_err(|error| Error::format(&file, error))
    }

    fn parse(source: &str, special_tokens: Map<String, Value>) -> std::result::Result<Self, minijinja::Error> {
        let mut environment = Environment::new();
        environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", |format: String| strftime(&format, now_seconds()));
        environment.add_filter("tojson", to_json);
        environment.add_template_owned("chat", source.to_owned())?;
        Ok(Self { environment, special_tokens })
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
        let messages = messages.iter().map(ChatMessage::to_template).collect::<Result<Vec<_>>>()?;
        let mut context = self.special_tokens.clone();
        context.extend(extra.iter().map(|(key, value)| (key.clone(), value.clone())));
        context.insert("messages".into(), Value::Array(messages));
        context.insert("tools".into(), tools.cloned().unwrap_or(Value::Null));
        context.insert("documents".into(), Value::Null);
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let template = self.environment.get_template("chat").map_err(|error| Error::Chat(error.to_string()))?;
        // minijinja panics in places that messages can reach: 3.0.5 where a template reverses an empty list or text.
        let rendered = catch_unwind(AssertUnwindSafe(|| template.render(Jinja::from(Serde(&context)))));
        let rendered = rendered.map_err(|_| Error::Chat("the template cannot render these messages".to_owned()))?;
        rendered.map_err(|error| {
            // What `raise_exception` said is for the client; the rest of the message is about the template.
            let said = error.detail().map_or_else(|| error.to_string(), str::to_owned);
            Error::Chat(said)
        })
    }
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

#[allow(clippy::needless_pass_by_value)] // the signature that template functions have
fn raise_exception(message: String) -> std::result::Result<Jinja, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// `json.dumps(value, ensure_ascii=False, indent=indent)`.
#[allow(clippy::needless_pass_by_value)] // the signature that template filters have
fn to_json(value: &Jinja, kwargs: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    let _: Option<bool> = kwargs.get("ensure_ascii")?;
    kwargs.assert_all_used()?;
    let mut bytes = Vec::new();
    let written = match indent {
        Some(indent) => {
            let spaces = " ".repeat(indent);
            let format = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, format))
        }
        None => value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter)),
    };
    written.map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

/// JSON on one line with Python's spaces after `,` and `:`.
struct PythonFormatter;

impl serde_json::ser::Formatter for PythonFormatter {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

fn now_seconds() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// The directives of `strftime` that templates use, in UTC; others are kept as they stand.
fn strftime(format: &str, seconds: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_from_days(days);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        match rest.next() {
            Some('Y') => out += &year.to_string(),
            Some('y') => out += &format!("{:02}", year % 100),
            Some('m') => out += &format!("{month:02}"),
            Some('d') => out += &format!("{day:02}"),
            Some('B') => out += month_name,
            Some('b') => out += &month_name[..3],
            Some('A') => out += day_name,
            Some('a') => out += &day_name[..3],
            Some('H') => out += &format!("{:02}", second / 3600),
            Some('M') => out += &format!("{:02}", second / 60 % 60),
            Some('S') => out += &format!("{:02}", second % 60),
            Some('%') => out.push('%'),
            Some(other) => out.extend(['%', other]),
            None => out.push('%'),
        }
    }
    out
}

/// Year, month and day of a day counted from 1970-01-01 (H. Hinnant's `civil_from_days`).
fn civil_from_days(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::parse(source, Map::new()).expect("a template")
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

    #[test]
    fn dates_are_formatted_in_utc() {
        assert_eq!(strftime("%d %b %Y %A %H:%M:%S %j%%", 1_709_210_096), "29 Feb 2024 Thursday 12:34:56 %j%");
        assert_eq!(strftime("%Y-%m-%d", 0), "1970-01-01");
    }
}
