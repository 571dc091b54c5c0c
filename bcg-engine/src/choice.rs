//! What a request asks of the logits before a token is chosen: a bias, penalties for what the answer holds already, and a
//! grammar.
//!
//! All of it reaches the device as a list of additions and a mask. Penalties and a grammar depend on the token before, so
//! a sequence with one of them waits for it ([`Choice::waits_for_tokens`]) instead of running a step ahead. A grammar's mask
//! is computed by other threads ([`super::masks`]), and the sequence waits for that as well ([`Choice::is_ready`]).
//!
//! Penalties are OpenAI's: a token that the answer holds `n > 0` times loses `n * frequency + presence`.

use std::collections::HashMap;

use super::masks::Followed;

/// How one request's next token is constrained.
#[derive(Debug, Default)]
pub struct Choice {
    presence_penalty: f32,
    frequency_penalty: f32,
    /// What the client adds, by token.
    constant: HashMap<u32, f32>,
    /// How often the answer holds a token.
    counts: HashMap<u32, u32>,
    grammar: Option<Followed>,
    /// What the next step adds, each token once.
    bias: Vec<(u32, f32)>,
}

impl Choice {
    /// Makes the choice of a first token. Of a token that `logit_bias` names twice the last value counts.
    pub fn new(
        logit_bias: &[(u32, f32)],
        presence_penalty: f32,
        frequency_penalty: f32,
        grammar: Option<Followed>,
    ) -> Self {
        let constant: HashMap<u32, f32> = logit_bias.iter().copied().collect();
        let mut bias: Vec<(u32, f32)> = constant.iter().map(|(&token, &value)| (token, value)).collect();
        bias.sort_by_key(|(token, _)| *token);
        Self { presence_penalty, frequency_penalty, constant, counts: HashMap::new(), grammar, bias }
    }

    /// Whether the next step can be prepared only when the token before is known.
    pub fn waits_for_tokens(&self) -> bool {
        self.has_penalties() || self.has_grammar()
    }

    /// Whether a grammar constrains it, whose next mask takes a while after each token.
    pub fn has_grammar(&self) -> bool {
        self.grammar.is_some()
    }

    /// What is added to the logits of the next step.
    pub fn bias(&self) -> &[(u32, f32)] {
        &self.bias
    }

    /// The tokens that the next step may choose; `None` allows all. True while it [is ready](Self::is_ready).
    pub fn mask(&self) -> Option<&[u32]> {
        self.grammar.as_ref().map(Followed::mask)
    }

    /// Whether the next token can be chosen. It always can without a grammar; with one, whoever computes the mask wakes the
    /// worker when it is there. Never waits.
    ///
    /// # Errors
    /// What the client should know: the grammar cannot go on, or is too costly.
    pub fn is_ready(&mut self) -> Result<bool, String> {
        self.grammar.as_mut().map_or(Ok(true), Followed::is_ready)
    }

    /// Takes the token that was chosen, and prepares the choice of the next one, or lets it be prepared.
    pub fn accept(&mut self, token: u32) {
        if self.has_penalties() {
            *self.counts.entry(token).or_default() += 1;
            let penalty = self.presence_penalty + self.frequency_penalty * self.counts[&token] as f32;
            let value = self.constant.get(&token).unwrap_or(&0.0) - penalty;
            match self.bias.binary_search_by_key(&token, |(token, _)| *token) {
                Ok(at) => self.bias[at].1 = value,
                Err(at) => self.bias.insert(at, (token, value)),
            }
        }
        if let Some(grammar) = &mut self.grammar {
            grammar.accept(token);
        }
    }

    fn has_penalties(&self) -> bool {
        self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_alone_stays_and_waits_for_nothing() {
        let mut choice = Choice::new(&[(9, 1.0), (3, -2.0), (9, 4.0)], 0.0, 0.0, None);
        assert!(!choice.waits_for_tokens());
        choice.accept(3);
        assert_eq!((choice.bias(), choice.mask()), (&[(3, -2.0), (9, 4.0)][..], None));
    }

    #[test]
    fn penalties_grow_with_what_the_answer_holds_and_add_to_the_bias() {
        let mut choice = Choice::new(&[(3, 1.0)], 0.5, 0.25, None);
        assert!(choice.waits_for_tokens());
        for token in [7, 3, 7] {
            choice.accept(token);
        }
        assert_eq!(choice.bias(), [(3, 1.0 - 0.75), (7, -1.0)]);
    }
}
