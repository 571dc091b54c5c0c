//! Sends the requests when they are due, and takes the times of their answers.

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{HeaderValue, Request, header};
use futures_util::future::join_all;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use indicatif::ProgressBar;
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout};

use super::record::Record;
use super::sse::Parser;
use crate::http_client::HttpClient;

/// Bytes of an answer that is no stream.
const ANSWER_BYTES_MAX: usize = 1 << 20;

/// The server under load.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) client: HttpClient,
    /// Without a path.
    pub(super) base: String,
    pub(super) authorization: Option<HeaderValue>,
    /// For a whole answer.
    pub(super) timeout: Duration,
}

/// Writes an error and its causes on one line.
fn with_causes(error: impl Into<anyhow::Error>) -> String {
    format!("{:#}", error.into())
}

/// What matters of a chunk of either route.
#[derive(Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    token_ids: Option<Vec<u32>>,
    #[serde(default)]
    delta: Option<Delta>,
    finish_reason: Option<Value>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
    reasoning_content: Option<String>,
    tool_calls: Option<Value>,
}

#[derive(Deserialize)]
struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

impl Choice {
    /// Whether it brings a part of the answer: a completion's chunk does even if its tokens make no text yet, but not the
    /// one that only says why the answer ended; a chat's chunk with the role alone does not.
    fn is_output(&self) -> bool {
        let given = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        match &self.delta {
            Some(delta) => given(&delta.content) || given(&delta.reasoning_content) || delta.tool_calls.is_some(),
            None => {
                let ids = self.token_ids.as_ref().is_some_and(|ids| !ids.is_empty());
                given(&self.text) || ids || self.finish_reason.is_none()
            }
        }
    }
}

impl Target {
    /// Asks for the name of the first model that is served.
    pub(super) async fn first_model(&self) -> Result<String, String> {
        let request = self.request("/v1/models").body(Full::default()).map_err(text)?;
        let asked = async {
            let response = self.client.send(request).await.map_err(with_causes)?;
            let status = response.status().as_u16();
            let body = read(response.into_body()).await?;
            let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
            let name = answer["data"][0]["id"].as_str().map(str::to_owned);
            name.ok_or_else(|| format!("HTTP {status}: {}", message(&body)))
        };
        timeout(self.timeout, asked).await.map_err(|_| self.too_slow())?
    }

    fn request(&self, path: &str) -> axum::http::request::Builder {
        let request = Request::builder().uri(format!("{}{path}", self.base));
        match &self.authorization {
            Some(value) => request.header(header::AUTHORIZATION, value),
            None => request,
        }
    }

    fn too_slow(&self) -> String {
        format!("no whole answer within --timeout {} s", self.timeout.as_secs_f64())
    }

    /// Sends one request and follows its answer; `began` is when the run did.
    pub(super) async fn ask(&self, path: &str, body: Bytes, began: Instant) -> Record {
        let start = Instant::now();
        let mut record = Record { start: start - began, ..Record::default() };
        let outcome = timeout(self.timeout, self.follow(path, body, start, &mut record)).await;
        record.error = outcome.unwrap_or_else(|_| Err(self.too_slow())).err();
        record.e2e = start.elapsed();
        record
    }

    async fn follow(&self, path: &str, body: Bytes, start: Instant, record: &mut Record) -> Result<(), String> {
        let request = self.request(path).method("POST").header(header::CONTENT_TYPE, "application/json");
        let request = request.body(Full::new(body)).map_err(text)?;
        let response = self.client.send(request).await.map_err(with_causes)?;
        if !response.status().is_success() {
            let status = response.status().as_u16();
            return Err(format!("HTTP {status}: {}", message(&read(response.into_body()).await?)));
        }
        let (mut body, mut parser, mut done) = (response.into_body(), Parser::default(), Ok(false));
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(with_causes)?;
            let at = start.elapsed();
            if let Some(data) = frame.data_ref() {
                parser.feed(data, |event| {
                    if done == Ok(false) {
                        done = note(event, at, record);
                    }
                });
            }
        }
        match done? {
            true => Ok(()),
            false => Err("the stream ended without [DONE]".to_owned()),
        }
    }
}

/// Notes what an event of an answer says, and returns whether it is the last.
fn note(event: &[u8], at: Duration, record: &mut Record) -> Result<bool, String> {
    if event == b"[DONE]" {
        return Ok(true);
    }
    let chunk: Chunk = serde_json::from_slice(event).map_err(|error| format!("a chunk that is no chunk: {error}"))?;
    if chunk.error.is_some() {
        return Err(format!("in the stream: {}", message(event)));
    }
    if chunk.choices.iter().any(Choice::is_output) {
        record.chunk(at);
    }
    if let Some(usage) = chunk.usage {
        (record.input_tokens, record.output_tokens) = (usage.prompt_tokens, Some(usage.completion_tokens));
    }
    Ok(false)
}

async fn read(body: Incoming) -> Result<Bytes, String> {
    Ok(Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(text)?.to_bytes())
}

/// Returns what an error's body says, in OpenAI's shape or any other.
fn message(body: &[u8]) -> String {
    let json: Value = serde_json::from_slice(body).unwrap_or_default();
    let said = [&json["error"]["message"], &json["message"], &json["error"]].into_iter().find_map(Value::as_str);
    let whole = || String::from_utf8_lossy(body).chars().take(200).collect();
    said.map_or_else(whole, str::to_owned)
}

fn text(error: impl Display) -> String {
    error.to_string()
}

/// Sends each body at its arrival, or later where more than `concurrency` would run, and returns the records in order.
/// `began` is the zero of the arrivals.
pub(super) async fn run(
    target: &Arc<Target>,
    path: &'static str,
    requests: Vec<(Duration, Bytes)>,
    concurrency: Option<usize>,
    bar: &ProgressBar,
) -> Vec<Record> {
    let permits = Arc::new(Semaphore::new(concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let began = Instant::now();
    let tasks: Vec<_> = requests
        .into_iter()
        .map(|(arrival, body)| {
            let (target, permits, bar) = (Arc::clone(target), Arc::clone(&permits), bar.clone());
            tokio::spawn(async move {
                sleep_until(began + arrival).await;
                // The semaphore is never closed, and hands permits out in the order of arrival.
                let _permit = permits.acquire().await;
                let record = target.ask(path, body, began).await;
                bar.inc(1);
                record
            })
        })
        .collect();
    let lost = |error| Record { error: Some(format!("the load generator failed: {error}")), ..Record::default() };
    join_all(tasks).await.into_iter().map(|record| record.unwrap_or_else(lost)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(chunk: &str) -> usize {
        let mut record = Record::default();
        assert_eq!(note(chunk.as_bytes(), Duration::from_millis(5), &mut record), Ok(false), "{chunk}");
        record.num_chunks()
    }

    #[test]
    fn only_chunks_with_a_part_of_the_answer_are_timed() {
        for chunk in [
            r#"{"choices": [{"text": "a", "finish_reason": null}]}"#,
            r#"{"choices": [{"text": "", "finish_reason": null}]}"#,
            r#"{"choices": [{"text": "", "token_ids": [3], "finish_reason": "length"}]}"#,
            r#"{"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}"#,
            r#"{"choices": [{"delta": {"reasoning_content": "a"}}]}"#,
            r#"{"choices": [{"delta": {"tool_calls": [{"index": 0}]}}]}"#,
        ] {
            assert_eq!(output(chunk), 1, "{chunk}");
        }
        for chunk in [
            r#"{"choices": [{"text": "", "finish_reason": "stop"}]}"#,
            r#"{"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}"#,
            r#"{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": null}"#,
            r#"{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}}"#,
        ] {
            assert_eq!(output(chunk), 0, "{chunk}");
        }
    }

    #[test]
    fn errors_say_what_the_server_said() {
        let error = note(br#"{"error": {"message": "device lost"}}"#, Duration::ZERO, &mut Record::default());
        assert_eq!(error, Err("in the stream: device lost".to_owned()));
        assert_eq!(message(br#"{"object": "error", "message": "too long"}"#), "too long");
        assert_eq!(message(b"<html>bad gateway"), "<html>bad gateway");
    }
}
