//! Functions in the prompt, calls in the answer.

use bcg_engine::{Grammar, Prompt};
use serde_json::{Value, json};

use crate::chat;
use crate::client::Server;
use crate::scripted::{Script, answer};

fn tools() -> Value {
    let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
    json!([{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": parameters}}])
}

const PIECES: &[&str] =
    &["Let me see.\n<tool", "_call>\n{\"name\": \"add\", \"argu", "ments\": {\"a\": 1}}\n</tool_", "call>"];

#[test]
fn a_call_is_parsed_back() {
    let (server, engine) = Server::scripted(vec![Script::Answer(answer(PIECES))]);
    let body = server.post("/v1/chat/completions", &chat(&json!({"tools": tools()}))).json();
    let choice = &body["choices"][0];
    assert_eq!(
        (&choice["finish_reason"], &choice["message"]["content"]),
        (&json!("tool_calls"), &json!("Let me see."))
    );
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!((&call["type"], &call["function"]["name"]), (&json!("function"), &json!("add")));
    assert_eq!(call["function"]["arguments"], "{\"a\":1}");
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call-")), "{call}");
    let request = engine.last_request();
    let Prompt::Chat { tools: seen, .. } = request.prompt else { panic!("a conversation") };
    assert_eq!((seen, request.grammar), (tools(), None));
}

#[test]
fn a_streamed_call_never_shows_as_text() {
    let (server, _) = Server::scripted(vec![Script::Answer(answer(PIECES))]);
    let frames = server.post("/v1/chat/completions", &chat(&json!({"tools": tools(), "stream": true}))).frames();
    let deltas: Vec<&Value> = frames.iter().map(|frame| &frame["choices"][0]["delta"]).collect();
    let content: String = deltas.iter().filter_map(|delta| delta["content"].as_str()).collect();
    assert_eq!(content, "Let me see.");
    let calls: Vec<&Value> = deltas.iter().filter_map(|delta| delta["tool_calls"].get(0)).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!((&calls[0]["index"], &calls[0]["function"]["name"]), (&json!(0), &json!("add")));
    assert_eq!(calls[0]["function"]["arguments"], "{\"a\":1}");
    assert_eq!(frames.last().expect("a frame")["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn an_answer_without_calls_stays_text() {
    let (server, _) = Server::scripted(vec![Script::Answer(answer(&["1 <", "tool> 2"])); 2]);
    let body = server.post("/v1/chat/completions", &chat(&json!({"tools": tools()}))).json();
    let message = &body["choices"][0]["message"];
    assert_eq!((&message["content"], message.get("tool_calls")), (&json!("1 <tool> 2"), None));
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let none = server.post("/v1/chat/completions", &chat(&json!({"tools": tools(), "tool_choice": "none"}))).json();
    assert_eq!(none["choices"][0]["message"]["content"], "1 <tool> 2");
}

#[test]
fn a_choice_without_a_choice_is_a_grammar() {
    let (server, engine) = Server::scripted(Vec::new());
    let named = json!({"type": "function", "function": {"name": "add"}});
    for choice in [json!("required"), named] {
        let options = json!({"tools": tools(), "tool_choice": choice, "response_format": {"type": "json_object"}});
        assert_eq!(server.post("/v1/chat/completions", &chat(&options)).status, 200);
        let Some(Grammar::Lark(lark)) = engine.last_request().grammar.as_deref().cloned() else { panic!("a grammar") };
        assert!(lark.contains("tool_call") && lark.contains("add"), "{lark}");
    }
}

#[test]
fn a_conversation_may_hold_calls_and_their_results() {
    let (server, engine) = Server::scripted(Vec::new());
    let call = json!({"id": "call-1", "type": "function", "function": {"name": "add", "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "user", "content": "1 + 0?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call-1", "content": "1"},
    ]);
    assert_eq!(server.post("/v1/chat/completions", &chat(&json!({"messages": messages}))).status, 200);
    let Prompt::Chat { messages, .. } = engine.last_request().prompt else { panic!("a conversation") };
    assert_eq!(messages[1].extra["tool_calls"][0]["function"]["name"], "add");
    assert_eq!((messages[2].role.as_str(), &messages[2].extra["tool_call_id"]), ("tool", &json!("call-1")));
}
