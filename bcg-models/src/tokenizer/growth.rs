//! How much longer than a text its normalised form may be: a `tokenizer.json` can ask for any length.
//!
//! The parts are read before the tokenizer is made, because it normalises its added tokens then. What Unicode fixes (NFKC
//! and its like) is not counted; it makes no text more than a few times as long, and a second pass changes nothing.

use serde_json::Value;

/// The most times as long as its text that the parts of a tokenizer may make what they work on; more is an error when the
/// tokenizer is loaded.
pub const TEXT_GROWTH_MAX: usize = 32;

/// Checks the parts that a `tokenizer.json` names `normalizer` and `pre_tokenizer` together, and each other one.
///
/// # Errors
/// A message that names the part with which the limit is passed.
pub(super) fn check(parts: &[(&str, &Value)]) -> Result<(), String> {
    let (before, after): (Vec<_>, Vec<_>) =
        parts.iter().partition(|(name, _)| ["normalizer", "pre_tokenizer"].contains(name));
    let mut growth = 1;
    for (name, part) in before {
        grow(&mut growth, name, part, true)?;
    }
    after.into_iter().try_for_each(|(name, part)| grow(&mut 1, name, part, false))
}

/// Multiplies the growth by that of a part and of all parts in it. A part is known by its fields, since older files have no
/// `type`. A decoder, and what works on tokens, has bytes where what comes `before` them makes characters of bytes.
fn grow(growth: &mut usize, name: &str, part: &Value, is_before: bool) -> Result<(), String> {
    let Some(fields) = part.as_object() else { return Ok(()) };
    let len = |field: &str| fields.get(field).and_then(Value::as_str).map(str::len);
    let mut times = match (fields.get("pattern"), len("content")) {
        (Some(pattern), Some(content)) => match pattern.get("String").and_then(Value::as_str).map(str::len) {
            Some(pattern @ 1..) => content.div_ceil(pattern).max(1),
            _ => content + 1, // an expression may match nothing, before each byte
        },
        _ => 1,
    };
    times = times.saturating_mul(1 + len("prepend").unwrap_or(0));
    let is_byte_level = fields.get("type").and_then(Value::as_str) == Some("ByteLevel");
    if is_before && (is_byte_level || fields.contains_key("trim_offsets")) {
        times = times.saturating_mul(2);
    }
    if is_before {
        // It also stands before the text.
        times = times.saturating_mul(1 + len("replacement").unwrap_or(0));
    }
    let pieces = fields.get("single").and_then(Value::as_array).into_iter().flatten();
    if pieces.filter(|piece| piece.get("Sequence").is_some()).count() > 1 {
        return Err(format!("`{name}` repeats the text; its `single` may have it once"));
    }
    *growth = growth.saturating_mul(times);
    if *growth > TEXT_GROWTH_MAX {
        return Err(format!(
            "`{name}` makes texts up to {growth} times as long, where {TEXT_GROWTH_MAX} is the most; shorten its replacement"
        ));
    }
    for field in ["normalizers", "pretokenizers", "processors", "decoders"] {
        for (at, part) in fields.get(field).and_then(Value::as_array).into_iter().flatten().enumerate() {
            grow(growth, &format!("{name}.{field}[{at}]"), part, is_before)?;
        }
    }
    Ok(())
}
