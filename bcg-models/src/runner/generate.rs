//! One prompt, answered token by token: what tests and the command line need. A server batches instead.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use super::{ModelRunner, SampledToken};
use crate::batch::SequenceInput;
use crate::error::{Error, Result};
use crate::sampling::SamplingParams;
use crate::state::PageLease;

/// How one prompt is answered.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct GenerateOptions {
    /// The most tokens of the answer.
    pub max_new_tokens: usize,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Whether the answer goes on after an end-of-sequence token.
    pub ignore_eos: bool,
}

impl GenerateOptions {
    /// Answers of at most `max_new_tokens` tokens, which end at an end-of-sequence token.
    pub fn new(max_new_tokens: usize, sampling: SamplingParams) -> Self {
        Self { max_new_tokens, sampling, ignore_eos: false }
    }
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self::new(128, SamplingParams::greedy())
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// The model ended it with a token that ends texts, or whoever reads the tokens did: a stop string, the callback.
    Stop,
    /// The most tokens that it may have or the context is used up.
    Length,
}

impl FinishReason {
    /// Returns OpenAI's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Generated {
    /// The tokens of the answer, without the end-of-sequence token.
    pub tokens: Vec<u32>,
    /// Why the answer ended.
    pub finish: FinishReason,
    /// The time from the call to the first token.
    pub first_token_time: Duration,
    /// The time from the call to the last token.
    pub total_time: Duration,
}

impl ModelRunner {
    /// Answers one prompt. `on_token` sees each token of the answer and may stop it.
    ///
    /// # Errors
    /// [`Error::Batch`] if the prompt is empty or does not fit the context; [`Error::OutOfPages`]; those of
    /// [`step`](Self::step).
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(&SampledToken) -> ControlFlow<()>,
    ) -> Result<Generated> {
        let room = self.options.context_length.saturating_sub(prompt.len());
        if prompt.is_empty() || room == 0 {
            let expected = format!("1 to {} tokens", self.options.context_length - 1);
            return Err(Error::batch("prompt", expected, prompt.len()));
        }
        let begun = Instant::now();
        let mut lease = self.pages.lease(0)?;
        let mut token = self.prefill(prompt, &mut lease, &options.sampling)?;
        let mut answer = Generated {
            tokens: Vec::new(),
            finish: FinishReason::Length,
            first_token_time: begun.elapsed(),
            total_time: Duration::ZERO,
        };
        let limit = options.max_new_tokens.min(room);
        while answer.tokens.len() < limit {
            if !options.ignore_eos && self.config.eos_token_ids.contains(&token.id) {
                answer.finish = FinishReason::Stop;
                break;
            }
            answer.tokens.push(token.id);
            if on_token(&token).is_break() {
                answer.finish = FinishReason::Stop;
                break;
            }
            if answer.tokens.len() < limit {
                let past_len = prompt.len() + answer.tokens.len() - 1;
                lease.reserve_tokens(past_len + 1)?;
                let num_drawn = answer.tokens.len() as u64;
                token = self.step_one(&[token.id], past_len, &lease, &options.sampling, num_drawn)?;
            }
        }
        answer.total_time = begun.elapsed();
        Ok(answer)
    }

    /// Runs a prompt in steps that fit, and returns the first token of the answer.
    fn prefill(&mut self, prompt: &[u32], lease: &mut PageLease, sampling: &SamplingParams) -> Result<SampledToken> {
        lease.reserve_tokens(prompt.len())?;
        let chunk = self.options.chunked_prefill_size;
        let last = (prompt.len() - 1) / chunk * chunk;
        for first in (0..last).step_by(chunk) {
            self.step_one(&prompt[first..first + chunk], first, lease, sampling, 0)?;
        }
        self.step_one(&prompt[last..], last, lease, sampling, 0)
    }

    fn step_one(
        &mut self,
        tokens: &[u32],
        past_len: usize,
        lease: &PageLease,
        sampling: &SamplingParams,
        num_drawn: u64,
    ) -> Result<SampledToken> {
        let state = lease.state();
        let input = SequenceInput { state, num_drawn, ..SequenceInput::new(tokens, past_len, lease.pages(), sampling) };
        let mut output = self.step(&[input])?;
        Ok(output.tokens.remove(0))
    }
}
