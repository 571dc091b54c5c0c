//! The answering side of one request: tokens become text, stop strings end it, events leave for the client.

use std::collections::VecDeque;
use std::sync::Arc;

use bcg_models::{SampledToken, TokenStream, Tokenizer};
use tokio::sync::mpsc;

use super::stop::{StopStrings, StopWatch};
use super::{Delta, EngineEvent, FinishReason, RequestError, TokenLogprob, TokenText, Usage};

/// What ends an answer.
#[derive(Debug, Clone)]
pub struct OutputOptions {
    /// Tokens of the prompt, for the usage.
    pub prompt_tokens: usize,
    /// Tokens to generate at most.
    pub max_tokens: usize,
    /// Strings that end the answer.
    pub stop: StopStrings,
    /// Tokens that end the answer; empty to go on past them.
    pub ends: Arc<[u32]>,
    /// Whether log probabilities are reported.
    pub logprobs: bool,
}

/// The answer of one request while it is made.
///
/// Invariants:
/// - it sends at most `max_tokens + 1` events, so a channel of that capacity never makes the worker wait;
/// - what it holds back is bounded: text by the longest stop string, log probabilities by `max_tokens`, as each token has
///   one entry. So an answer that nobody reads takes the memory of one complete answer; the HTTP layer ends it in time.
#[derive(Debug)]
pub struct Output {
    options: OutputOptions,
    tokenizer: Option<Tokenizer>,
    /// `None` without a tokenizer, and at the end.
    stream: Option<TokenStream>,
    watch: StopWatch,
    events: mpsc::Sender<EngineEvent>,
    generated: usize,
    cached_tokens: usize,
    /// Characters of text decoded so far, shown or held back.
    decoded_chars: usize,
    shown_chars: usize,
    held_logprobs: VecDeque<TokenLogprob>,
}

impl Output {
    /// Makes an output and the receiving end of its events. Without a tokenizer there is no text, only tokens.
    pub fn new(tokenizer: Option<&Tokenizer>, options: OutputOptions) -> (Self, mpsc::Receiver<EngineEvent>) {
        let (events, receiver) = mpsc::channel(options.max_tokens + 1);
        let output = Self {
            tokenizer: tokenizer.cloned(),
            stream: tokenizer.map(|tokenizer| tokenizer.stream(true)),
            watch: StopWatch::new(options.stop.clone()),
            events,
            generated: 0,
            cached_tokens: 0,
            decoded_chars: 0,
            shown_chars: 0,
            held_logprobs: VecDeque::new(),
            options,
        };
        (output, receiver)
    }

    /// Returns the tokens that the answer has at most.
    pub fn max_tokens(&self) -> usize {
        self.options.max_tokens
    }

    /// The sending end of its events.
    pub(crate) fn events(&self) -> &mpsc::Sender<EngineEvent> {
        &self.events
    }

    /// Says how many tokens of the prompt the prefix cache held, for the usage.
    pub fn set_cached_tokens(&mut self, cached_tokens: usize) {
        self.cached_tokens = cached_tokens;
    }

    /// Whether nobody listens any more.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Returns how many tokens were generated.
    pub fn num_generated(&self) -> usize {
        self.generated
    }

    /// Takes the next token, sends what may be shown, and says whether the answer is complete.
    ///
    /// # Errors
    /// One line, if the token cannot be decoded; the caller fails the request.
    pub fn push(&mut self, sampled: &SampledToken) -> Result<Option<FinishReason>, String> {
        self.generated += 1;
        let ends = self.options.ends.contains(&sampled.id);
        let mut text = String::new();
        if !ends {
            self.hold_logprob(sampled)?;
            let piece = self.decode(|stream| stream.push(sampled.id).map(Option::unwrap_or_default))?;
            text = self.watch.push(&piece);
        }
        let mut reason = if ends || self.watch.is_stopped() {
            Some(FinishReason::Stop)
        } else if self.generated >= self.options.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        if reason.is_some() && !self.watch.is_stopped() {
            let rest = match self.stream.take() {
                Some(stream) => stream.finish().map_err(|error| error.to_string())?,
                None => String::new(),
            };
            text += &self.watch.push(&rest);
            if self.watch.is_stopped() {
                reason = Some(FinishReason::Stop);
            } else {
                text += &self.watch.finish();
            }
        }
        let all = reason.is_some() && !self.watch.is_stopped();
        self.shown_chars += text.chars().count();
        let logprobs = self.release_logprobs(all);
        self.send(EngineEvent::Delta(Delta { text, tokens: vec![sampled.id], logprobs }));
        if let Some(reason) = reason {
            let usage = Usage {
                prompt_tokens: self.options.prompt_tokens,
                cached_tokens: self.cached_tokens,
                completion_tokens: self.generated,
            };
            self.send(EngineEvent::Finished { reason, usage });
        }
        Ok(reason)
    }

    /// Ends the answer with an error.
    pub fn fail(&self, error: RequestError) {
        self.send(EngineEvent::Failed(error));
    }

    fn send(&self, event: EngineEvent) {
        // A closed channel is a cancelled request: the worker sees it before the next step.
        let _ = self.events.try_send(event);
    }

    fn decode(&mut self, step: impl FnOnce(&mut TokenStream) -> bcg_models::Result<String>) -> Result<String, String> {
        let Some(stream) = &mut self.stream else { return Ok(String::new()) };
        let text = step(stream).map_err(|error| error.to_string())?;
        self.decoded_chars += text.chars().count();
        Ok(text)
    }

    fn hold_logprob(&mut self, sampled: &SampledToken) -> Result<(), String> {
        let Some(tokenizer) = self.tokenizer.as_ref().filter(|_| self.options.logprobs) else { return Ok(()) };
        let text = |id: u32, logprob: f32| match tokenizer.decode(&[id], false) {
            Ok(text) => Ok(TokenText { text, logprob }),
            Err(error) => Err(error.to_string()),
        };
        let token = text(sampled.id, sampled.logprob.unwrap_or(f32::NEG_INFINITY))?;
        let top = sampled.top.iter().map(|&(id, logprob)| text(id, logprob)).collect::<Result<_, _>>()?;
        self.held_logprobs.push_back(TokenLogprob { token, top, text_offset: self.decoded_chars });
        Ok(())
    }

    /// Hands out the entries of tokens whose text has begun to show, or all of them.
    fn release_logprobs(&mut self, all: bool) -> Vec<TokenLogprob> {
        let shown = self.shown_chars;
        let count = self.held_logprobs.iter().take_while(|entry| all || entry.text_offset < shown).count();
        self.held_logprobs.drain(..count).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        Tokenizer::load(&dir).expect("the tiny checkpoint has a tokenizer")
    }

    fn options(max_tokens: usize) -> OutputOptions {
        OutputOptions {
            prompt_tokens: 3,
            max_tokens,
            stop: StopStrings::default(),
            ends: Arc::from([2]),
            logprobs: true,
        }
    }

    fn stop(text: &str) -> StopStrings {
        StopStrings::new(&[text.to_owned()]).expect("a short stop string")
    }

    struct Run {
        text: String,
        reason: Option<FinishReason>,
        logprobs: Vec<TokenLogprob>,
        events: usize,
    }

    fn run(options: OutputOptions, answer: &str, ends: bool) -> Run {
        let tokenizer = tokenizer();
        let mut ids = tokenizer.encode(answer).expect("encodes");
        ids.extend(ends.then_some(2));
        let (mut output, mut receiver) = Output::new(Some(&tokenizer), options);
        for id in ids {
            let sampled = SampledToken { id, logprob: Some(-0.5), top: vec![(id, -0.5)], logits: None };
            if output.push(&sampled).expect("decodes").is_some() {
                break;
            }
        }
        drop(output);
        let mut run = Run { text: String::new(), reason: None, logprobs: Vec::new(), events: 0 };
        while let Some(event) = receiver.blocking_recv() {
            run.events += 1;
            match event {
                EngineEvent::Delta(delta) => {
                    run.text += &delta.text;
                    run.logprobs.extend(delta.logprobs);
                }
                EngineEvent::Finished { reason, .. } => run.reason = Some(reason),
                EngineEvent::Failed(error) => panic!("{error}"),
            }
        }
        run
    }

    #[test]
    fn the_end_token_ends_the_answer_and_is_not_shown() {
        let run = run(options(100), "3+4=7 #### 7", true);
        assert_eq!((run.text.as_str(), run.reason), ("3+4=7 #### 7", Some(FinishReason::Stop)));
        assert_eq!(run.logprobs.iter().map(|entry| entry.token.text.as_str()).collect::<String>(), "3+4=7 #### 7");
    }

    #[test]
    fn max_tokens_end_the_answer_within_the_channels_bound() {
        let run = run(options(4), "123456789", false);
        assert_eq!((run.text.as_str(), run.reason), ("1234", Some(FinishReason::Length)));
        assert_eq!(run.events, 5);
    }

    #[test]
    fn a_stop_string_hides_itself_and_its_log_probabilities() {
        let options = OutputOptions { stop: stop(" ####"), ..options(100) };
        let run = run(options, "3+4=7 #### 7", true);
        assert_eq!((run.text.as_str(), run.reason), ("3+4=7", Some(FinishReason::Stop)));
        assert_eq!(run.logprobs.iter().map(|entry| entry.token.text.as_str()).collect::<String>(), "3+4=7");
    }

    #[test]
    fn text_held_back_for_a_stop_string_is_shown_at_the_end() {
        let options = OutputOptions { stop: stop("7!"), ..options(100) };
        let run = run(options, "3+4=7", true);
        assert_eq!(run.text, "3+4=7");
        assert_eq!(run.logprobs.len(), 5);
        assert_eq!(run.logprobs[4].text_offset, 4);
    }

    #[test]
    fn a_dropped_receiver_is_a_cancelled_request() {
        let (output, receiver) = Output::new(Some(&tokenizer()), options(4));
        assert!(!output.is_cancelled());
        drop(receiver);
        assert!(output.is_cancelled());
    }
}
