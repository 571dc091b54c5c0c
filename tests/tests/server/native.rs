//! SGLang's own routes and those about the server.

use std::sync::atomic::Ordering;

use bcg_engine::{
    Delta, Engine, EngineEvent, FinishReason, Grammar, Prompt, RequestError, SubmitError, TokenLogprob, TokenText,
    Usage,
};
use serde_json::{Value, json};

use crate::client::{Server, options};
use crate::scripted::{Script, Scripted, answer, text};

#[test]
fn generate_answers_as_sglang_does() {
    let (server, engine) = Server::scripted(vec![Script::Answer(answer(&["Hel", "lo"]))]);
    let params = json!({"max_new_tokens": 9, "temperature": 0.5, "stop": ["x"], "stop_token_ids": [4], "ignore_eos": true,
                        "sampling_seed": 3, "frequency_penalty": 0.5, "regex": ""});
    let body = server.post("/generate", &json!({"text": "hi", "sampling_params": params, "rid": null})).json();
    assert_eq!((&body["text"], &body["output_ids"]), (&json!("Hello"), &json!([1, 1])));
    let meta = &body["meta_info"];
    assert_eq!(
        (&meta["prompt_tokens"], &meta["completion_tokens"], &meta["cached_tokens"]),
        (&json!(2), &json!(2), &json!(1))
    );
    assert_eq!(meta["finish_reason"]["type"], "stop");
    assert!(meta["e2e_latency"].is_number() && meta["id"].is_string(), "{meta}");
    let request = engine.last_request();
    assert_eq!(request.prompt, Prompt::Tokens(vec![104, 105]));
    assert_eq!((request.max_tokens, request.seed, request.ignore_eos), (Some(9), Some(3), true));
    assert_eq!((request.stop, request.stop_token_ids, request.grammar), (vec!["x".to_owned()], vec![4], None));
    server
        .post("/generate", &json!({"input_ids": [5, 6], "sampling_params": {"json_schema": "{\"type\": \"object\"}"}}));
    let request = engine.last_request();
    assert_eq!((request.prompt, request.max_tokens), (Prompt::Tokens(vec![5, 6]), Some(128)));
    assert_eq!(request.grammar.as_deref(), Some(&Grammar::JsonSchema(json!({"type": "object"}))));
}

#[test]
fn generate_streams_the_whole_text_in_every_chunk() {
    let (server, _) = Server::scripted(vec![Script::Answer(answer(&["a", "b"])), Script::Hang]);
    let frames = server.post("/generate", &json!({"text": "hi", "stream": true})).frames();
    let texts: Vec<&Value> = frames.iter().map(|frame| &frame["text"]).collect();
    assert_eq!(texts, ["a", "ab", "ab"]);
    let counts: Vec<&Value> = frames.iter().map(|frame| &frame["meta_info"]["completion_tokens"]).collect();
    assert_eq!(counts, [1, 2, 2]);
    assert!(frames[1]["meta_info"]["finish_reason"].is_null());
    assert_eq!(frames[2]["meta_info"]["finish_reason"]["type"], "stop");
}

#[test]
fn generate_takes_batches() {
    let (server, _) = Server::scripted(["a", "b", "c", "d"].map(|text| Script::Answer(answer(&[text]))).into());
    let body = json!({"text": ["x", "y"], "sampling_params": {"n": 2}});
    let answers = server.post("/generate", &body).json();
    let texts: Vec<&Value> = answers.as_array().expect("a list").iter().map(|answer| &answer["text"]).collect();
    assert_eq!(texts, ["a", "b", "c", "d"]);
    let one = server.post("/generate", &json!({"input_ids": [[1]]})).json();
    assert_eq!(one.as_array().expect("a list").len(), 1);
}

#[test]
fn generate_reports_log_probabilities_of_the_answer() {
    let token = TokenText { text: "a".into(), logprob: -0.5 };
    let logprobs = vec![TokenLogprob { token, top: Vec::new(), text_offset: 0 }];
    let usage = Usage { prompt_tokens: 1, cached_tokens: 0, completion_tokens: 2 };
    let events = vec![
        EngineEvent::Delta(Delta { text: "a".into(), tokens: vec![7], logprobs }),
        EngineEvent::Delta(Delta { tokens: vec![2], ..Delta::default() }),
        EngineEvent::Finished { reason: FinishReason::Length, usage },
    ];
    let (server, _) = Server::scripted(vec![Script::Answer(events)]);
    let meta = server.post("/generate", &json!({"text": "x", "return_logprob": true})).json()["meta_info"].clone();
    assert_eq!(meta["output_token_logprobs"], json!([[-0.5, 7, "a"]]));
    assert_eq!(meta["finish_reason"], json!({"type": "length", "length": 2}));
}

#[test]
fn generate_refuses_by_field() {
    let (server, _) = Server::scripted(Vec::new());
    for (extra, field, needle) in [
        (json!({"input_ids": [1]}), "text", "either"),
        (json!({"sampling_params": 3}), "sampling_params", "invalid type"),
        (json!({"sampling_params": {"max_new_tokens": 0}}), "max_new_tokens", "between 1"),
        (json!({"sampling_params": {"min_new_tokens": 3}}), "min_new_tokens", "set it to 0"),
        (json!({"sampling_params": {"ebnf": "root ::= a"}}), "ebnf", "leave it out"),
        (json!({"sampling_params": {"json_schema": "{"}}), "json_schema", "text of a JSON schema"),
        (json!({"sampling_params": {"json_schema": "{}", "regex": "a"}}), "json_schema", "exclude"),
        (json!({"return_logprob": true, "top_logprobs_num": 2}), "top_logprobs_num", "leave it out"),
        (json!({"return_logprob": true, "logprob_start_len": 0}), "logprob_start_len", "-1"),
        (json!({"lora_path": "x"}), "lora_path", "leave it out"),
        (json!({"image_data": "x"}), "image_data", "leave it out"),
    ] {
        let mut body = json!({"text": "hi"});
        crate::merge(&mut body, &extra);
        server.post("/generate", &body).assert_error(400, &json!(field), needle);
    }
    // What SGLang's benchmark sends.
    let body = json!({"text": "hi", "sampling_params": {"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": true},
                      "stream": true, "lora_path": null, "return_logprob": false, "return_routed_experts": false,
                      "logprob_start_len": -1});
    assert!(!server.post("/generate", &body).frames().is_empty());
}

#[test]
fn text_becomes_tokens_and_tokens_text() {
    let (server, _) = Server::scripted(Vec::new());
    let body = server.post("/tokenize", &json!({"prompt": "hi", "return_token_strs": true})).json();
    let expected = json!({"max_model_len": 100, "token_strs": ["h", "i"], "count": 2, "tokens": [104, 105]});
    assert_eq!(body, expected);
    let body = server.post("/tokenize", &json!({"prompt": ["h", "hi"]})).json();
    assert_eq!((&body["count"], &body["tokens"]), (&json!([1, 2]), &json!([[104], [104, 105]])));
    let messages = json!([{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]);
    assert_eq!(server.post("/tokenize", &json!({"messages": messages})).json()["tokens"], json!([1, 1]));
    let body = server.post("/detokenize", &json!({"tokens": [104, 105]})).json();
    assert_eq!(body, json!({"prompt": "hi", "text": "hi"}));
    let body = server.post("/detokenize", &json!({"tokens": [[104], [105]]})).json();
    assert_eq!(body["text"], json!(["h", "i"]));
    server.post("/tokenize", &json!({})).assert_error(400, &json!("prompt"), "either");
    server.post("/detokenize", &json!({"tokens": "hi"})).assert_error(400, &json!("tokens"), "invalid type");
    server.post("/tokenize", &json!({"prompt": "a", "model": "b"})).assert_error(404, &json!("model"), "scripted");
}

#[test]
fn server_info_is_the_engines_with_the_version() {
    let (server, _) = Server::scripted(Vec::new());
    for path in ["/server_info", "/get_server_info"] {
        let info = server.get(path).json();
        assert_eq!(info["engine"], "scripted");
        assert!(info["version"].is_string(), "{info}");
    }
}

#[test]
fn model_info_names_the_path_of_the_model() {
    let (server, _) = Server::scripted(Vec::new());
    for path in ["/model_info", "/get_model_info"] {
        let info = server.get(path).json();
        assert_eq!((&info["model_path"], &info["is_generation"]), (&json!("somewhere"), &json!(true)));
    }
}

#[test]
fn a_gateway_learns_the_models_name_and_the_load() {
    let (server, engine) = Server::scripted(Vec::new());
    assert_eq!(server.get("/server_info").json()["served_model_name"], "scripted");
    assert_eq!(server.get("/model_info").json()["served_model_name"], "scripted");
    engine.metrics.running.set(2);
    let load = json!([{"dp_rank": 0, "num_reqs": 2, "num_waiting_reqs": 0, "num_tokens": 0}]);
    assert_eq!(server.get("/get_load").json(), load);
}

#[test]
fn what_a_gateway_asks_about_the_server_needs_the_key() {
    let mut options = options();
    options.api_key = vec!["secret".parse().expect("a key")];
    let server = Server::start(Scripted::new(Vec::new()), options);
    for path in ["/server_info", "/model_info", "/get_load", "/health_generate", "/v1/models"] {
        let refused = server.get(path);
        assert_eq!(refused.status, 401, "{path}");
        assert!(!refused.body.contains("somewhere"), "{path}: {}", refused.body);
    }
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_request_for_a_worker_with_a_role_is_refused_on_all_routes() {
    let (server, engine) = Server::scripted(Vec::new());
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, mut body) in [
        ("/generate", json!({"text": "hi"})),
        ("/v1/completions", json!({"prompt": "hi"})),
        ("/v1/chat/completions", json!({"messages": messages})),
    ] {
        crate::merge(&mut body, &json!({"bootstrap_host": "10.0.0.1", "bootstrap_port": 8998, "bootstrap_room": 5}));
        server.post(path, &body).assert_error(400, &json!("bootstrap_room"), "--worker-urls");
    }
    assert!(engine.requests().is_empty());
}

#[test]
fn generate_takes_what_a_gateway_adds() {
    let (server, engine) = Server::scripted(Vec::new());
    let body = json!({"text": "a", "model": null, "sampling_params": {"temperature": 0.0, "max_new_tokens": 4},
                      "return_logprob": true, "return_text_in_logprobs": false, "stream": false, "log_metrics": true,
                      "return_hidden_states": false, "background": false, "no_logs": false, "return_bytes": false,
                      "return_entropy": false});
    assert_eq!(server.post("/generate", &body).json()["text"], "ok");
    assert_eq!(engine.last_request().max_tokens, Some(4));
}

#[test]
fn flush_cache_reaches_the_engine_by_both_methods() {
    let (server, engine) = Server::scripted(Vec::new());
    for method in ["GET", "POST"] {
        engine.flushed.store(false, Ordering::SeqCst);
        assert_eq!(server.send(method, "/flush_cache", "").finish().status, 200);
        assert!(engine.flushed.load(Ordering::SeqCst));
    }
}

#[test]
fn embeddings_are_refused() {
    let (server, _) = Server::scripted(Vec::new());
    server.post("/v1/embeddings", &json!({"input": "a"})).assert_error(400, &Value::Null, "embedding model");
}

#[test]
fn health_generate_asks_the_engine_for_a_token() {
    let failed = Script::Answer(vec![text("a"), EngineEvent::Failed(RequestError::Engine("device lost".into()))]);
    let full = Script::Refuse(SubmitError::QueueFull { max_queued_requests: 1 });
    let (server, engine) = Server::scripted(vec![Script::Answer(answer(&["a"])), failed, full]);
    assert_eq!(server.get("/health_generate").status, 200);
    assert_eq!(engine.last_request().max_tokens, Some(1));
    for reason in ["device lost", "queue of 1"] {
        let response = server.get("/health_generate");
        assert_eq!(response.status, 503);
        assert!(response.json()["reason"].as_str().is_some_and(|told| told.contains(reason)), "{}", response.body);
    }
    let engine = Scripted::new(Vec::new());
    engine.drain();
    let server = Server::start(engine, options());
    assert_eq!(server.get("/health_generate").status, 503);
}
