//! Calls inside a text that comes piece by piece.
//!
//! Invariant: however the text is cut into pieces, the content and the calls are the same, so a stream says what a whole
//! answer says. Text that may begin a call is held back, and so is white space, which does not belong to the content when a
//! call follows.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::request::next_id;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece {
    /// Text for the reader.
    Content(String),
    /// A whole call.
    Call(Call),
}

/// A call that the model made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call {
    /// Its place among the calls of the answer.
    index: usize,
    name: String,
    /// JSON, as text.
    arguments: String,
}

impl Call {
    /// Returns the call in OpenAI's shape, with an identity of its own.
    pub(crate) fn to_json(&self) -> Value {
        let function = json!({"name": self.name, "arguments": self.arguments});
        json!({"id": next_id("call"), "type": "function", "function": function})
    }

    /// Returns the call as a chunk of a stream.
    pub(crate) fn to_chunk(&self) -> Value {
        let mut call = self.to_json();
        call["index"] = json!(self.index);
        call
    }
}

/// What the model writes between the tags.
#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(default)]
    arguments: Value,
}

/// Separates calls from content.
#[derive(Debug, Clone)]
pub(crate) struct CallParser {
    /// The functions that there are; a call of another one stays text.
    names: Vec<String>,
    parallel: bool,
    held: String,
    num_calls: usize,
}

enum Found {
    Call(Written, usize),
    Text(usize),
    Nothing,
}

impl CallParser {
    /// Looks for calls of these functions; all but the first are dropped unless `parallel`.
    pub(super) fn new(names: Vec<String>, parallel: bool) -> Self {
        Self { names, parallel, held: String::new(), num_calls: 0 }
    }

    /// How many calls there were.
    pub(crate) fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Takes the next piece of text and returns what is certain now.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held += text;
        self.take(false)
    }

    /// Returns what was held back, at the end of the text.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = self.take(true);
        let rest = std::mem::take(&mut self.held);
        if self.num_calls == 0 || !rest.trim().is_empty() {
            pieces.extend(content(&rest));
        }
        pieces
    }

    fn take(&mut self, at_end: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while let Some(at) = self.held.find(OPEN) {
            match self.find_call(at + OPEN.len(), at_end) {
                Found::Call(written, end) => {
                    pieces.extend(content(self.held[..at].trim_end()));
                    self.held.drain(..end);
                    pieces.extend(self.call(written));
                }
                Found::Text(end) => {
                    pieces.extend(content(&self.held[..end]));
                    self.held.drain(..end);
                }
                Found::Nothing => {
                    let shown = self.held[..at].trim_end().len();
                    pieces.extend(content(&self.held[..shown]));
                    self.held.drain(..shown);
                    return pieces;
                }
            }
        }
        let partial = (0..OPEN.len()).rev().find(|&length| self.held.ends_with(&OPEN[..length])).unwrap_or(0);
        let shown = self.held[..self.held.len() - partial].trim_end().len();
        pieces.extend(content(&self.held[..shown]));
        self.held.drain(..shown);
        pieces
    }

    /// Reads the call whose JSON begins at `begin`. A closing tag inside one of its strings does not end it.
    fn find_call(&self, begin: usize, at_end: bool) -> Found {
        let inner = &self.held[begin..];
        for (close, _) in inner.match_indices(CLOSE) {
            let end = begin + close + CLOSE.len();
            match serde_json::from_str::<Written>(inner[..close].trim()) {
                Ok(written) if self.names.contains(&written.name) => return Found::Call(written, end),
                Err(error) if error.is_eof() => {}
                _ => return Found::Text(end),
            }
        }
        match serde_json::from_str::<Written>(inner.trim()) {
            Ok(written) if at_end && self.names.contains(&written.name) => Found::Call(written, self.held.len()),
            _ => Found::Nothing,
        }
    }

    fn call(&mut self, written: Written) -> Option<Piece> {
        if self.num_calls > 0 && !self.parallel {
            return None;
        }
        let arguments = match written.arguments {
            Value::String(text) => text,
            Value::Null => "{}".to_owned(),
            arguments => arguments.to_string(),
        };
        let index = self.num_calls;
        self.num_calls += 1;
        Some(Piece::Call(Call { index, name: written.name, arguments }))
    }
}

fn content(text: &str) -> Option<Piece> {
    (!text.is_empty()).then(|| Piece::Content(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Content and calls of a text that comes in pieces of `size` characters.
    fn parse(text: &str, size: usize, parallel: bool) -> (String, Vec<(String, String)>) {
        let mut parser = CallParser::new(vec!["f".into(), "g".into()], parallel);
        let characters: Vec<char> = text.chars().collect();
        let mut pieces: Vec<Piece> =
            characters.chunks(size).flat_map(|piece| parser.push(&piece.iter().collect::<String>())).collect();
        pieces.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Content(text) => content += &text,
                Piece::Call(call) => {
                    assert_eq!(call.index, calls.len());
                    calls.push((call.name, call.arguments));
                }
            }
        }
        assert_eq!(parser.num_calls(), calls.len());
        (content, calls)
    }

    #[track_caller]
    fn check(text: &str, content: &str, calls: &[(&str, &str)]) {
        let calls: Vec<(String, String)> =
            calls.iter().map(|&(name, arguments)| (name.to_owned(), arguments.to_owned())).collect();
        for size in [1, 2, 3, 7, 1000] {
            assert_eq!(parse(text, size, true), (content.to_owned(), calls.clone()), "in pieces of {size}");
        }
    }

    #[test]
    fn calls_are_parsed_however_the_text_is_cut() {
        let f = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"é\"}}\n</tool_call>";
        let g = "<tool_call>{\"name\": \"g\"}</tool_call>";
        check(f, "", &[("f", "{\"x\":\"é\"}")]);
        check(&format!("Let me see.\n{f}\n{g}\n"), "Let me see.", &[("f", "{\"x\":\"é\"}"), ("g", "{}")]);
        check(&format!("{g} and then"), " and then", &[("g", "{}")]);
    }

    #[test]
    fn text_without_calls_is_kept_as_it_is() {
        for text in ["", " a < b <tool \n", "<tool_cal", "x <tool_call", "a\n\n"] {
            check(text, text, &[]);
        }
    }

    #[test]
    fn what_is_no_call_stays_text() {
        let good = "<tool_call>{\"name\": \"g\", \"arguments\": {}}</tool_call>";
        for bad in [
            "<tool_call>{\"name\": f}</tool_call>",
            "<tool_call>{\"name\": \"h\", \"arguments\": {}}</tool_call>",
            "<tool_call>[]</tool_call>",
        ] {
            check(bad, bad, &[]);
            check(&format!("{bad}{good}"), bad, &[("g", "{}")]);
        }
        check("<tool_call>{\"name\": \"f\", \"arg", "<tool_call>{\"name\": \"f\", \"arg", &[]);
    }

    #[test]
    fn a_tag_inside_a_string_does_not_end_the_call() {
        let text = "<tool_call>{\"name\": \"f\", \"arguments\": {\"x\": \"</tool_call>\"}}</tool_call>";
        check(text, "", &[("f", "{\"x\":\"</tool_call>\"}")]);
    }

    #[test]
    fn a_call_needs_no_closing_tag_at_the_end() {
        check("<tool_call>\n{\"name\": \"f\", \"arguments\": \"{\\\"x\\\": 1}\"}\n", "", &[("f", "{\"x\": 1}")]);
    }

    #[test]
    fn only_the_first_call_counts_where_one_is_allowed() {
        let g = "<tool_call>{\"name\": \"g\"}</tool_call>";
        let (content, calls) = parse(&format!("{g}\n{g}"), 5, false);
        assert_eq!((content.as_str(), calls.len()), ("", 1));
    }
}
