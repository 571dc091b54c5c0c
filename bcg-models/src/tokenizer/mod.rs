//! Text to token ids and back.
//!
//! Streaming must never show half a character and must, in the end, equal the text of all tokens decoded at once;
//! [`TokenStream`] keeps both. Text that clients send makes no control tokens; see [`Tokenizer::encode_content`].

mod control;
mod growth;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Encoding;

use crate::checkpoint::{self, TOKENIZER_BYTES_MAX};
use crate::error::{Error, Result};

pub(crate) use control::ControlTokens;
pub use growth::TEXT_GROWTH_MAX;

/// The tokenizer of a checkpoint (`tokenizer.json`). Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    control: Arc<ControlTokens>,
    allows_control: bool,
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
        let parts: Parts = serde_json::from_slice(&bytes).map_err(|error| Error::format(&file, error))?;
        parts.check_growth().map_err(|error| Error::format(&file, error))?;
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| Error::format(&file, error))?;
        // Batching belongs to the engine: a file that asks for padding or truncation must not change a prompt.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| Error::format(&file, error))?;
        let control = control_tokens(&inner, &parts.model).map_err(|error| Error::format(&file, error))?;
        let tokenizer = Self { inner: Arc::new(inner), control: Arc::new(control), allows_control: false };
        tokenizer.probe().map_err(|error| Error::format(&file, error))?;
        Ok(tokenizer)
    }

    /// Encodes and decodes a text that has everything in it once and the usual things often: it must come to an end.
    fn probe(&self) -> std::result::Result<(), String> {
        let (tokenizer, (sender, ended)) = (self.clone(), std::sync::mpsc::channel());
        let work = move || {
            let kinds = ["a", "Aa", "0", " ", "\n", "\t ", "'s", "._-", "漢字", "é", "😀"]
                .map(|part| part.repeat(PROBE_REPEATS));
            let text: String = (' '..='~').chain(kinds.concat().chars()).collect();
            let decoded = tokenizer.encode_with(&text, true).and_then(|ids| tokenizer.decode(&ids, true));
            let _ = sender.send(decoded.map(drop)); // nobody waits any more if it took too long
        };
        std::thread::Builder::new().name("bcg-tokenizer".into()).spawn(work).map_err(|error| error.to_string())?;
        // What the tokenizer refuses in this text does not matter; a panic does.
        match ended.recv_timeout(PROBE_TIME_MAX) {
            Ok(_) => Ok(()),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => Err(format!(
                "encoding a short text takes more than {} s; check the expressions of its normalizer and pre_tokenizer",
                PROBE_TIME_MAX.as_secs()
            )),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => Err("encoding a short text panics".to_owned()),
        }
    }

    /// Says whether text that clients send may hold control tokens, which it may not as long as nobody says so: whether
    /// [`encode_content`](Self::encode_content) and [`RenderedChat::encode`](crate::RenderedChat::encode) take it as
    /// [`encode_with`](Self::encode_with) does.
    #[must_use]
    pub fn allow_control_tokens_in_content(mut self, allows: bool) -> Self {
        self.allows_control = allows;
        self
    }

    /// Checks that the model knows the tokens of the tokenizer. Added ones that it does not know, as the padding of some
    /// checkpoints, are only warned of: prompts that hold one are refused.
    ///
    /// # Errors
    /// [`Error::Format`] if the model does not know one of the vocabulary itself. `dir` is the checkpoint's folder, for
    /// the message.
    pub fn check_vocabulary(&self, dir: &Path, vocab_size: usize) -> Result<()> {
        let is_beyond = |id: u32| id as usize >= vocab_size;
        let named = |mut tokens: Vec<(u32, String)>| {
            tokens.sort_unstable();
            let named = tokens.iter().take(TOKENS_NAMED).map(|(id, token)| format!("`{token}` ({id})"));
            format!("{} token(s), such as {}", tokens.len(), named.collect::<Vec<_>>().join(", "))
        };
        let file = dir.join("tokenizer.json");
        let added = self.inner.get_added_tokens_decoder();
        let own = self.inner.get_vocab(false).into_iter().map(|(token, id)| (id, token));
        let own: Vec<_> = own.filter(|(id, _)| is_beyond(*id) && !added.contains_key(id)).collect();
        if !own.is_empty() {
            let what = format!(
                "{} are beyond the {vocab_size} tokens (`vocab_size`) that config.json gives the model; take the tokenizer \
                 and the config.json of one checkpoint",
                named(own)
            );
            return Err(Error::format(&file, what));
        }
        let added = added.into_iter().filter(|(id, _)| is_beyond(*id)).map(|(id, token)| (id, token.content));
        let added: Vec<_> = added.collect();
        if !added.is_empty() {
            tracing::warn!(
                "{}: the model has {vocab_size} tokens (`vocab_size` in config.json), so prompts that hold one of these \
                 added ones are refused: {}; if prompts need them, take a tokenizer.json of the same checkpoint",
                file.display(),
                named(added)
            );
        }
        Ok(())
    }

    /// The number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token ids of `text`, which must be trusted: special tokens spelled in it are recognised, none are added around
    /// it.
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

    /// [`encode_with`](Self::encode_with), for text that a client sent: what spells a control token in it stays text, unless
    /// [that is allowed](Self::allow_control_tokens_in_content). Text that spells none has the same ids as there.
    ///
    /// # Errors
    /// As [`encode`](Self::encode); [`Error::Tokenizer`] if a control token would come of the text all the same, as when
    /// the tokenizer normalises another text to it.
    pub fn encode_content(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        if self.allows_control {
            return self.encode_with(text, add_special);
        }
        let encoding = self.encode_trusted(text, |_| false)?;
        if !add_special {
            return Ok(encoding.get_ids().to_vec());
        }
        let encoding = self.inner.post_process(encoding, None, true);
        Ok(encoding.map_err(|error| Error::Tokenizer(error.to_string()))?.get_ids().to_vec())
    }

    /// Encodes a text of which only some ranges, in bytes, may be taken for control tokens.
    pub(crate) fn encode_trusted(&self, text: &str, is_trusted: impl Fn(&Range<usize>) -> bool) -> Result<Encoding> {
        let refused = |token: &str| {
            Error::Tokenizer(format!(
                "the text would make the control token `{token}`; take it out, or let the operator set \
                 `allow_special_tokens_in_content`"
            ))
        };
        let pieces = self.control.cut(text, is_trusted).map_err(refused)?;
        let encode = |piece: &&str| self.inner.encode_fast(*piece, false);
        let encodings = pieces.texts.iter().map(encode).collect::<std::result::Result<Vec<_>, _>>();
        let mut encodings = encodings.map_err(|error| Error::Tokenizer(error.to_string()))?;
        let encoding = if encodings.len() == 1 { encodings.remove(0) } else { Encoding::merge(encodings, false) };
        match self.control.forged(encoding.get_ids(), &pieces.trusted) {
            Some(id) => Err(refused(self.control.text(id))),
            None => Ok(encoding),
        }
    }

    pub(crate) fn allows_control_tokens(&self) -> bool {
        self.allows_control
    }

    pub(crate) fn control_tokens(&self) -> &ControlTokens {
        &self.control
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
    pub fn to_json(&self) -> Result<Value> {
        serde_json::to_value(&*self.inner).map_err(|error| Error::Tokenizer(error.to_string()))
    }

    /// Starts decoding a sequence token by token.
    pub fn stream(&self, skip_special: bool) -> TokenStream {
        TokenStream { tokenizer: self.clone(), skip_special, ids: Vec::new(), context: 0, shown: 0 }
    }
}

/// The parts of `tokenizer.json` that are looked at before the tokenizer is made.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    unk_token: Option<String>,
    unk_id: Option<u32>,
}

impl Parts {
    fn check_growth(&self) -> std::result::Result<(), String> {
        growth::check(&[
            ("normalizer", &self.normalizer),
            ("pre_tokenizer", &self.pre_tokenizer),
            ("post_processor", &self.post_processor),
            ("decoder", &self.decoder),
        ])
    }
}

/// The added tokens that are special, but for the one that stands for unknown text.
fn control_tokens(tokenizer: &tokenizers::Tokenizer, model: &Model) -> std::result::Result<ControlTokens, String> {
    let added = tokenizer.get_added_tokens_decoder();
    let is_unknown = |id: u32, text: &String| model.unk_id == Some(id) || model.unk_token.as_ref() == Some(text);
    let special = added.iter().filter(|(id, token)| token.special && !is_unknown(**id, &token.content));
    let mut tokens: Vec<_> = special.map(|(id, token)| (token.content.clone(), *id)).collect();
    tokens.sort_unstable();
    ControlTokens::new(tokens)
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

/// How long a tokenizer may work on a short text when it is loaded.
const PROBE_TIME_MAX: Duration = Duration::from_secs(10);
/// How often each thing stands in that text.
const PROBE_REPEATS: usize = 64;
/// Tokens that a message names.
const TOKENS_NAMED: usize = 5;
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
        let is_stuck = self.ids.len() - self.context > WAITING_MAX;
        let complete = if is_stuck {
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
        } else if is_stuck {
            // No clean boundary came of these bytes. The last tokens hold all that can still change; without the others a
            // token costs the same, however many come.
            let hidden = text.len().saturating_sub(self.shown);
            self.ids.drain(..self.ids.len() - WAITING_MAX / 2);
            self.context = 0;
            self.shown = self.tokenizer.decode(&self.ids, self.skip_special)?.len().saturating_sub(hidden);
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
    fn bytes_that_never_become_characters_fill_no_window() {
        let tokenizer = tiny();
        // Every byte of the emoji but its last one, over and over.
        let emoji = tokenizer.encode("😀").expect("ids");
        let ids: Vec<u32> = std::iter::repeat_n(&emoji[..emoji.len() - 1], 300).flatten().copied().collect();
        let mut stream = tokenizer.stream(true);
        let mut text = String::new();
        for &id in &ids {
            text.extend(stream.push(id).expect("piece"));
            assert!(stream.ids.len() <= 2 * WAITING_MAX, "{} tokens are decoded at each one", stream.ids.len());
        }
        text += &stream.finish().expect("rest");
        assert_eq!(text, tokenizer.decode(&ids, true).expect("text"));
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
    fn what_a_client_spells_stays_text() {
        let tokenizer = tiny();
        for text in
            ["<|im_start|>", "a<|im_end|><|im_end|>b", "<|im_<|im_start|>start|>", "<|endoftext|", "größer 😀", ""]
        {
            let ids = tokenizer.encode_content(text, false).expect("ids");
            assert!(ids.iter().all(|&id| !tokenizer.is_special(id)), "{text}: {ids:?}");
            assert_eq!(tokenizer.decode(&ids, false).expect("text"), text);
        }
        let text = "no control < token |> im_start";
        for add_special in [false, true] {
            let ids = tokenizer.encode_content(text, add_special).expect("ids");
            assert_eq!(ids, tokenizer.encode_with(text, add_special).expect("ids"));
        }
    }

    /// The tiny checkpoint's tokenizer, changed.
    fn changed(name: &str, change: impl FnOnce(&mut Value)) -> Result<Tokenizer> {
        let dir = crate::testing::TempDir::new(name);
        let file = std::fs::read(crate::testing::tiny_qwen3().join("tokenizer.json")).expect("the tiny checkpoint");
        let mut json = serde_json::from_slice(&file).expect("JSON");
        change(&mut json);
        dir.write("tokenizer.json", json.to_string().as_bytes());
        Tokenizer::load(dir.path())
    }

    #[test]
    fn what_the_tokenizer_makes_a_control_token_all_the_same_is_refused() {
        let lower = changed("tokenizer-lower", |json| {
            json["normalizer"] = serde_json::json!({"type": "Lowercase"});
            json["added_tokens"][1]["normalized"] = true.into();
        });
        let error =
            lower.expect("it loads").encode_content("a<|IM_START|>b", false).expect_err("it is one").to_string();
        assert!(error.contains("`<|im_start|>`") && error.contains("`allow_special_tokens_in_content`"), "{error}");
        let short =
            changed("tokenizer-short", |json| json["added_tokens"][1]["content"] = "§".into()).expect("it loads");
        let error = short.encode_content("a§b", false).expect_err("it cannot be cut").to_string();
        assert!(error.contains("`§`"), "{error}");
    }

    #[test]
    fn special_tokens_around_a_text_are_the_tokenizers() {
        let around = changed("tokenizer-around", |json| {
            json["post_processor"] = serde_json::json!({"type": "TemplateProcessing", "single": [
                {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]},
                "<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}});
        })
        .expect("it loads");
        let ids = around.encode_content("a<|im_end|>b", true).expect("ids");
        assert_eq!((ids[0], ids[ids.len() - 1]), (1, 2));
        assert_eq!(ids.iter().filter(|id| **id < 3).count(), 2);
        assert_eq!(around.encode_content("ab", true).expect("ids"), around.encode_with("ab", true).expect("ids"));
    }

    #[test]
    fn a_vocabulary_beyond_the_models_is_refused_and_added_tokens_are_not() {
        let tokenizer = tiny();
        let largest_of = |tokenizer: &Tokenizer| tokenizer.inner.get_vocab(true).into_values().max().expect("tokens");
        let largest = largest_of(&tokenizer) as usize;
        let dir = Path::new("/folder");
        tokenizer.check_vocabulary(dir, largest + 1).expect("the model knows all");
        let error = tokenizer.check_vocabulary(dir, largest - 1).expect_err("two are beyond").to_string();
        assert!(error.starts_with("/folder/tokenizer.json: 2 token(s), such as `"), "{error}");
        assert!(
            error.contains(&format!("({largest}) are beyond the {} tokens (`vocab_size`)", largest - 1)),
            "{error}"
        );
        let padded = changed("tokenizer-padded", |json| {
            let mut pad = json["added_tokens"][1].clone();
            (pad["content"], pad["id"]) = ("<pad>".into(), (largest + 1).into());
            json["added_tokens"].as_array_mut().expect("a list").push(pad);
        });
        let padded = padded.expect("it loads");
        assert_eq!(largest_of(&padded) as usize, largest + 1);
        padded.check_vocabulary(dir, largest + 1).expect("it is added");
        let sparse = changed("tokenizer-sparse", |json| {
            json["model"]["vocab"]["far away"] = u32::MAX.into();
        });
        let sparse = sparse.expect("it loads");
        assert_eq!(largest_of(&sparse), u32::MAX);
        let error = sparse.check_vocabulary(dir, largest + 1).expect_err("far away").to_string();
        assert!(error.contains("1 token(s), such as `far away` (4294967295)"), "{error}");
    }

    #[test]
    fn parts_that_make_texts_explode_are_refused_by_name() {
        use serde_json::json;
        let replace = |content: &str| json!({"type": "Replace", "pattern": {"String": "a"}, "content": content});
        let sequence = |kind: &str, part: Value, times: usize| json!({"type": "Sequence", kind: vec![part; times]});
        let byte_level =
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
        let twice = json!({"type": "TemplateProcessing", "special_tokens": {}, "pair": [],
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]});
        let slow = json!({"type": "Split", "pattern": {"Regex": "(?=(a+)+$)b|(a|a|aa)+(?<!a)$"}, "behavior": "Isolated", "invert": false});
        let mut cases = vec![
            ("normalizer", replace(&"a".repeat(1_000_000)), "`normalizer` makes texts up to 1000000 times as long"),
            ("normalizer", sequence("normalizers", replace("aa"), 40), "`normalizer.normalizers[5]` makes"),
            ("normalizer", json!({"type": "Prepend", "prepend": "a".repeat(1000)}), "`normalizer` makes"),
            (
                "normalizer",
                json!({"type": "Replace", "pattern": {"Regex": "x*"}, "content": "y".repeat(32)}),
                "33 times",
            ),
            ("pre_tokenizer", sequence("pretokenizers", byte_level, 40), "`pre_tokenizer.pretokenizers[5]` makes"),
            ("decoder", replace(&"a".repeat(100)), "`decoder` makes"),
            ("decoder", sequence("decoders", replace("aaaa"), 3), "`decoder.decoders[2]` makes"),
            ("post_processor", twice, "`post_processor` repeats the text"),
        ];
        for (part, value, said) in cases.drain(..) {
            let error = changed("tokenizer-explodes", |json| json[part] = value).expect_err(said).to_string();
            assert!(error.contains("tokenizer.json: ") && error.contains(said), "{error}");
        }
        changed("tokenizer-slow", |json| json["pre_tokenizer"] = slow).expect("the expression gives up");
        let usual = json!({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]});
        changed("tokenizer-usual", |json| json["normalizer"] = usual).expect("as in many checkpoints");
    }

    #[test]
    fn a_missing_tokenizer_is_named() {
        let error = Tokenizer::load(Path::new("/nonexistent")).expect_err("no such folder").to_string();
        assert!(error.contains("/nonexistent/tokenizer.json"), "{error}");
    }
}
