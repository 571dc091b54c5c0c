//! Server-sent events: `data: {json}` frames, a last `data: [DONE]`, comments while the model thinks.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event as Frame, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use bcg_engine::EngineEvent;
use futures_util::stream;
use serde_json::Value;

use crate::answers::Answers;
use crate::error::ApiError;

/// Silence after which a comment keeps the connection open.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Turns engine events into the chunks of one route.
pub(crate) trait Chunks: Send + 'static {
    /// Returns what goes out before the first event.
    fn opening(&mut self) -> Vec<Value>;

    /// Returns the chunks of one event of a choice. [`EngineEvent::Failed`] does not come here.
    fn chunks(&mut self, index: usize, event: EngineEvent) -> Vec<Value>;

    /// Returns what goes out when all choices are complete.
    fn closing(&mut self) -> Vec<Value>;
}

struct Stream<C> {
    answers: Answers,
    chunks: C,
    ready: VecDeque<Frame>,
    ended: bool,
}

impl<C: Chunks> Stream<C> {
    fn take(&mut self, event: Option<(usize, EngineEvent)>) {
        match event {
            Some((_, EngineEvent::Failed(error))) => {
                self.ready.push_back(frame(&ApiError::from(error).body()));
                self.end();
            }
            Some((index, event)) => self.ready.extend(self.chunks.chunks(index, event).iter().map(frame)),
            None => {
                self.ready.extend(self.chunks.closing().iter().map(frame));
                self.end();
            }
        }
    }

    fn end(&mut self) {
        self.ready.push_back(Frame::default().data("[DONE]"));
        self.ended = true;
    }
}

fn frame(chunk: &Value) -> Frame {
    Frame::default().data(chunk.to_string())
}

/// Answers with a stream of chunks. When the client goes away the body is dropped, and with it the request.
pub(crate) fn respond<C: Chunks>(answers: Answers, mut chunks: C) -> Response {
    let ready = chunks.opening().iter().map(frame).collect();
    let state = Stream { answers, chunks, ready, ended: false };
    let frames = stream::unfold(state, |mut state| async move {
        loop {
            if let Some(frame) = state.ready.pop_front() {
                return Some((Ok::<_, Infallible>(frame), state));
            }
            if state.ended {
                return None;
            }
            let event = state.answers.next().await;
            state.take(event);
        }
    });
    Sse::new(frames).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::to_bytes;
    use bcg_engine::{Delta, EventStream, FinishReason, RequestError, Usage};
    use serde_json::json;
    use tokio::sync::mpsc;

    struct Plain;

    impl Chunks for Plain {
        fn opening(&mut self) -> Vec<Value> {
            vec![json!({"open": true})]
        }

        fn chunks(&mut self, _index: usize, event: EngineEvent) -> Vec<Value> {
            match event {
                EngineEvent::Delta(delta) => vec![json!({"text": delta.text})],
                _ => vec![json!({"end": true})],
            }
        }

        fn closing(&mut self) -> Vec<Value> {
            vec![json!({"usage": 1})]
        }
    }

    async fn body(events: Vec<EngineEvent>) -> String {
        let (sender, receiver) = mpsc::channel(8);
        for event in events {
            sender.try_send(event).expect("room");
        }
        drop(sender);
        let response = respond(Answers::new(vec![EventStream::new(receiver)]), Plain);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let bytes = to_bytes(response.into_body(), 1 << 20).await.expect("body");
        String::from_utf8(bytes.to_vec()).expect("text")
    }

    #[tokio::test]
    async fn frames_are_data_lines_and_done_comes_last() {
        let delta = EngineEvent::Delta(Delta { text: "a\nb".into(), ..Delta::default() });
        let finished = EngineEvent::Finished { reason: FinishReason::Stop, usage: Usage::default() };
        let expected = "data: {\"open\":true}\n\ndata: {\"text\":\"a\\nb\"}\n\ndata: {\"end\":true}\n\n\
                        data: {\"usage\":1}\n\ndata: [DONE]\n\n";
        assert_eq!(body(vec![delta, finished]).await, expected);
    }

    #[tokio::test]
    async fn a_failure_is_an_error_frame_and_the_stream_still_ends() {
        let text = body(vec![EngineEvent::Failed(RequestError::Engine("device lost".into()))]).await;
        assert!(text.contains("\"message\":\"device lost\""), "{text}");
        assert!(text.ends_with("data: [DONE]\n\n"));
    }

    #[tokio::test]
    async fn an_engine_that_goes_away_does_not_leave_the_client_waiting() {
        let text = body(vec![]).await;
        assert!(text.contains("engine stopped"), "{text}");
        assert!(text.ends_with("data: [DONE]\n\n"));
    }
}
