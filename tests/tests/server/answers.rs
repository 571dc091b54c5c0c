//! Several choices, several prompts, and what a request may ask of them.

use std::sync::atomic::Ordering;

use bcg_engine::{EngineEvent, Grammar, Prompt, RequestError, SubmitError};
use serde_json::{Value, json};

use crate::client::Server;
use crate::scripted::{Script, answer, text};
use crate::{chat, completion, eventually};

fn answers(texts: &[&str]) -> Vec<Script> {
    texts.iter().map(|text| Script::Answer(answer(&[text]))).collect()
}

/// The text of each choice, and how many chunks end it.
fn by_index(frames: &[Value], read: impl Fn(&Value) -> &Value, n: usize) -> Vec<(String, usize)> {
    let mut choices = vec![(String::new(), 0); n];
    for choice in frames.iter().filter_map(|frame| frame["choices"].get(0)) {
        let index = usize::try_from(choice["index"].as_u64().expect("an index")).expect("small");
        choices[index].0 += read(choice).as_str().unwrap_or_default();
        choices[index].1 += usize::from(choice["finish_reason"].is_string());
    }
    choices
}

#[test]
fn n_choices_have_seeds_of_their_own_and_the_prompt_counts_once() {
    let (server, engine) = Server::scripted(answers(&["a", "b", "c"]));
    let body = server.post("/v1/chat/completions", &chat(&json!({"n": 3, "seed": 7, "best_of": 3}))).json();
    let choices = body["choices"].as_array().expect("choices");
    let contents: Vec<&Value> = choices.iter().map(|choice| &choice["message"]["content"]).collect();
    assert_eq!(contents, ["a", "b", "c"]);
    assert_eq!(choices.iter().map(|choice| choice["index"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(3), &json!(3)));
    let requests = engine.requests();
    assert_eq!(requests.iter().map(|request| request.seed).collect::<Vec<_>>(), [Some(7), Some(8), Some(9)]);
    assert!(requests.iter().all(|request| request.prompt == Prompt::Tokens(vec![1])), "tokenized once");
}

#[test]
fn streams_of_several_choices_are_merged_by_index() {
    let scripts = || vec![Script::Answer(answer(&["a", "b"])), Script::Answer(answer(&["c", "d"]))];
    let (server, _) = Server::scripted([scripts(), scripts()].into_iter().flatten().collect());
    let options = json!({"n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let frames = server.post("/v1/chat/completions", &chat(&options)).frames();
    let expected = [("ab".to_owned(), 1), ("cd".to_owned(), 1)];
    assert_eq!(by_index(&frames, |choice| &choice["delta"]["content"], 2), expected);
    let last = frames.last().expect("a frame");
    assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(7)));
    let frames = server.post("/v1/completions", &completion(&options)).frames();
    assert_eq!(by_index(&frames, |choice| &choice["text"], 2), expected);
}

#[test]
fn several_prompts_are_answered_prompt_by_prompt() {
    let (server, engine) = Server::scripted(answers(&["a", "b", "c", "d"]));
    let options = json!({"prompt": ["hi", [5, 6]], "n": 2, "max_tokens": 4});
    let body = server.post("/v1/completions", &completion(&options)).json();
    let choices = body["choices"].as_array().expect("choices").iter();
    let choices: Vec<_> = choices.map(|choice| (choice["index"].as_u64(), choice["text"].as_str())).collect();
    assert_eq!(choices, [(Some(0), Some("a")), (Some(1), Some("b")), (Some(2), Some("c")), (Some(3), Some("d"))]);
    assert_eq!((&body["usage"]["prompt_tokens"], &body["usage"]["completion_tokens"]), (&json!(6), &json!(4)));
    let prompts: Vec<Prompt> = engine.requests().into_iter().map(|request| request.prompt).collect();
    let (hi, ids) = (Prompt::Tokens(vec![104, 105]), Prompt::Tokens(vec![5, 6]));
    assert_eq!(prompts, [hi.clone(), hi, ids.clone(), ids]);
}

#[test]
fn the_failure_of_one_choice_fails_the_answer_and_cancels_the_rest() {
    let failing = || {
        vec![
            Script::Hang,
            Script::Answer(vec![text("a"), EngineEvent::Failed(RequestError::Engine("device lost".into()))]),
        ]
    };
    let (server, engine) = Server::scripted([failing(), failing()].into_iter().flatten().collect());
    server.post("/v1/completions", &completion(&json!({"n": 2}))).assert_error(500, &Value::Null, "device lost");
    let frames = server.post("/v1/completions", &completion(&json!({"n": 2, "stream": true}))).frames();
    assert_eq!(frames.last().expect("a frame")["error"]["message"], "device lost");
    eventually("both are cancelled", || engine.cancelled.load(Ordering::SeqCst) == 2);
}

#[test]
fn a_refusal_of_one_choice_takes_back_the_others() {
    let full = Script::Refuse(SubmitError::QueueFull { max_queued_requests: 1 });
    let (server, engine) = Server::scripted(vec![Script::Hang, full]);
    server.post("/v1/chat/completions", &chat(&json!({"n": 2}))).assert_error(429, &Value::Null, "queue of 1");
    eventually("the first is cancelled", || engine.cancelled.load(Ordering::SeqCst) == 1);
}

#[test]
fn echo_puts_the_prompt_in_front() {
    let (server, _) = Server::scripted(answers(&["a", "b", "a", "b"]));
    let options = json!({"prompt": ["x=", [121, 61]], "echo": true});
    let body = server.post("/v1/completions", &completion(&options)).json();
    assert_eq!((&body["choices"][0]["text"], &body["choices"][1]["text"]), (&json!("x=a"), &json!("y=b")));
    let mut streamed = options;
    streamed["stream"] = json!(true);
    let frames = server.post("/v1/completions", &completion(&streamed)).frames();
    let texts = by_index(&frames, |choice| &choice["text"], 2);
    assert_eq!(texts, [("x=a".to_owned(), 1), ("y=b".to_owned(), 1)]);
}

#[test]
fn what_is_asked_reaches_the_engine() {
    let (server, engine) = Server::scripted(Vec::new());
    let options = json!({
        "logit_bias": {"7": -100, "8": 2.5}, "presence_penalty": 1, "frequency_penalty": -0.5, "repetition_penalty": 1,
        "stop_token_ids": [9], "response_format": {"type": "json_object"}, "ignore_eos": true,
        "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "reasoning_effort": "low",
    });
    for path in ["/v1/chat/completions", "/v1/completions"] {
        let mut body = if path.contains("chat") { chat(&options) } else { completion(&options) };
        assert_eq!(server.post(path, &body).status, 200);
        let request = engine.last_request();
        assert_eq!(request.logit_bias, [(7, -100.0), (8, 2.5)]);
        assert_eq!((request.presence_penalty, request.frequency_penalty), (1.0, -0.5));
        assert_eq!(
            (request.stop_token_ids, request.grammar.as_deref(), request.ignore_eos),
            (vec![9], Some(&Grammar::JsonObject), true)
        );
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let named = json!({"name": "answer", "strict": true, "schema": schema});
        body["response_format"] = json!({"type": "json_schema", "json_schema": named});
        assert_eq!(server.post(path, &body).status, 200);
        assert_eq!(engine.last_request().grammar.as_deref(), Some(&Grammar::JsonSchema(schema)));
    }
}
