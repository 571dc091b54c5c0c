//! What is refused before a grammar is compiled: patterns of which a text must match several at once.
//!
//! `allOf` over schemas with a `pattern` or a `format`, and `&` in Lark's notation, intersect patterns. For one step of
//! the intersection the library multiplies the alternatives of all its patterns, and neither its limits nor a cancellation
//! reach into that step: sixty short patterns take it longer than anybody can wait. So both the number of the patterns and
//! the product of their alternatives are bounded here. They are counted in the text, and rather too high than too low.
//!
//! Measured in release: within these bounds no intersection that was tried took more than 0.3 s; beyond them four patterns
//! of forty alternatives took more than 20 s.

use std::collections::{BTreeMap, HashMap};

use serde_json::Value;

use super::Grammar;

/// Patterns at most that a text must match at once.
const PATTERNS_MAX: usize = 3;

/// Product of their alternatives at most.
const ALTERNATIVES_MAX: usize = 100_000;

/// Alternatives that a `format` counts as; the library's own patterns for them have about as many.
const FORMAT_ALTERNATIVES: usize = 10;

/// Checks the intersections of a grammar.
///
/// # Errors
/// What the client should know: there are too many.
pub(crate) fn check(grammar: &Grammar) -> Result<(), String> {
    match grammar {
        Grammar::JsonObject | Grammar::Regex(_) => Ok(()),
        Grammar::JsonSchema(schema) => check_schema(schema),
        Grammar::Lark(text) => check_lark(text),
    }
}

/// Patterns that one text must match: how many, and the product of their alternatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Patterns {
    count: usize,
    alternatives: usize,
}

impl Patterns {
    const NONE: Self = Self { count: 0, alternatives: 1 };

    fn and(self, other: Self) -> Self {
        let alternatives = self.alternatives.saturating_mul(other.alternatives);
        Self { count: self.count.saturating_add(other.count), alternatives }
    }

    fn or(self, other: Self) -> Self {
        Self { count: self.count.max(other.count), alternatives: self.alternatives.max(other.alternatives) }
    }

    fn check(self) -> Result<(), String> {
        let Self { count, alternatives } = self;
        if count > PATTERNS_MAX || (count > 1 && alternatives > ALTERNATIVES_MAX) {
            return Err(format!(
                "a text must match {count} patterns at once, with {alternatives} combinations of their alternatives; it \
                 may be {PATTERNS_MAX} patterns and {ALTERNATIVES_MAX} combinations: use fewer patterns and formats \
                 together in `allOf`, `$ref` or `&`"
            ));
        }
        Ok(())
    }
}

/// What a schema asks of a value, and of the values in it.
#[derive(Debug, Clone)]
struct Asked<'a> {
    here: Patterns,
    /// By property.
    properties: BTreeMap<&'a str, Patterns>,
    /// Of items, and of properties without a name.
    others: Patterns,
}

impl<'a> Asked<'a> {
    const NOTHING: Self = Self { here: Patterns::NONE, properties: BTreeMap::new(), others: Patterns::NONE };

    fn merge(&mut self, other: &Self, combine: fn(Patterns, Patterns) -> Patterns) {
        self.here = combine(self.here, other.here);
        self.others = combine(self.others, other.others);
        for (&name, &patterns) in &other.properties {
            let mine = self.properties.entry(name).or_insert(Patterns::NONE);
            *mine = combine(*mine, patterns);
        }
    }

    /// The most that is asked of one text.
    fn most(&self) -> Patterns {
        let most = self.properties.values().fold(Patterns::NONE, |most, &named| most.or(named));
        self.here.or(most.and(self.others))
    }
}

fn check_schema(schema: &Value) -> Result<(), String> {
    let mut schemas = Schemas { root: schema, known: HashMap::new() };
    schemas.asked(schema).most().check()
}

/// The schemas that others refer to.
struct Schemas<'a> {
    root: &'a Value,
    /// By reference; one that is under way asks nothing more.
    known: HashMap<&'a str, Asked<'a>>,
}

impl<'a> Schemas<'a> {
    fn asked(&mut self, schema: &'a Value) -> Asked<'a> {
        let mut asked = Asked::NOTHING;
        let Value::Object(schema) = schema else { return asked };
        for (key, value) in schema {
            match (key.as_str(), value) {
                ("pattern", Value::String(pattern)) => {
                    asked.here = asked.here.and(Patterns { count: 1, alternatives: alternatives(pattern) });
                }
                ("format", _) => {
                    asked.here = asked.here.and(Patterns { count: 1, alternatives: FORMAT_ALTERNATIVES });
                }
                ("allOf", Value::Array(all)) => {
                    all.iter().for_each(|one| asked.merge(&self.asked(one), Patterns::and));
                }
                ("anyOf" | "oneOf", Value::Array(any)) => {
                    let mut most = Asked::NOTHING;
                    any.iter().for_each(|one| most.merge(&self.asked(one), Patterns::or));
                    asked.merge(&most, Patterns::and);
                }
                ("$ref", Value::String(reference)) => asked.merge(&self.referred(reference), Patterns::and),
                ("properties", Value::Object(properties)) => {
                    for (name, property) in properties {
                        let most = self.asked(property).most();
                        let mine = asked.properties.entry(name).or_insert(Patterns::NONE);
                        *mine = mine.and(most);
                    }
                }
                ("patternProperties", Value::Object(schemas)) => {
                    let most = schemas.values().fold(Patterns::NONE, |most, one| most.or(self.asked(one).most()));
                    asked.others = asked.others.or(most);
                }
                ("prefixItems" | "items", Value::Array(items)) => {
                    let most = items.iter().fold(Patterns::NONE, |most, one| most.or(self.asked(one).most()));
                    asked.others = asked.others.or(most);
                }
                ("items" | "additionalProperties" | "additionalItems", one) => {
                    asked.others = asked.others.or(self.asked(one).most());
                }
                _ => {}
            }
        }
        asked
    }

    fn referred(&mut self, reference: &'a str) -> Asked<'a> {
        if let Some(asked) = self.known.get(reference) {
            return asked.clone();
        }
        self.known.insert(reference, Asked::NOTHING);
        let root = self.root;
        let target = reference.strip_prefix('#').and_then(|pointer| root.pointer(pointer));
        let asked = target.map_or(Asked::NOTHING, |target| self.asked(target));
        self.known.insert(reference, asked.clone());
        asked
    }
}

/// Alternatives of a pattern, each bar counted.
fn alternatives(pattern: &str) -> usize {
    1 + pattern.bytes().filter(|byte| *byte == b'|').count()
}

/// Counts `&` and the alternatives of a whole grammar, as if all of them met in one terminal, and checks its schemas.
fn check_lark(text: &str) -> Result<(), String> {
    let (mut ands, mut bars) = (0_u32, 0);
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            '"' => quoted(rest, '"'),
            '/' if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            '/' => {
                let length = quoted(rest, '/');
                bars += alternatives(&rest[..length]) - 1;
                length
            }
            '%' if rest.starts_with("%json") => "%json".len() + checked_schema(&rest["%json".len()..])?,
            '&' => {
                ands += 1;
                1
            }
            '|' => {
                bars += 1;
                1
            }
            other => other.len_utf8(),
        };
        rest = &rest[length..];
    }
    // A product of numbers with a given sum is greatest if all are equal.
    let alternatives = (bars / (ands as usize + 1) + 1).saturating_pow(ands + 1);
    Patterns { count: ands as usize + 1, alternatives }.check()
}

/// Bytes of a string or a pattern with its delimiters.
fn quoted(text: &str, delimiter: char) -> usize {
    let mut is_escaped = false;
    for (at, char) in text.char_indices().skip(1) {
        if char == delimiter && !is_escaped {
            return at + 1;
        }
        is_escaped = char == '\\' && !is_escaped;
    }
    text.len()
}

/// Checks the schema at the begin of a text and returns its bytes; what is none is left to the compiler.
fn checked_schema(text: &str) -> Result<usize, String> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    match values.next() {
        Some(Ok(schema)) => check_schema(&schema).map(|()| values.byte_offset()),
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema(schema: Value) -> Result<(), String> {
        check(&Grammar::JsonSchema(schema))
    }

    fn lark(text: &str) -> Result<(), String> {
        check(&Grammar::Lark(text.to_owned()))
    }

    fn patterns(count: usize) -> Vec<Value> {
        (0..count).map(|i| json!({"pattern": format!("^.*x.{{{i}}}y.*$")})).collect()
    }

    #[test]
    fn patterns_that_meet_in_one_text_are_counted_however_they_meet() {
        schema(json!({"allOf": patterns(3)})).expect("three");
        let error = schema(json!({"allOf": patterns(4)})).expect_err("four");
        assert!(error.contains("4 patterns at once") && error.contains("may be 3 patterns"), "{error}");
        schema(json!({"allOf": patterns(2), "format": "uuid", "pattern": "a"})).expect_err("beside others");
        let nested = patterns(4).into_iter().reduce(|all, one| json!({"allOf": [all, one]})).expect("some");
        schema(nested).expect_err("one in the other");
        let mut chain: serde_json::Map<String, Value> = (0..4)
            .map(|i| (format!("a{i}"), json!({"pattern": i.to_string(), "$ref": format!("#/$defs/a{}", i + 1)})))
            .collect();
        chain.insert("a4".to_owned(), json!(true));
        schema(json!({"$ref": "#/$defs/a0", "$defs": chain})).expect_err("through references");
        let same: Vec<Value> = patterns(4).into_iter().map(|one| json!({"properties": {"x": one}})).collect();
        schema(json!({"allOf": same})).expect_err("in one property");
        let items: Vec<Value> = patterns(4).into_iter().map(|one| json!({"items": one})).collect();
        schema(json!({"properties": {"list": {"allOf": items}}})).expect_err("in the items of a property");
    }

    #[test]
    fn patterns_of_different_texts_are_not_counted_together() {
        let properties: serde_json::Map<String, Value> =
            (0..300).map(|i| (format!("p{i}"), json!({"type": "string", "format": "date-time"}))).collect();
        schema(json!({"properties": properties})).expect("each is a text of its own");
        let parents: Vec<Value> =
            (0..20).map(|i| json!({"properties": {format!("p{i}"): {"format": "uuid", "pattern": "a|b"}}})).collect();
        schema(json!({"allOf": parents})).expect("of different properties");
        schema(json!({"anyOf": patterns(50)})).expect("one of them is enough");
        schema(json!({"$ref": "#", "pattern": "a"})).expect("a circle");
    }

    #[test]
    fn alternatives_that_multiply_are_bounded() {
        let wide = |bars: usize| json!({"pattern": "a|".repeat(bars)});
        schema(json!({"allOf": [wide(300), wide(300)]})).expect("90,601 combinations");
        schema(json!({"allOf": [wide(400), wide(400)]})).expect_err("160,801 combinations");
        schema(wide(10_000)).expect("alone");
    }

    #[test]
    fn intersections_in_larks_notation_are_counted_and_texts_are_not() {
        lark("start: A\nA: /a/ & /b/ & /c/\n").expect("three");
        lark("start: A\nA: /a/ & B\nB: /b/ & C\nC: /c/ & /d/\n").expect_err("four, through names");
        lark("start: A\nA: \"& & & &\" | /[a&&b]&&&\\/&/ // & & & &\n").expect("no intersection");
        lark(&format!("start: A\nA: /{0}/ & /{0}/ & /{0}/\n", "a|".repeat(60))).expect_err("61³ combinations");
        let all = json!({"allOf": patterns(4)});
        lark(&format!("start: \"<\" s \">\"\ns: %json {all}\n")).expect_err("in a schema");
        lark("start: s\ns: %json {\"type\": \"string\"}\n").expect("a schema");
        lark("start: \"é\" | %json nonsense & \"unfinished").expect("the compiler says what is wrong");
    }
}
