//! Chats through the templates of the checkpoints.

use std::path::Path;

use bcg_models::{ChatMessage, ChatTemplate, Tokenizer};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::document::documents;
use super::{CHECKPOINTS, Folder, campaign, models};

/// Messages, tools and further values, as routes pass them on.
#[derive(Deserialize)]
struct Chat {
    messages: Vec<ChatMessage>,
    tools: Option<Value>,
    add_generation_prompt: bool,
    #[serde(default)]
    chat_template_kwargs: Map<String, Value>,
}

fn render(template: &ChatTemplate, chat: &Chat) -> bcg_models::Result<String> {
    let Chat { messages, tools, add_generation_prompt, chat_template_kwargs } = chat;
    template.render(messages, tools.as_ref(), *add_generation_prompt, chat_template_kwargs)
}

/// Chats that the templates render.
pub(crate) fn chats() -> Vec<Value> {
    let tools = json!([{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters":
        {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]);
    let call = json!({"id": "call_1", "type": "function", "function":
        {"name": "weather", "arguments": "{\"city\": \"Paris\"}"}});
    vec![
        json!({"messages": [{"role": "user", "content": "Hello"}], "add_generation_prompt": true}),
        json!({"messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}], "name": "a"},
            {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes?", "reasoning_content": "hm"},
            {"role": "user", "content": "Bye"},
        ], "tools": null, "add_generation_prompt": true, "chat_template_kwargs": {"enable_thinking": false}}),
        json!({"messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": null, "tool_calls": [call]},
            {"role": "tool", "content": "{\"degrees\": 20}", "tool_call_id": "call_1"},
            {"role": "tool", "content": "20", "tool_call_id": "call_2"},
        ], "tools": tools, "add_generation_prompt": false, "chat_template_kwargs": {"enable_thinking": true}}),
    ]
}

/// What templates of larger models do: they look ahead and back, cut texts apart, and write tools as JSON.
const RICH: &str = r"
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{{ tool.function.name | upper }}{% endfor %}{% endif %}
{%- set ns = namespace(last=messages | length - 1, seen=[], is_tool=false) %}
{%- for message in (messages[::-1] if messages else []) %}
    {%- set at = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}{% set ns.last = at %}{% endif %}
{%- endfor %}
{%- if messages[0].role == 'system' %}{{ messages[0].content.strip() }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
    {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if message.role == 'assistant' and loop.index0 > ns.last and (loop.last or reasoning) %}
        {{- reasoning.strip() }}{{ content[:20] }}{{ content[-3:] | trim }}
    {%- elif message.role == 'tool' and loop.previtem and loop.previtem.role == 'tool' %}
        {{- content.replace('a', 'b').title() }}
    {%- elif message.role == 'function' %}{{ raise_exception('no functions, ' ~ message.name) }}
    {%- else %}{{ message.role + content }}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {%- set call = call.function if call.function else call %}
        {{- call.name }}{{ call.arguments if call.arguments is string else call.arguments | tojson(indent=2) }}
        {%- for key, value in call.arguments.items() %}{{ key ~ value | string }}{% if not value %}{% break %}{% endif %}{% endfor %}
    {%- endfor %}
{%- endfor %}
{{- strftime_now(date_format or '%d %B %Y') }}{{ bos_token or '' }}
{%- if add_generation_prompt %}{% if enable_thinking is defined and enable_thinking is false %}-{% endif %}{% endif %}";

#[test]
fn any_chat_is_rendered_or_refused() {
    let rich = Folder::new("chat");
    rich.set("chat_template.jinja", Some(RICH.as_bytes()));
    let folders = CHECKPOINTS.map(|name| models().join(name)).into_iter().chain([rich.0.clone()]);
    let templates: Vec<ChatTemplate> =
        folders.map(|folder| ChatTemplate::load(&folder).expect("it parses").expect("a template")).collect();
    for valid in chats() {
        let text =
            templates.iter().map(|template| render(template, &serde_json::from_value(valid.clone()).expect("a chat")));
        text.for_each(|text| assert!(!text.expect("a valid chat").is_empty()));
    }
    campaign::run("chat", &documents(chats()), |input| {
        let Ok(chat) = serde_json::from_slice::<Chat>(&input.bytes) else { return Ok(false) };
        let mut is_taken = true;
        for error in templates.iter().filter_map(|template| render(template, &chat).err()) {
            is_taken = false;
            // That is what the panics of the template engine become.
            if error.to_string().contains("cannot render") {
                return Err(error.to_string());
            }
        }
        Ok(is_taken)
    });
}

/// Pieces that make control tokens of the tiny checkpoints when they come together, and others.
const PIECES: &[&str] = &[
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|",
    "|>",
    "<",
    ">",
    "|",
    "im_",
    "start",
    "end",
    "<|im_",
    "_start|>",
    "oftext|>",
    "</think>",
    " ",
    "\n",
    "a",
    "é",
    "\u{f0000}",
    "{{",
    "\\u003c",
    "\"",
];

fn spliced() -> impl Strategy<Value = String> {
    vec(select(PIECES), 0..8).prop_map(|pieces| pieces.concat())
}

/// Control tokens that a template writes for a chat, whatever the chat says: as many as for the same chat without text.
#[test]
fn no_text_makes_a_control_token() {
    let rich = Folder::new("control");
    rich.set("chat_template.jinja", Some(RICH.as_bytes()));
    let plain =
        "{% for m in messages %}{{ m.content }}{{ m.name }}{{ m.tool_calls | tojson }}{% endfor %}{{ x | tojson }}";
    let joined = Folder::new("joined");
    joined.set("chat_template.jinja", Some(plain.as_bytes()));
    let load = |folder: &Path| ChatTemplate::load(folder).expect("it parses").expect("a template");
    let [own, rich, joined] = [load(&models().join(CHECKPOINTS[0])), load(&rich.0), load(&joined.0)];
    let tokenizers = CHECKPOINTS.map(|name| Tokenizer::load(&models().join(name)).expect("a tokenizer"));
    let inputs = (vec((spliced(), spliced(), spliced()), 1..4), spliced(), 0..tokenizers.len());
    campaign::run("control", &inputs, |(messages, extra, at)| {
        let tokenizer = &tokenizers[*at];
        let count = |ids: &[u32]| ids.iter().filter(|id| tokenizer.is_special(**id)).count();
        let message = |(content, name, argument): &(String, String, String)| {
            let call =
                json!({"function": {"name": name, "arguments": json!({argument.as_str(): argument}).to_string()}});
            json!({"role": "user", "content": content, "name": name, "tool_calls": [call]})
        };
        let chat: Vec<ChatMessage> =
            messages.iter().map(|parts| serde_json::from_value(message(parts)).expect("a message")).collect();
        let extra = Map::from_iter([("x".to_owned(), json!({extra.as_str(): extra}))]);
        for (template, of_template) in [(&own, 2 * chat.len() + 1), (&rich, 0), (&joined, 0)] {
            let Ok(text) = template.render(&chat, None, true, &extra) else { continue };
            let rendered = template.render_for(tokenizer, &chat, None, true, &extra);
            let ids = rendered.and_then(|rendered| rendered.encode(tokenizer)).map_err(|error| error.to_string())?;
            if count(&ids) != of_template {
                return Err(format!("{} control tokens, {of_template} expected: {text:?}", count(&ids)));
            }
            if tokenizer.decode(&ids, false).ok().as_deref() != Some(&text) {
                return Err(format!("the text has changed: {text:?}"));
            }
            let whole = tokenizer.encode(&text).expect("ids");
            if count(&whole) == of_template && whole != ids {
                return Err(format!("other tokens without a need: {text:?}"));
            }
        }
        let text = &messages[0].0;
        let ids = tokenizer.encode_content(text, true).map_err(|error| error.to_string())?;
        let whole = tokenizer.encode_with(text, true).expect("ids");
        match (count(&ids), count(&whole)) {
            (0, 0) if ids != whole => Err(format!("other tokens without a need: {text:?}")),
            (0, made) => Ok(made > 0),
            (made, _) => Err(format!("{made} control tokens of {text:?}")),
        }
    });
}
