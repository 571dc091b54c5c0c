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
///
/// Each byte is looked at once as it comes, and a call is parsed a number of times that grows with the logarithm of its
/// length, so the work is about linear in the text however it is cut. What is held back is at most one call, or the white
/// space before one; the context bounds both, as it bounds the answer.
#[derive(Debug, Clone)]
pub(crate) struct CallParser {
    /// The functions that there are; a call of another one stays text.
    names: Vec<String>,
    parallel: bool,
    held: String,
    /// What `held` is.
    state: State,
    num_calls: usize,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// White space, as far as it was looked at, and then what may be the beginning of a tag.
    Text { looked: usize },
    /// White space, a tag, and JSON so far.
    Call(JsonSoFar),
}

/// How far the JSON of a call was looked at. A closing tag inside one of its strings does not end it.
#[derive(Debug, Clone, Copy)]
struct JsonSoFar {
    /// Where it begins.
    begin: usize,
    looked: usize,
    in_string: bool,
    /// The next character is behind a backslash.
    escaped: bool,
    /// Bytes of JSON from which on a closing tag in what looks like a string is worth parsing: what is no JSON need not be
    /// held to its end.
    worth: usize,
}

/// What the held text begins with.
enum Found {
    Call(Written, usize),
    Text(usize),
    Nothing,
}

impl CallParser {
    /// Looks for calls of these functions; all but the first are dropped unless `parallel`.
    pub(super) fn new(names: Vec<String>, parallel: bool) -> Self {
        Self { names, parallel, held: String::new(), state: State::Text { looked: 0 }, num_calls: 0 }
    }

    /// How many calls there were.
    pub(crate) fn num_calls(&self) -> usize {
        self.num_calls
    }

    /// Takes the next piece of text and returns what is certain now.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held += text;
        self.take()
    }

    /// Returns what was held back, at the end of the text. A last call needs no closing tag.
    pub(crate) fn finish(&mut self) -> Vec<Piece> {
        let mut pieces = self.take();
        let held = std::mem::take(&mut self.held);
        if let State::Call(json) = self.state
            && let Some(written) = self.parse(&held[json.begin..]).ok().flatten()
        {
            pieces.extend(self.call(written));
        } else if self.num_calls == 0 || !held.trim().is_empty() {
            pieces.extend(content(&held));
        }
        self.state = State::Text { looked: 0 };
        pieces
    }

    fn take(&mut self) -> Vec<Piece> {
        let (mut pieces, mut from) = (Vec::new(), 0);
        loop {
            match self.state {
                State::Text { looked } => {
                    let (shown, state) = self.look_for_tag(from, looked);
                    pieces.extend(content(&self.held[from..shown]));
                    (from, self.state) = (shown, state);
                    if matches!(state, State::Text { .. }) {
                        break;
                    }
                }
                State::Call(json) => match self.look_for_end(json) {
                    Found::Call(written, end) => {
                        pieces.extend(self.call(written));
                        (from, self.state) = (end, State::Text { looked: end });
                    }
                    Found::Text(end) => {
                        pieces.extend(content(&self.held[from..end]));
                        (from, self.state) = (end, State::Text { looked: end });
                    }
                    Found::Nothing => break,
                },
            }
        }
        self.held.drain(..from);
        match &mut self.state {
            State::Text { looked } => *looked -= from,
            State::Call(json) => (json.begin, json.looked) = (json.begin - from, json.looked - from),
        }
        pieces
    }

    /// Looks for an opening tag in what was not looked at, where `from` begins what is held. Returns how much of it is
    /// content for certain, and what the rest is.
    fn look_for_tag(&self, from: usize, looked: usize) -> (usize, State) {
        let fresh = &self.held[looked..];
        let at = fresh.find(OPEN);
        let partial = || (0..OPEN.len()).rev().find(|&length| fresh.ends_with(&OPEN[..length])).unwrap_or(0);
        let end = looked + at.unwrap_or_else(|| fresh.len() - partial());
        let trimmed = self.held[looked..end].trim_end().len();
        // Where all of it is white space, so is what was looked at before.
        let shown = if trimmed == 0 { from } else { looked + trimmed };
        let begin = end + OPEN.len();
        let json = JsonSoFar { begin, looked: begin, in_string: false, escaped: false, worth: 0 };
        (shown, if at.is_some() { State::Call(json) } else { State::Text { looked: end } })
    }

    /// Looks for the closing tag in what was not looked at.
    fn look_for_end(&mut self, mut json: JsonSoFar) -> Found {
        let bytes = self.held.as_bytes();
        while let Some(&byte) = bytes.get(json.looked) {
            if byte == b'<' {
                let rest = &bytes[json.looked..];
                if rest.len() < CLOSE.len() && CLOSE.as_bytes().starts_with(rest) {
                    break;
                }
                let length = json.looked - json.begin;
                if rest.starts_with(CLOSE.as_bytes()) && (!json.in_string || length >= json.worth) {
                    let end = json.looked + CLOSE.len();
                    match self.parse(&self.held[json.begin..json.looked]) {
                        Ok(Some(written)) => return Found::Call(written, end),
                        Err(error) if error.is_eof() && json.in_string => json.worth = 2 * length,
                        _ => return Found::Text(end),
                    }
                }
            }
            (json.in_string, json.escaped) = match (json.in_string, json.escaped, byte) {
                (true, true, _) => (true, false),
                (true, false, b'\\') => (true, true),
                (in_string, false, b'"') => (!in_string, false),
                (in_string, ..) => (in_string, false),
            };
            json.looked += 1;
        }
        self.state = State::Call(json);
        Found::Nothing
    }

    /// Reads what stands between the tags; `None` if it calls a function that is not there.
    fn parse(&self, json: &str) -> serde_json::Result<Option<Written>> {
        #[cfg(test)]
        tests::PARSED_BYTES.with(|bytes| bytes.set(bytes.get() + json.len()));
        let written = serde_json::from_str::<Written>(json.trim())?;
        Ok(Some(written).filter(|written| self.names.contains(&written.name)))
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
    use std::cell::Cell;

    use super::*;

    thread_local! {
        /// Bytes of JSON that were parsed in this thread.
        pub(super) static PARSED_BYTES: Cell<usize> = const { Cell::new(0) };
    }

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

    #[test]
    fn white_space_before_a_call_is_not_content_and_all_other_is() {
        let g = "<tool_call>{\"name\": \"g\"}</tool_call>";
        check(&format!("a \n \n {g} \n "), "a", &[("g", "{}")]);
        check("a \n \n b \n ", "a \n \n b \n ", &[]);
        check(&format!(" \n {g}"), "", &[("g", "{}")]);
    }

    #[test]
    fn what_looks_like_a_string_is_not_held_to_the_end_if_it_is_no_json() {
        let mut parser = CallParser::new(vec!["f".into()], true);
        let text = "<tool_call>it is \"so</tool_call> ";
        assert_eq!(parser.push(text), [Piece::Content(text.trim_end().to_owned())]);
        let unfinished = "<tool_call>{\"name\": \"f\"</tool_call>";
        check(unfinished, unfinished, &[]);
    }

    #[test]
    fn the_work_is_linear_in_the_text_however_it_is_cut() {
        const PIECES: usize = 100_000;
        let tags = "</tool_call>".repeat(PIECES / 12);
        let call = |argument: &str| {
            format!("<tool_call>{{\"name\": \"f\", \"arguments\": {{\"x\": \"{argument}\"}}}}</tool_call>")
        };
        for (what, text, calls) in [
            ("a long argument", call(&"x".repeat(PIECES)), 1),
            ("closing tags in a string", call(&tags), 1),
            ("a call that never ends", call(&tags).replace("\"}}</tool_call>", ""), 0),
            ("white space", format!("{}x", " ".repeat(PIECES)), 0),
            ("many calls", call("").repeat(PIECES / 60), PIECES / 60),
            ("what is no call", "<tool_call>{</tool_call>".repeat(PIECES / 24), 0),
            ("beginnings of a tag", "<tool_cal".repeat(PIECES / 9), 0),
        ] {
            PARSED_BYTES.with(|bytes| bytes.set(0));
            let began = std::time::Instant::now();
            let (content, found) = parse(&text, 1, true);
            let (took, parsed) = (began.elapsed(), PARSED_BYTES.with(Cell::get));
            assert_eq!(found.len(), calls, "{what}");
            assert!(calls > 0 || content == text, "{what}");
            assert!(parsed <= 4 * text.len(), "{what}: {parsed} bytes parsed of {}", text.len());
            // What is quadratic takes minutes.
            assert!(took < std::time::Duration::from_secs(5), "{what}: {took:?}");
        }
    }
}
