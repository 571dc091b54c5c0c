//! What a request asks of the logits before a token is chosen: a bias, penalties for what the answer holds already, and a
//! grammar.
//!
//! All of it reaches the device as a list of additions and a mask. Penalties and a grammar depend on the token before, so
//! a sequence with one of them waits for it ([`Choice::waits_for_tokens`]) instead of running a step ahead.
//!
//! Penalties are OpenAI's: a token that the answer holds `n > 0` times loses `n * frequency + presence`.

use std::collections::HashMap;

use super::guide::Guide;

/// How one request's next token is constrained.
#[derive(Debug, Default)]
pub struct Choice {
    presence_penalty: f32,
    frequency_penalty: f32,
    /// What the client adds, by token.
    constant: HashMap<u32, f32>,
    /// How often the answer holds a token.
    counts: HashMap<u32, u32>,
    guide: Option<Guide>,
    /// What the next step adds, each token once.
    bias: Vec<(u32, f32)>,
    mask: Option<Vec<u32>>,
}

impl Choice {
    /// Makes the choice of a first token. Of a token that `logit_bias` names twice the last value counts.
    ///
    /// # Errors
    /// What the client should know: the grammar's first step is beyond its bounds.
    pub fn new(
        logit_bias: &[(u32, f32)],
        presence_penalty: f32,
        frequency_penalty: f32,
        mut guide: Option<Guide>,
    ) -> Result<Self, String> {
        let constant: HashMap<u32, f32> = logit_bias.iter().copied().collect();
        let mut bias: Vec<(u32, f32)> = constant.iter().map(|(&token, &value)| (token, value)).collect();
        bias.sort_by_key(|(token, _)| *token);
        let mask = guide.as_mut().map(Guide::mask).transpose()?;
        Ok(Self { presence_penalty, frequency_penalty, constant, counts: HashMap::new(), guide, bias, mask })
    }

    /// Whether the next step can be prepared only when the token before is known.
    pub fn waits_for_tokens(&self) -> bool {
        self.has_penalties() || self.guide.is_some()
    }

    /// What is added to the logits of the next step.
    pub fn bias(&self) -> &[(u32, f32)] {
        &self.bias
    }

    /// The tokens that the next step may choose; `None` allows all.
    pub fn mask(&self) -> Option<&[u32]> {
        self.mask.as_deref()
    }

    /// Takes the token that was chosen, and prepares the choice of the next one.
    ///
    /// # Errors
    /// What the client should know: the grammar cannot go on.
    pub fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.has_penalties() {
            *self.counts.entry(token).or_default() += 1;
            let penalty = self.presence_penalty + self.frequency_penalty * self.counts[&token] as f32;
            let value = self.constant.get(&token).unwrap_or(&0.0) - penalty;
            match self.bias.binary_search_by_key(&token, |(token, _)| *token) {
                Ok(at) => self.bias[at].1 = value,
                Err(at) => self.bias.insert(at, (token, value)),
            }
        }
        if let Some(guide) = &mut self.guide {
            guide.accept(token)?;
            self.mask = Some(guide.mask()?);
        }
        Ok(())
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
        let mut choice = Choice::new(&[(9, 1.0), (3, -2.0), (9, 4.0)], 0.0, 0.0, None).expect("no grammar");
        assert!(!choice.waits_for_tokens());
        choice.accept(3).expect("no grammar");
        assert_eq!((choice.bias(), choice.mask()), (&[(3, -2.0), (9, 4.0)][..], None));
    }

    #[test]
    fn penalties_grow_with_what_the_answer_holds_and_add_to_the_bias() {
        let mut choice = Choice::new(&[(3, 1.0)], 0.5, 0.25, None).expect("no grammar");
        assert!(choice.waits_for_tokens());
        for token in [7, 3, 7] {
            choice.accept(token).expect("no grammar");
        }
        assert_eq!(choice.bias(), [(3, 1.0 - 0.75), (7, -1.0)]);
    }
}
