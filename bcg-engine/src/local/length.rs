//! Refuses a text that cannot fit before it is turned into tokens as a whole, which takes many times its memory.

use bcg_models::Tokenizer;

use crate::SubmitError;

/// Bytes of a text for each token of the context up to which it is not looked at: texts have three to five bytes a token.
const BYTES_PER_TOKEN: usize = 8;
/// Bytes that are turned into tokens at once to count them.
const PIECE_BYTES: usize = 16 << 10;
/// How many times as many tokens as fit must be counted: cut into pieces, a text has a few tokens more.
const MARGIN: usize = 2;

/// Refuses a text whose pieces have many more tokens than fit. A text that is long and has few tokens, such as white
/// space, is counted to its end and let through.
///
/// # Errors
/// [`SubmitError::PromptTooLong`]; [`SubmitError::Prompt`] if the tokenizer refuses a piece.
pub(super) fn refuse_too_long(tokenizer: &Tokenizer, text: &str, context: usize) -> Result<(), SubmitError> {
    if text.len() <= context.saturating_mul(BYTES_PER_TOKEN) {
        return Ok(());
    }
    let (mut rest, mut tokens) = (text, 0_usize);
    while !rest.is_empty() {
        let (piece, later) = rest.split_at(rest.floor_char_boundary(PIECE_BYTES));
        tokens += tokenizer.encode_content(piece, false).map_err(|error| SubmitError::Prompt(error.to_string()))?.len();
        if tokens > context.saturating_mul(MARGIN) {
            return Err(SubmitError::PromptTooLong { context });
        }
        rest = later;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny-qwen3");
        Tokenizer::load(&dir).expect("the tiny checkpoint has a tokenizer")
    }

    #[test]
    fn what_may_fit_is_let_through_and_what_cannot_is_refused() {
        let tokenizer = tokenizer();
        for unit in ["a b c ", "word", "é→😀", "  \n"] {
            for context in [16, 512] {
                let of = |tokens: usize| {
                    let per_unit = tokenizer.encode(&unit.repeat(100)).expect("ids").len() as f64 / 100.0;
                    unit.repeat((tokens as f64 / per_unit) as usize)
                };
                assert_eq!(refuse_too_long(&tokenizer, &of(context), context), Ok(()), "{unit:?} {context}");
                let long = of(100 * context);
                if long.len() > 8 * context {
                    let refused = Err(SubmitError::PromptTooLong { context });
                    assert_eq!(refuse_too_long(&tokenizer, &long, context), refused, "{unit:?} {context}");
                }
            }
        }
    }
}
