//! Functions that the model may call: read from a request, put into its prompt, and parsed back from the answer.
//!
//! The format of a call is the Hermes format, which the chat template of Qwen3 teaches the model:
//!
//! ```text
//! <tool_call>
//! {"name": "add", "arguments": {"a": 1, "b": 2}}
//! </tool_call>
//! ```
//!
//! Models that write calls in another way get the functions in their prompt, and their calls stay text. Where the request
//! leaves no choice (`required`, or a named function), a grammar makes the answer calls of this format, whatever the model.

use bcg_engine::{Grammar, guide};
use serde_json::{Map, Value, json};

use self::calls::CallParser;
use super::fields::BodyFields;
use crate::error::ApiError;

pub(super) mod calls;

/// The most functions of one request, as in the OpenAI API.
const TOOLS_MAX: usize = 128;
/// Characters of a function's name, as in the OpenAI API.
const NAME_CHARS_MAX: usize = 64;

/// The functions of one request.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tools {
    functions: Vec<Function>,
    choice: Choice,
    /// Whether one answer may hold several calls.
    parallel: bool,
    /// The tools as they came, for the template.
    json: Value,
}

#[derive(Debug, Clone, PartialEq)]
struct Function {
    name: String,
    /// A JSON schema.
    parameters: Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Choice {
    /// The model sees no functions.
    None,
    /// The model decides.
    Auto,
    /// At least one call.
    Required,
    /// One call of this function.
    Named(String),
}

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`.
    pub(super) fn read(fields: &BodyFields) -> Result<Self, ApiError> {
        let json = fields.values("tools", TOOLS_MAX)?.unwrap_or_default();
        let functions = json.iter().map(function).collect::<Result<Vec<_>, _>>()?;
        let choice = choice(fields, &functions)?;
        let parallel = fields.get("parallel_tool_calls")?.unwrap_or(true);
        Ok(Self { functions, choice, parallel, json: json.into() })
    }

    /// What the chat template sees; null for nothing.
    pub(super) fn for_template(&self) -> Value {
        if self.choice == Choice::None { Value::Null } else { self.json.clone() }
    }

    /// The parser of one choice's text, if it may hold calls.
    pub(super) fn parser(&self) -> Option<CallParser> {
        let names = self.functions.iter().map(|function| function.name.clone());
        (self.choice != Choice::None).then(|| CallParser::new(names.collect(), self.parallel))
    }

    /// What the answer must look like: calls, or else what `format` asks for.
    pub(super) fn grammar(&self, format: Option<Grammar>) -> Result<Option<Grammar>, ApiError> {
        let format = match (&self.choice, format) {
            (Choice::None, format) => return Ok(format),
            (Choice::Auto, None) => return Ok(None),
            (Choice::Auto, format) => format,
            // A choice that is no choice leaves no room for another answer.
            (Choice::Required | Choice::Named(_), _) => None,
        };
        let refuse = |error: String| ApiError::invalid("tools", error);
        let mut lark = String::from(match (format.is_some(), self.parallel && self.choice.allows_several()) {
            (true, true) => "start: calls | answer\n",
            (true, false) => "start: call | answer\n",
            (false, true) => "start: calls\n",
            (false, false) => "start: call\n",
        });
        lark += "calls: call (\"\\n\" call)*\n";
        let callable = self.functions.iter().enumerate().filter(|(_, function)| self.choice.allows(&function.name));
        for (place, (index, function)) in callable.enumerate() {
            let Function { name, parameters } = function;
            let open = json!(format!("<tool_call>\n{{\"name\": \"{name}\", \"arguments\": "));
            let rule = guide::rule(&Grammar::JsonSchema(parameters.clone())).map_err(refuse)?;
            let head = if place == 0 { "call:" } else { "    |" };
            lark += &format!("{head} {open} arguments_{index} \"}}\\n</tool_call>\"\n");
            lark.insert_str(0, &format!("arguments_{index}: {rule}\n"));
        }
        if let Some(format) = format {
            lark += &format!("answer: {}\n", guide::rule(&format).map_err(refuse)?);
        }
        Ok(Some(Grammar::Lark(lark)))
    }
}

impl Choice {
    fn allows(&self, name: &str) -> bool {
        match self {
            Self::Named(named) => named == name,
            _ => true,
        }
    }

    fn allows_several(&self) -> bool {
        !matches!(self, Self::Named(_))
    }
}

fn function(tool: &Value) -> Result<Function, ApiError> {
    let refuse = |what: String| Err(ApiError::invalid("tools", format!("Invalid value for `tools`: {what}.")));
    if tool["type"] != "function" {
        return refuse("every tool must have the type `function`".into());
    }
    let Some(name) = tool["function"]["name"].as_str().filter(|name| is_name(name)) else {
        return refuse(format!("every function needs a name of 1 to {NAME_CHARS_MAX} letters, digits, `_` and `-`"));
    };
    let parameters = match &tool["function"]["parameters"] {
        Value::Null => json!({"type": "object"}),
        schema @ Value::Object(_) => schema.clone(),
        _ => return refuse(format!("the parameters of `{name}` must be a JSON schema, an object")),
    };
    Ok(Function { name: name.to_owned(), parameters })
}

fn is_name(name: &str) -> bool {
    (1..=NAME_CHARS_MAX).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-".contains(&byte))
}

fn choice(fields: &BodyFields, functions: &[Function]) -> Result<Choice, ApiError> {
    const PARAM: &str = "tool_choice";
    let named = |object: &Map<String, Value>| {
        let function = object.get("function").filter(|_| object.get("type") == Some(&json!("function")));
        function.and_then(|function| function["name"].as_str()).map(str::to_owned)
    };
    let wanted = match fields.value(PARAM)? {
        None => return Ok(if functions.is_empty() { Choice::None } else { Choice::Auto }),
        Some(Value::String(word)) => match word.as_str() {
            "none" => Some(Choice::None),
            "auto" => Some(Choice::Auto),
            "required" => Some(Choice::Required),
            _ => None,
        },
        Some(Value::Object(object)) => named(&object).map(Choice::Named),
        Some(_) => None,
    };
    let Some(wanted) = wanted else {
        let accepted = "`none`, `auto`, `required` or {\"type\": \"function\", \"function\": {\"name\": …}}";
        return Err(ApiError::invalid(PARAM, format!("`{PARAM}` must be {accepted}.")));
    };
    match &wanted {
        Choice::Named(name) if !functions.iter().any(|function| function.name == *name) => {
            let message = "`tool_choice` names a function that is not in `tools`; add it there.";
            Err(ApiError::invalid(PARAM, message))
        }
        Choice::Auto | Choice::None if functions.is_empty() => Ok(Choice::None),
        Choice::Required if functions.is_empty() => {
            Err(ApiError::invalid(PARAM, "`tool_choice` requires a call, but `tools` is empty; give the functions."))
        }
        _ => Ok(wanted),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &Value) -> Result<Tools, ApiError> {
        Tools::read(&crate::fields::leaked(body))
    }

    fn tools(names: &[&str]) -> Value {
        let parameters = json!({"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],
                                "additionalProperties": false});
        names
            .iter()
            .map(|name| json!({"type": "function", "function": {"name": name, "parameters": parameters}}))
            .collect()
    }

    #[test]
    fn the_model_decides_unless_the_request_does() {
        let auto = read(&json!({"tools": tools(&["f"])})).expect("tools");
        assert_eq!((auto.choice.clone(), auto.grammar(None)), (Choice::Auto, Ok(None)));
        assert_eq!(auto.for_template(), tools(&["f"]));
        let none = read(&json!({"tools": tools(&["f"]), "tool_choice": "none"})).expect("tools");
        assert_eq!(none.for_template(), Value::Null);
        assert!(none.parser().is_none());
        assert!(read(&json!({})).expect("no tools").parser().is_none());
        assert_eq!(read(&json!({"tools": [], "tool_choice": "auto"})).expect("no tools").choice, Choice::None);
    }

    #[test]
    fn bad_tools_are_refused_by_field() {
        let refused = |body: Value, field: &str| {
            let error = read(&body).expect_err("refused");
            assert!(matches!(error, ApiError::InvalidRequest { param: Some(param), .. } if param == field), "{body}");
        };
        for bad in [json!(7), json!([{"type": "retrieval"}]), tools(&["a b"]), tools(&[""]), tools(&["f"; 129])] {
            refused(json!({"tools": bad}), "tools");
        }
        let parameters = json!([{"type": "function", "function": {"name": "f", "parameters": 3}}]);
        refused(json!({"tools": parameters}), "tools");
        for bad in [json!("always"), json!({"type": "function"}), json!(1)] {
            refused(json!({"tools": tools(&["f"]), "tool_choice": bad}), "tool_choice");
        }
        let named = json!({"type": "function", "function": {"name": "g"}});
        refused(json!({"tools": tools(&["f"]), "tool_choice": named}), "tool_choice");
        refused(json!({"tool_choice": "required"}), "tool_choice");
        refused(json!({"tools": tools(&["f"]), "parallel_tool_calls": 2}), "parallel_tool_calls");
    }

    /// Whether a text is an answer that the grammar allows in full.
    fn allows(grammar: &Grammar, text: &str) -> bool {
        use std::path::Path;
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        let tokenizer = bcg_models::Tokenizer::load(&dir).expect("the tiny checkpoint has a tokenizer");
        let factory = guide::GuideFactory::new(&tokenizer, &[2], 512).expect("a vocabulary");
        let mut guide = factory.guide(grammar).unwrap_or_else(|error| panic!("{error}: {grammar:?}"));
        let mut ids = tokenizer.encode(text).expect("encodes");
        ids.push(2);
        ids.iter().all(|&id| guide.accept(id).is_ok())
    }

    #[test]
    fn a_required_call_is_certain() {
        const F: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 12}}\n</tool_call>";
        let g = F.replace("\"f\"", "\"g\"");
        let required = read(&json!({"tools": tools(&["f", "g"]), "tool_choice": "required"})).expect("tools");
        let grammar = required.grammar(Some(Grammar::JsonObject)).expect("schemas").expect("a grammar");
        assert!(allows(&grammar, F) && allows(&grammar, &format!("{F}\n{g}")));
        assert!(!allows(&grammar, "12") && !allows(&grammar, "{}") && !allows(&grammar, ""));
        assert!(!allows(&grammar, &F.replace("12", "true")));
        let named = json!({"type": "function", "function": {"name": "g"}});
        let named = read(&json!({"tools": tools(&["f", "g"]), "tool_choice": named})).expect("tools");
        let grammar = named.grammar(None).expect("schemas").expect("a grammar");
        assert!(allows(&grammar, &g) && !allows(&grammar, F) && !allows(&grammar, &format!("{g}\n{g}")));
    }

    #[test]
    fn a_format_leaves_calls_possible() {
        const F: &str = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 12}}\n</tool_call>";
        let auto = read(&json!({"tools": tools(&["f"]), "parallel_tool_calls": false})).expect("tools");
        for (format, answer) in [(Grammar::JsonObject, "{\"a\": [1]}"), (Grammar::Regex("[0-9]+/2".into()), "34/2")] {
            let grammar = auto.grammar(Some(format)).expect("schemas").expect("a grammar");
            assert!(allows(&grammar, F) && allows(&grammar, answer));
            assert!(!allows(&grammar, "free") && !allows(&grammar, &format!("{F}\n{F}")));
        }
    }
}
