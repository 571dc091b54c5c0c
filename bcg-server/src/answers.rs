//! The choices of one request: several event streams, read as one.
//!
//! Choices are numbered prompt by prompt, as in the OpenAI API: choice `p * n + i` is the `i`-th answer to prompt `p`. One
//! that fails fails them all; dropping [`Answers`] cancels those that still run.

use bcg_engine::{EngineEvent, EventStream, FinishReason, TokenLogprob, Usage};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream, SelectAll};

use crate::error::ApiError;

/// The events of all choices, as they come.
pub(crate) struct Answers(SelectAll<BoxStream<'static, (usize, EngineEvent)>>);

impl std::fmt::Debug for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answers").field("running", &self.0.len()).finish()
    }
}

impl Answers {
    /// Reads these streams; a stream's place is its choice's index.
    pub(crate) fn new(streams: Vec<EventStream>) -> Self {
        let indexed = streams.into_iter().enumerate().map(|(index, events)| {
            let next = move |mut events: EventStream| async move { Some(((index, events.next().await?), events)) };
            stream::unfold(events, next).boxed()
        });
        Self(indexed.collect())
    }

    /// Waits for the next event of any choice; `None` after the last one of the last choice.
    pub(crate) async fn next(&mut self) -> Option<(usize, EngineEvent)> {
        self.0.next().await
    }
}

/// One choice, so far or complete.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Answer {
    pub(crate) text: String,
    pub(crate) tokens: Vec<u32>,
    pub(crate) logprobs: Vec<TokenLogprob>,
    pub(crate) reason: FinishReason,
    pub(crate) usage: Usage,
}

impl Default for Answer {
    /// Nothing yet.
    fn default() -> Self {
        let (reason, usage) = (FinishReason::Length, Usage::default());
        Self { text: String::new(), tokens: Vec::new(), logprobs: Vec::new(), reason, usage }
    }
}

impl Answer {
    /// Takes the next event; [`EngineEvent::Failed`] changes nothing.
    pub(crate) fn take(&mut self, event: EngineEvent) {
        match event {
            EngineEvent::Delta(delta) => {
                self.text += &delta.text;
                self.tokens.extend(delta.tokens);
                self.logprobs.extend(delta.logprobs);
            }
            EngineEvent::Finished { reason, usage } => (self.reason, self.usage) = (reason, usage),
            EngineEvent::Failed(_) => {}
        }
    }
}

/// Waits for all choices.
pub(crate) async fn collect(mut answers: Answers) -> Result<Vec<Answer>, ApiError> {
    let mut choices: Vec<Answer> = Vec::new();
    while let Some((index, event)) = answers.next().await {
        if let EngineEvent::Failed(error) = event {
            return Err(error.into());
        }
        choices.resize(choices.len().max(index + 1), Answer::default());
        choices[index].take(event);
    }
    Ok(choices)
}

/// Adds up what the choices cost. A prompt counts once, with the first of its `n` answers.
#[derive(Debug, Clone, Default)]
pub(crate) struct TotalUsage {
    n: usize,
    total: Usage,
}

impl TotalUsage {
    pub(crate) fn new(n: usize) -> Self {
        Self { n, total: Usage::default() }
    }

    pub(crate) fn add(&mut self, index: usize, usage: Usage) {
        if index.is_multiple_of(self.n) {
            self.total.prompt_tokens += usage.prompt_tokens;
            self.total.cached_tokens += usage.cached_tokens;
        }
        self.total.completion_tokens += usage.completion_tokens;
    }

    pub(crate) fn total(&self) -> Usage {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bcg_engine::{Delta, RequestError};
    use tokio::sync::mpsc;

    fn events(events: Vec<EngineEvent>) -> EventStream {
        let (sender, receiver) = mpsc::channel(8);
        for event in events {
            sender.try_send(event).expect("room");
        }
        EventStream::new(receiver)
    }

    fn text(text: &str) -> EngineEvent {
        EngineEvent::Delta(Delta { text: text.into(), tokens: vec![1], logprobs: Vec::new() })
    }

    fn finished() -> EngineEvent {
        let usage = Usage { prompt_tokens: 5, cached_tokens: 3, completion_tokens: 2 };
        EngineEvent::Finished { reason: FinishReason::Stop, usage }
    }

    #[tokio::test]
    async fn each_choice_gets_its_own_events() {
        let streams = vec![events(vec![text("a"), text("b"), finished()]), events(vec![text("c"), finished()])];
        let choices = collect(Answers::new(streams)).await.expect("answers");
        assert_eq!(choices.iter().map(|choice| choice.text.as_str()).collect::<Vec<_>>(), ["ab", "c"]);
        assert!(choices.iter().all(|choice| choice.reason == FinishReason::Stop));
    }

    #[tokio::test]
    async fn one_failure_fails_all_and_cancels_the_rest() {
        let (sender, receiver) = mpsc::channel(8);
        let streams = vec![
            EventStream::new(receiver),
            events(vec![text("a"), EngineEvent::Failed(RequestError::Engine("lost".into()))]),
        ];
        let error = collect(Answers::new(streams)).await.expect_err("a failure");
        assert_eq!(error, ApiError::Engine("lost".into()));
        assert!(sender.is_closed());
    }

    #[test]
    fn a_prompt_is_counted_once() {
        let mut total = TotalUsage::new(2);
        for index in [1, 0, 3, 2] {
            total.add(index, Usage { prompt_tokens: 5, cached_tokens: index, completion_tokens: 2 });
        }
        assert_eq!(total.total(), Usage { prompt_tokens: 10, cached_tokens: 2, completion_tokens: 8 });
    }
}
