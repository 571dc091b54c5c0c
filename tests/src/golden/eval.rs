//! The mini-gsm word problems, as chat and with five examples in the prompt.

use std::ops::ControlFlow;

use bcg_models::{ChatMessage, ChatTemplate, GenerateOptions, GraphMode, ModelRunner};
use bcg_runtime::Device;
use serde_json::Value;

use super::{Checkpoint, folder, load, options, root};

/// Problems of each style that the quick rules solve; `bcg eval` solves all 200.
const NUM_PROBLEMS: usize = 12;

/// How a problem is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Style {
    /// One user message; the answer ends with the end-of-sequence token.
    Chat,
    /// Five worked examples, then the problem; the answer ends at the first newline.
    FewShot,
}

fn problems() -> Vec<(String, f64)> {
    let text = std::fs::read_to_string(root().join("tests/data/mini_gsm_test.jsonl")).expect("the problems");
    let parse = |line: &str| {
        let problem: Value = serde_json::from_str(line).expect("JSON");
        (problem["question"].as_str().expect("a question").to_owned(), problem["number"].as_f64().expect("a number"))
    };
    text.lines().map(parse).collect()
}

fn shots() -> String {
    let bytes = std::fs::read(root().join("tests/data/mini_gsm_shots.json")).expect("the examples");
    let shots: Vec<Value> = serde_json::from_slice(&bytes).expect("JSON");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    shots
        .iter()
        .map(|shot| format!("Question: {}\nAnswer: {}\n\n", text(&shot["question"]), text(&shot["answer"])))
        .collect()
}

/// The number after `####`.
fn number_in(answer: &str) -> Option<f64> {
    answer.rsplit_once("####")?.1.split_whitespace().next()?.replace(',', "").parse().ok()
}

/// Solves the first `count` problems; returns the fraction that is right, and all answers' tokens.
pub(super) fn accuracy(
    runner: &mut ModelRunner,
    checkpoint: Checkpoint,
    style: Style,
    count: usize,
) -> (f64, Vec<Vec<u32>>) {
    let template = ChatTemplate::load(&folder(checkpoint)).expect("a readable template").expect("a template");
    let shots = shots();
    let tokenizer = runner.tokenizer().expect("a tokenizer").clone();
    let (mut right, mut all_tokens) = (0, Vec::new());
    let problems: Vec<_> = problems().into_iter().take(count).collect();
    for (question, number) in &problems {
        let prompt = match style {
            Style::Chat => template
                .render(&[ChatMessage::new("user", question)], None, true, &serde_json::Map::new())
                .expect("a prompt"),
            Style::FewShot => format!("{shots}Question: {question}\nAnswer: "),
        };
        let prompt = tokenizer.encode(&prompt).expect("token ids");
        let mut stream = tokenizer.stream(true);
        let mut answer = String::new();
        let generated = runner
            .generate(&prompt, &GenerateOptions::default(), &mut |token| {
                answer.extend(stream.push(token.id).expect("text"));
                let is_done = style == Style::FewShot && answer.contains('\n');
                if is_done { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .expect("an answer");
        all_tokens.push(generated.tokens);
        if number_in(&answer) == Some(*number) {
            right += 1;
        }
    }
    (f64::from(right) / problems.len() as f64, all_tokens)
}

fn answers_are_right(device: &Device, checkpoint: Checkpoint, style: Style) {
    let (eager, eager_tokens) =
        accuracy(&mut load(device, checkpoint, options(GraphMode::Off)), checkpoint, style, NUM_PROBLEMS);
    assert_eq!(eager, 1.0, "eager: {eager_tokens:?}");
    let mut runner = load(device, checkpoint, options(GraphMode::Ahead));
    let (graphs, graph_tokens) = accuracy(&mut runner, checkpoint, style, NUM_PROBLEMS);
    assert_eq!((graphs, graph_tokens), (eager, eager_tokens), "with graphs");
    assert!(runner.stats().num_replays as usize >= NUM_PROBLEMS, "{:?}", runner.stats());
}

/// The first problems as chat: all right, and token for token the same with graphs.
pub fn chat_answers_are_right(device: &Device, checkpoint: Checkpoint) {
    answers_are_right(device, checkpoint, Style::Chat);
}

/// The first problems with five examples: all right, and token for token the same with graphs.
pub fn few_shot_answers_are_right(device: &Device, checkpoint: Checkpoint) {
    answers_are_right(device, checkpoint, Style::FewShot);
}
