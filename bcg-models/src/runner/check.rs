//! What a batch must be to be run.

use super::{ModelRunner, TOP_LOGPROBS_MAX, num_rows};
use crate::batch::SequenceInput;
use crate::error::{Error, Result};

impl ModelRunner {
    /// Refuses a batch that does not fit, before any of it runs.
    pub(super) fn check(&self, batch: &[SequenceInput<'_>]) -> Result<()> {
        let options = &self.options;
        if !(1..=options.max_running_requests).contains(&batch.len()) {
            return Err(Error::batch("sequences", format!("1 to {}", options.max_running_requests), batch.len()));
        }
        let rows = num_rows(batch);
        if rows > options.chunked_prefill_size {
            return Err(Error::batch("new tokens", format!("at most {}", options.chunked_prefill_size), rows));
        }
        for sequence in batch {
            sequence.sampling.validate()?;
            if sequence.num_new() == 0 {
                return Err(Error::batch("new tokens of a sequence", "at least 1", 0));
            }
            let slots = self.stages.first().inputs.chosen_slots();
            if let Some(token) = sequence.chosen.filter(|&token| slots.slot_of(token).is_none()) {
                let expected = format!("a row of one of the {} steps launched last", self.num_stages());
                return Err(Error::batch("chosen token of a sequence", expected, format!("{token:?}")));
            }
            if sequence.kv_len() > options.context_length {
                let expected = format!("at most {} tokens", options.context_length);
                return Err(Error::batch("length of a sequence", expected, sequence.kv_len()));
            }
            self.check_choice(sequence)?;
            self.check_state(sequence)?;
            self.role.check(sequence)?;
            let wanted = self.pages.pages_for(sequence.kv_len());
            if sequence.pages.len() < wanted {
                return Err(Error::batch("pages of a sequence", format!("at least {wanted}"), sequence.pages.len()));
            }
            if let Some(page) = sequence.pages.iter().find(|&&page| page as usize >= self.pages.num_pages()) {
                return Err(Error::batch("page", format!("below {}", self.pages.num_pages()), page));
            }
            if let Some(token) = sequence.tokens.iter().find(|&&token| token as usize >= self.config.vocab_size) {
                return Err(Error::batch("token", format!("below {}", self.config.vocab_size), token));
            }
        }
        Ok(())
    }

    /// Refuses what cannot be asked of the next token.
    fn check_choice(&self, sequence: &SequenceInput<'_>) -> Result<()> {
        let vocab = self.config.vocab_size;
        if let Some(&count) = sequence.top_logprobs.as_ref().filter(|&&count| count > TOP_LOGPROBS_MAX) {
            return Err(Error::batch("top_logprobs of a sequence", format!("at most {TOP_LOGPROBS_MAX}"), count));
        }
        if let Some((token, _)) = sequence.logit_bias.iter().find(|(token, _)| *token as usize >= vocab) {
            return Err(Error::batch("token of a logit bias", format!("below {vocab}"), token));
        }
        let words = vocab.div_ceil(32);
        match sequence.token_mask.filter(|mask| mask.len() != words) {
            Some(mask) => Err(Error::batch("words of a token mask", words.to_string(), mask.len())),
            None => Ok(()),
        }
    }

    /// Refuses a step that a model with states cannot do: they stand for all tokens up to where the last step ended.
    fn check_state(&self, sequence: &SequenceInput<'_>) -> Result<()> {
        if !self.has_states() {
            return Ok(());
        }
        let Some(state) = sequence.state else {
            return Err(Error::batch("state of a sequence", "that of its lease, for a model with states", "none"));
        };
        let (past_len, held) = (sequence.past_len, state.num_tokens());
        if past_len != 0 && past_len != held {
            let expected = format!("0, or the {held} tokens that its state stands for, which cannot be turned back");
            return Err(Error::batch("past tokens of a sequence", expected, past_len));
        }
        Ok(())
    }
}
