//! Random calls: every field that a request can have, wrong ones, and clients that leave. A number is the same call for ever.

use std::time::Duration;

use bcg_tests::random::rng::Rng;
use serde_json::{Value, json};

/// Token ids that the tokenizer knows, without the special ones.
const TOKENS: std::ops::Range<usize> = 8..460;
/// Beginnings that prompts share, and their length.
const NUM_PREFIXES: usize = 4;
const PREFIX_TOKENS: usize = 70;
/// The most tokens that a prompt has behind its beginning.
const REST_TOKENS_MAX: usize = 130;
const MAX_TOKENS: usize = 40;
/// Enough tokens of a known answer to tell it from another one.
const ANSWER_TOKENS: usize = 10;

/// Questions that the tiny checkpoint was trained for: greedy answers to them must be the same at all times.
pub(crate) const QUESTIONS: [&str; 4] = [
    "Max has 62 shells, finds 70 more and then gives away 49. How many shells does Max have now?",
    "Max has 57 shells and drops 7. How many shells are left?",
    "Raj has 10 boxes with 12 books in each. How many books is that?",
    "Sam fills 12 bags with 11 shells each and keeps 43 more. How many shells does Sam have?",
];

/// What must come back.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Expect {
    /// An answer of this shape.
    Answer {
        stream: bool,
        num_choices: usize,
        /// The question that was asked, if its answer is known.
        question: Option<usize>,
    },
    /// An error with this status.
    Refusal(u16),
}

/// When a client leaves.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Leave {
    /// After so many bytes of its request.
    Within(usize),
    /// So long after its request.
    After(Duration),
}

/// One request and what its client does.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Call {
    line: &'static str,
    body: String,
    pub(crate) expect: Expect,
    pub(crate) leave: Option<Leave>,
    pub(crate) is_new_connection: bool,
    /// Whether its client takes a while before it reads each part of the answer.
    pub(crate) reads_slowly: bool,
}

impl Call {
    /// Makes the call with this number; one client in `leave_chance` leaves.
    pub(crate) fn random(seed: u64, number: u64, leave_chance: usize) -> Self {
        let mut rng = Rng::new(seed.wrapping_mul(1_000_003).wrapping_add(number));
        let mut call = match rng.below(12) {
            0 => wrong(&mut rng),
            1 | 2 => Self::question(rng.below(QUESTIONS.len()), rng.chance(2)),
            _ => right(&mut rng),
        };
        if rng.chance(leave_chance) {
            call.leave = Some(match rng.below(4) {
                0 => Leave::Within(rng.below(call.request().len())),
                _ => Leave::After(Duration::from_micros(rng.below(60_000) as u64)),
            });
        }
        call.is_new_connection = rng.chance(3);
        call.reads_slowly = rng.chance(12);
        call
    }

    /// Asks a question whose answer is known.
    pub(crate) fn question(question: usize, stream: bool) -> Self {
        let messages = json!([{"role": "user", "content": QUESTIONS[question]}]);
        let body = json!({"messages": messages, "temperature": 0, "max_tokens": ANSWER_TOKENS, "stream": stream});
        let expect = Expect::Answer { stream, num_choices: 1, question: Some(question) };
        Self::new("POST /v1/chat/completions", body.to_string(), expect)
    }

    fn new(line: &'static str, body: String, expect: Expect) -> Self {
        Self { line, body, expect, leave: None, is_new_connection: false, reads_slowly: false }
    }

    /// The bytes that the client sends.
    pub(crate) fn request(&self) -> String {
        let Self { line, body, .. } = self;
        let length = body.len();
        format!(
            "{line} HTTP/1.1\r\nHost: bcg\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
    }
}

/// Token ids: a shared beginning, or a part of it, and a rest of its own.
fn prompt(rng: &mut Rng) -> Vec<usize> {
    let mut shared = Rng::new(rng.below(NUM_PREFIXES) as u64);
    let token = |rng: &mut Rng| TOKENS.start + rng.below(TOKENS.len());
    let mut prompt: Vec<usize> = (0..PREFIX_TOKENS).map(|_| token(&mut shared)).collect();
    prompt.truncate(if rng.chance(4) { rng.below(PREFIX_TOKENS) } else { PREFIX_TOKENS });
    prompt.extend((0..1 + rng.below(REST_TOKENS_MAX)).map(|_| token(rng)));
    prompt
}

fn right(rng: &mut Rng) -> Call {
    let (stream, is_chat) = (rng.chance(2), rng.chance(3));
    let mut body = json!({"max_tokens": 1 + rng.below(MAX_TOKENS), "stream": stream});
    if is_chat {
        let content = format!("{} {}", QUESTIONS[rng.below(QUESTIONS.len())], rng.below(1000));
        body["messages"] = json!([{"role": "user", "content": content}]);
    } else if rng.chance(4) {
        body["prompt"] = json!(format!("{}+{}", rng.below(1000), rng.below(1000)));
    } else {
        body["prompt"] = json!(prompt(rng));
    }
    if rng.chance(2) {
        body["temperature"] = json!(0);
    } else {
        body["temperature"] = json!(0.1 * rng.below(20) as f64);
        body["seed"] = json!(rng.below(100));
        body["top_p"] = json!(0.05 * (1 + rng.below(19)) as f64);
        body["top_k"] = json!(rng.below(50));
    }
    let mut num_choices = 1;
    if rng.chance(6) {
        num_choices = 2 + rng.below(2);
        body["n"] = json!(num_choices);
    }
    choices(rng, &mut body, is_chat);
    if stream && rng.chance(3) {
        body["stream_options"] = json!({"include_usage": true});
    }
    let line = if is_chat { "POST /v1/chat/completions" } else { "POST /v1/completions" };
    Call::new(line, body.to_string(), Expect::Answer { stream, num_choices, question: None })
}

/// Asks something of the choice of tokens, or of the end.
fn choices(rng: &mut Rng, body: &mut Value, is_chat: bool) {
    if rng.chance(4) {
        body["stop"] = json!(["7", "1 ", "="][..1 + rng.below(3)]);
    }
    if rng.chance(4) {
        body["ignore_eos"] = json!(true);
    }
    if rng.chance(5) {
        body["logprobs"] = if is_chat { json!(true) } else { json!(rng.below(6)) };
    }
    if rng.chance(6) {
        let token = (TOKENS.start + rng.below(TOKENS.len())).to_string();
        body["logit_bias"] = json!({token: rng.below(200) as f64 - 100.0});
    }
    if rng.chance(6) {
        body["presence_penalty"] = json!(0.5);
        body["frequency_penalty"] = json!(-0.5);
    }
    if rng.chance(8) {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
        match rng.below(3) {
            0 => body["regex"] = json!("[0-9]{1,9}(,[0-9]{3})*"),
            1 => body["response_format"] = json!({"type": "json_object"}),
            _ => {
                let named = json!({"name": "a", "schema": schema});
                body["response_format"] = json!({"type": "json_schema", "json_schema": named});
            }
        }
    }
}

fn wrong(rng: &mut Rng) -> Call {
    let chat = |field: &str, value: Value| json!({"messages": [{"role": "user", "content": "hi"}], field: value});
    let text = |field: &str, value: Value| json!({"prompt": "hi", field: value});
    let (line, body, status) = match rng.below(12) {
        0 => ("POST /v1/chat/completions", "{\"messages\": [".to_owned(), 400),
        1 => ("POST /v1/chat/completions", chat("temperature", json!(9)).to_string(), 400),
        2 => ("POST /v1/chat/completions", chat("model", json!("another")).to_string(), 404),
        3 => ("POST /v1/chat/completions", chat("messages", json!([])).to_string(), 400),
        4 => ("POST /v1/completions", text("max_tokens", json!(0)).to_string(), 400),
        5 => ("POST /v1/completions", text("max_tokens", json!(100_000)).to_string(), 400),
        6 => ("POST /v1/completions", text("prompt", json!(vec![7; 900])).to_string(), 400),
        7 => ("POST /v1/completions", text("prompt", json!([7, 512])).to_string(), 400),
        8 => ("POST /v1/completions", text("stop", json!(["1", "2", "3", "4", "5"])).to_string(), 400),
        9 => ("POST /v1/completions", text("regex", json!("(")).to_string(), 400),
        10 => ("GET /v1/completions", String::new(), 405),
        _ => ("GET /v1/nothing", String::new(), 404),
    };
    Call::new(line, body, Expect::Refusal(status))
}
