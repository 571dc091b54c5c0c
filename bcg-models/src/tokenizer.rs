//! Text to token ids and back.
//!
//! Streaming must never show half a character and must, in the end, equal the text of all tokens decoded at once;
//! [`TokenStream`] keeps both.

use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::{self, TOKENIZER_BYTES_MAX};
use crate::error::{Error, Result};

/// The tokenizer of a checkpoint (`tokenizer.json`). Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish()
    }
}

impl Tokenizer {
    /// Reads `tokenizer.json` from a checkpoint folder.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read, [`Error::Format`] if it is malformed.
    pub fn load(dir: &Path) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        let bytes = checkpoint::read(&file, TOKENIZER_BYTES_MAX)?;
        let mut inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| Error::format(&file, error))?;
        // Batching belongs to the engine: a file that asks for padding or truncation must not change a prompt.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| Error::format(&file, error))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token ids of `text`; special tokens spelled in it are recognised, none are added around it.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.encode_with(text, false)
    }

    /// [`encode`](Self::encode), with the special tokens that the tokenizer puts around a plain prompt if
    /// `add_special`.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_with(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, add_special).map_err(|error| Error::Tokenizer(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, without special tokens if `skip_special`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// The id of a token by its spelling.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The spelling of a token in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether `id` is a special token, which plain text does not show.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_vocabulary()
            .simple_id_to_token(id)
            .is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// The tokenizer as `tokenizer.json` describes it, for libraries that read that format.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a part of it cannot be written as JSON.
    pub fn to_json(&self) -> Result<serde_json::Value> {
        serde_json::to_value(&*self.inner).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// Starts decoding a sequence token by token.
    pub fn stream(&self, skip_special: bool) -> TokenStream {
        TokenStream { tokenizer: self.clone(), skip_special, ids: Vec::new(), context: 0, shown: 0 }
    }
}

/// Decodes a sequence token by token; what it yields, joined, equals the text of all tokens at once.
///
/// A token that ends inside a character yields nothing until the character is complete.
#[derive(Debug, Clone)]
pub struct TokenStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// A window: tokens already shown in full (`context` of them), then tokens not yet shown in full.
    ids: Vec<u32>,
    context: usize,
    /// Bytes of the window's text that were shown.
    shown: usize,
}

/// The replacement character, which decoders put where bytes are not (yet) a character.
const REPLACEMENT: char = '\u{fffd}';
/// Tokens that may wait for a character to become complete; no character has more bytes than half of this.
const WAITING_MAX: usize = 8;

impl TokenStream {
    /// Adds a token and returns the text that became complete.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the decoder fails.
    pub fn push(&mut self, id: u32) -> Result<Option<String>> {
        if self.skip_special && self.tokenizer.is_special(id) {
            return Ok(None);
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let complete = if self.ids.len() - self.context > WAITING_MAX {
            // These bytes never became characters; only the last mark can still change.
            text.strip_suffix(REPLACEMENT).map_or(text.len(), str::len)
        } else {
            text.trim_end_matches(REPLACEMENT).len()
        };
        let fresh = text.get(self.shown..complete).filter(|fresh| !fresh.is_empty()).map(str::to_owned);
        if fresh.is_some() {
            self.shown = complete;
        }
        if complete == text.len() && self.shown == complete {
            // A clean boundary: the tokens before the last clean one are no longer needed as context.
            if self.ids.len() > 1 && fresh.is_some() {
                self.ids.drain(..self.context);
            }
            self.context = self.ids.len();
            self.shown = self.tokenizer.decode(&self.ids, self.skip_special)?.len();
        }
        Ok(fresh)
    }

    /// Ends the sequence and returns what was held back.
    ///
    /// # Errors
    /// As [`push`](Self::push).
    pub fn finish(self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        Ok(text.get(self.shown..).unwrap_or_default().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiny() -> Tokenizer {
        Tokenizer::load(&crate::testing::tiny_qwen3()).expect("the tiny checkpoint's tokenizer")
    }

    fn streamed(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) -> String {
        let mut stream = tokenizer.stream(skip_special);
        let mut text = String::new();
        for &id in ids {
            text.extend(stream.push(id).expect("a decodable token"));
        }
        text + &stream.finish().expect("a decodable rest")
    }

    #[test]
    fn text_survives_a_round_trip() {
        let tokenizer = tiny();
        let text = "Max has 62 shells — “größer” 😀, 漢字\n";
        let ids = tokenizer.encode(text).expect("ids");
        assert_eq!(tokenizer.decode(&ids, true).expect("text"), text);
        assert_eq!(streamed(&tokenizer, &ids, true), text);
    }

    #[test]
    fn a_stream_never_yields_half_a_character() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("a😀b").expect("ids");
        let mut stream = tokenizer.stream(true);
        let pieces: Vec<_> = ids.iter().filter_map(|&id| stream.push(id).expect("piece")).collect();
        assert_eq!(pieces.concat(), "a😀b");
        assert!(pieces.iter().all(|piece| !piece.contains(REPLACEMENT)), "{pieces:?}");
        assert!(ids.len() > pieces.len(), "the emoji takes several tokens");
    }

    #[test]
    fn a_stream_equals_decoding_everything_at_once() {
        let tokenizer = tiny();
        let mut state = 7_u64;
        for round in 0..300 {
            let ids: Vec<u32> = (0..40)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    ((state >> 33) % if round % 2 == 0 { 461 } else { 262 }) as u32
                })
                .collect();
            for skip_special in [true, false] {
                let whole = tokenizer.decode(&ids, skip_special).expect("text");
                assert_eq!(streamed(&tokenizer, &ids, skip_special), whole, "{ids:?}");
            }
        }
    }

    #[test]
    fn special_tokens_are_recognised_and_skipped() {
        let tokenizer = tiny();
        let ids = tokenizer.encode("<|im_start|>x<|im_end|>").expect("ids");
        assert_eq!((ids[0], ids.last()), (1, Some(&2)));
        assert!(tokenizer.is_special(2) && !tokenizer.is_special(ids[1]));
        assert_eq!(streamed(&tokenizer, &ids, true), "x");
        assert_eq!(streamed(&tokenizer, &ids, false), "<|im_start|>x<|im_end|>");
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let error = Tokenizer::load(Path::new("/nonexistent")).expect_err("no such folder").to_string();
        assert!(error.contains("/nonexistent/tokenizer.json"), "{error}");
    }
}
