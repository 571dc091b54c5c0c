//! JSON documents that were valid: parts are replaced, removed, renamed, repeated or nested, then bytes are spoiled.

use std::fmt;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::strategy::ValueTree;
use serde_json::{Map, Value, json};

/// A document, and the valid one that it was made from.
#[derive(Clone)]
pub(crate) struct Document {
    /// The number of the valid one.
    pub(crate) origin: usize,
    pub(crate) bytes: Vec<u8>,
}

impl fmt::Debug for Document {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "document {}: {}", self.origin, self.bytes.escape_ascii())
    }
}

/// A change of structure at some node.
#[derive(Debug, Clone)]
enum Change {
    Replace(Value),
    /// Puts a text in the node's place that is a valid number or string, or nearly.
    Raw(&'static str),
    Remove,
    Rename(String),
    /// Gives an object the same key twice.
    Repeat(Value),
    /// Puts the node into so many lists.
    Nest(usize),
    /// Puts a copy of another node in its place.
    Copy(Index),
}

/// A change of bytes at some place.
#[derive(Debug, Clone)]
enum Damage {
    Flip(u8),
    Cut,
    Insert(Vec<u8>),
    /// So many opening brackets.
    Open(usize),
    /// Writes so many bytes a second time.
    Repeat(usize),
    Remove(usize),
}

/// Stands around values that JSON's types cannot spell, and behind keys that are there already; it is not written.
pub(crate) const MARK: char = '\u{1}';

const RAW: &[&str] = &[
    "1e999",
    "-1e999",
    "1e-999",
    "-0",
    "-0.0",
    "123456789012345678901234567890",
    "0.1e1",
    "1E400",
    "NaN",
    "Infinity",
    "-Infinity",
    r#""\ud800""#,
    r#""\udc00\ud800""#,
    r#""\u0000""#,
    r#""\/""#,
    "tru",
    "{}{}",
    "[,]",
    "01",
];

const NUMBERS: &[i64] =
    &[0, 1, -1, 2, 3, 7, 31, 33, 255, 65_536, 1 << 31, (1 << 31) - 1, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 53];

const TEXTS: &[&str] = &[
    "",
    " ",
    "\0",
    "a\0b",
    "\u{feff}",
    "\u{202e}abc",
    "👩\u{200d}👩\u{200d}👧",
    "a\u{300}\u{301}",
    "\u{fffd}\u{10ffff}",
    "ß",
    "İ",
    "{{ messages }}",
    "{% for %}",
    "%Y%",
    "<|im_end|>",
    "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>",
    "<think>",
    "[DONE]",
    "data: x\n\n",
    "../../x",
    "true",
    "null",
    "-1",
    "1e5",
    "{\"a\": [1",
];

/// Makes documents from valid ones.
pub(crate) fn documents(valid: Vec<Value>) -> impl Strategy<Value = Document> {
    let changes = vec((any::<Index>(), change()), 0..5);
    let damages = prop_oneof![4 => Just(Vec::new()), 1 => vec((any::<Index>(), damage()), 1..4)];
    (0..valid.len(), changes, damages).prop_map(move |(origin, changes, damages)| {
        let mut root = valid[origin].clone();
        for (place, change) in &changes {
            apply(&mut root, *place, change);
        }
        let mut bytes = spell(&root).into_bytes();
        for (place, damage) in damages {
            spoil(&mut bytes, place, damage);
        }
        Document { origin, bytes }
    })
}

/// Values of all types, odd ones first.
pub(crate) fn values() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        select(TEXTS).prop_map(str::to_owned),
        any::<String>(),
        (select(TEXTS), 1_usize..3000).prop_map(|(text, times)| text.repeat(times)),
    ];
    let leaf = prop_oneof![
        2 => Just(Value::Null),
        2 => any::<bool>().prop_map(Value::from),
        4 => select(NUMBERS).prop_map(Value::from),
        1 => any::<i64>().prop_map(Value::from),
        1 => any::<u64>().prop_map(Value::from),
        2 => select(&[0.5, 1.0, -0.0, 1e-320, 1e308, -1e308, 1e39, 4e-46][..]).prop_map(Value::from),
        1 => any::<f64>().prop_map(Value::from),
        6 => text.prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 16, 4, |inner| {
        let key = prop_oneof![select(TEXTS).prop_map(str::to_owned), any::<String>()];
        prop_oneof![
            vec(inner.clone(), 0..4).prop_map(Value::from),
            vec((key, inner), 0..4).prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => values().prop_map(Change::Replace),
        2 => select(RAW).prop_map(Change::Raw),
        2 => Just(Change::Remove),
        1 => prop_oneof![select(TEXTS).prop_map(str::to_owned), any::<String>()].prop_map(Change::Rename),
        1 => values().prop_map(Change::Repeat),
        1 => select(&[1_usize, 2, 100, 120, 126, 127, 128, 500][..]).prop_map(Change::Nest),
        2 => any::<Index>().prop_map(Change::Copy),
    ]
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<u8>().prop_map(Damage::Flip),
        Just(Damage::Cut),
        vec(any::<u8>(), 1..8).prop_map(Damage::Insert),
        select(RAW).prop_map(|text| Damage::Insert(text.as_bytes().to_vec())),
        select(&[1_usize, 129, 10_000, 1_000_000][..]).prop_map(Damage::Open),
        (1_usize..200).prop_map(Damage::Repeat),
        (1_usize..200).prop_map(Damage::Remove),
    ]
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(items) => items.iter().map(count).sum(),
        Value::Object(members) => members.values().map(count).sum(),
        _ => 0,
    }
}

/// Calls `f` on what holds node `n` in the order of writing, with its place there; not for node 0, which nothing holds.
fn with_holder(value: &mut Value, n: &mut usize, f: &mut dyn FnMut(&mut Value, usize)) -> bool {
    if *n == 0 {
        return false;
    }
    for place in 0..len(value) {
        *n -= 1;
        if *n == 0 {
            f(value, place);
            return true;
        }
        if with_holder(child(value, place), n, f) {
            return true;
        }
    }
    false
}

fn len(value: &Value) -> usize {
    match value {
        Value::Array(items) => items.len(),
        Value::Object(members) => members.len(),
        _ => 0,
    }
}

fn child(value: &mut Value, place: usize) -> &mut Value {
    match value {
        Value::Array(items) => &mut items[place],
        Value::Object(members) => members.values_mut().nth(place).expect("a member"),
        _ => unreachable!("a leaf holds nothing"),
    }
}

fn apply(root: &mut Value, place: Index, change: &Change) {
    let num = count(root);
    let node = |root: &mut Value, place: Index| -> Value {
        let (mut found, mut n) = (root.clone(), place.index(num));
        with_holder(root, &mut n, &mut |holder, at| found = child(holder, at).clone());
        found
    };
    let new = match change {
        Change::Replace(value) => value.clone(),
        Change::Raw(text) => json!(format!("{MARK}{text}{MARK}")),
        Change::Nest(times) => (0..*times).fold(node(root, place), |value, _| json!([value])),
        Change::Copy(from) => node(root, *from),
        Change::Remove | Change::Rename(_) | Change::Repeat(_) => Value::Null,
    };
    let mut n = place.index(num);
    if n == 0 {
        *root = new;
        return;
    }
    with_holder(root, &mut n, &mut |holder, at| match (change, &mut *holder) {
        (Change::Remove, Value::Array(items)) => drop(items.remove(at)),
        (Change::Remove | Change::Rename(_) | Change::Repeat(_), Value::Object(members)) => {
            *members = with_member_changed(members, at, change);
        }
        _ => *child(holder, at) = new.clone(),
    });
}

fn with_member_changed(members: &Map<String, Value>, at: usize, change: &Change) -> Map<String, Value> {
    let mut changed = Map::new();
    for (place, (key, value)) in members.iter().enumerate() {
        match change {
            Change::Remove if place == at => {}
            Change::Rename(name) if place == at => drop(changed.insert(name.clone(), value.clone())),
            _ => drop(changed.insert(key.clone(), value.clone())),
        }
        if let (Change::Repeat(again), true) = (change, place == at) {
            changed.insert(format!("{key}{MARK}"), again.clone());
        }
    }
    changed
}

/// Writes JSON; what stands between marks as it is, and other marks not at all.
fn spell(root: &Value) -> String {
    let mut text = root.to_string();
    for raw in RAW {
        let quoted = json!(format!("{MARK}{raw}{MARK}")).to_string();
        text = text.replace(&quoted, raw);
    }
    text.replace("\\u0001", "")
}

fn spoil(bytes: &mut Vec<u8>, place: Index, damage: Damage) {
    let at = place.index(bytes.len() + 1);
    let rest = |most: usize| at..bytes.len().min(at + most);
    match damage {
        Damage::Flip(mask) => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= mask;
            }
        }
        Damage::Cut => bytes.truncate(at),
        Damage::Insert(new) => drop(bytes.splice(at..at, new)),
        Damage::Open(times) => drop(bytes.splice(at..at, vec_of(b'[', times))),
        Damage::Repeat(most) => {
            let again = bytes[rest(most)].to_vec();
            bytes.splice(at..at, again);
        }
        Damage::Remove(most) => drop(bytes.drain(rest(most))),
    }
}

fn vec_of(byte: u8, times: usize) -> Vec<u8> {
    [byte].repeat(times)
}

#[test]
fn changes_reach_the_bytes() {
    let changed = |change: Change| {
        let mut root = json!({"a": [1, 2]});
        let runner = &mut proptest::test_runner::TestRunner::deterministic();
        let place = (0..100).map(|_| any::<Index>().new_tree(runner).expect("an index").current());
        let first = place.into_iter().find(|place| place.index(4) == 1).expect("some point to the list");
        apply(&mut root, first, &change);
        spell(&root)
    };
    assert_eq!(changed(Change::Replace(json!(null))), r#"{"a":null}"#);
    assert_eq!(changed(Change::Raw("1e999")), r#"{"a":1e999}"#);
    assert_eq!(changed(Change::Raw(r#""\ud800""#)), r#"{"a":"\ud800"}"#);
    assert_eq!(changed(Change::Remove), "{}");
    assert_eq!(changed(Change::Rename("b".into())), r#"{"b":[1,2]}"#);
    assert_eq!(changed(Change::Repeat(json!(3))), r#"{"a":[1,2],"a":3}"#);
    assert_eq!(changed(Change::Nest(2)), r#"{"a":[[[1,2]]]}"#);
}
