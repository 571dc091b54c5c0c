//! What a template may use while it renders one conversation: bytes, values and time.
//!
//! A list that holds others is walked when it is made, so none is ever deeper, or larger with all that it shares, than the
//! native code that walks it later can bear.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use minijinja::value::ObjectRepr;
use minijinja::{Error, ErrorKind, Value};

/// The most instructions that a chat template may execute for one conversation; more is an error.
pub const RENDER_INSTRUCTIONS_MAX: u64 = 5_000_000;
/// The most bytes of texts and lists that a chat template may make for one conversation, the prompt included; more is an
/// error.
pub const RENDER_BYTES_MAX: usize = 256 << 20;
/// The longest that a chat template may work on one conversation; longer is an error.
pub const RENDER_TIME_MAX: Duration = Duration::from_secs(10);
/// The most values within values that a chat template may walk over for one conversation; more is an error.
pub const RENDER_VALUES_MAX: usize = 20_000_000;
/// The deepest value that a template may make.
const DEPTH_MAX: usize = 200;
/// What a value takes at least, in bytes.
pub(super) const VALUE_BYTES: usize = 32;
/// Bytes that one byte of a text takes when it is escaped.
const ESCAPED: usize = 6;

type Result<T> = std::result::Result<T, Error>;
/// What one rendering may use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) instructions: u64,
    pub(super) bytes: usize,
    pub(super) values: usize,
    pub(super) time: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            instructions: RENDER_INSTRUCTIONS_MAX,
            bytes: RENDER_BYTES_MAX,
            values: RENDER_VALUES_MAX,
            time: RENDER_TIME_MAX,
        }
    }
}

/// What one rendering may still use.
struct Meter {
    limits: Limits,
    bytes: usize,
    values: usize,
    until: Instant,
    /// The values of the template's namespaces.
    namespaces: Vec<BTreeMap<String, Value>>,
}

thread_local! {
    static METER: RefCell<Option<Meter>> = const { RefCell::new(None) };
}

/// Ends the rendering of this thread when it is dropped.
pub(super) struct Running(());

impl Drop for Running {
    fn drop(&mut self) {
        METER.set(None);
    }
}

/// Starts a rendering on this thread.
pub(super) fn start(limits: Limits) -> Running {
    let until = Instant::now() + limits.time;
    let namespaces = Vec::new();
    METER.set(Some(Meter { limits, bytes: limits.bytes, values: limits.values, until, namespaces }));
    Running(())
}

/// Adds a namespace, and returns its place.
pub(super) fn add_names(names: BTreeMap<String, Value>) -> Result<usize> {
    with_meter(|meter| {
        meter.namespaces.push(names);
        Ok(meter.namespaces.len() - 1)
    })
}

/// Works with the values of the namespace at a place.
pub(super) fn with_names<T>(place: usize, work: impl FnOnce(&mut BTreeMap<String, Value>) -> T) -> Result<T> {
    with_meter(|meter| {
        let names = meter.namespaces.get_mut(place);
        names.map(work).ok_or_else(|| invalid("is a namespace of another rendering"))
    })
}

fn with_meter<T>(work: impl FnOnce(&mut Meter) -> Result<T>) -> Result<T> {
    METER.with_borrow_mut(|meter| work(meter.as_mut().ok_or_else(|| invalid("is used outside of a rendering"))?))
}

pub(super) fn invalid(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// An error of the kind that the engine's own limit has.
pub(super) fn beyond(what: String) -> Error {
    Error::new(ErrorKind::OutOfFuel, what)
}

/// What limit an error is about, to be said of the template: "makes more than …".
pub(super) fn limit(error: &Error) -> Option<String> {
    let of_engine = || "executes more instructions than it may".to_owned();
    (error.kind() == ErrorKind::OutOfFuel).then(|| error.detail().map_or_else(of_engine, str::to_owned))
}

/// Says that the template needs `bytes` more.
pub(super) fn charge(bytes: usize) -> Result<()> {
    with_meter(|meter| {
        if Instant::now() >= meter.until {
            return Err(beyond(format!("works for more than {:?}", meter.limits.time)));
        }
        let left = meter.bytes.checked_sub(bytes);
        let beyond = || beyond(format!("makes more than {} bytes of text and lists", meter.limits.bytes));
        meter.bytes = left.ok_or_else(beyond)?;
        Ok(())
    })
}

/// The bytes that the template may still make.
pub(super) fn bytes_left() -> Result<usize> {
    with_meter(|meter| Ok(meter.bytes))
}

/// Walks over a value and all that it holds. What it shares counts each time.
fn walk(value: &Value, depth: usize, visit: &mut dyn FnMut(&Value) -> Result<()>) -> Result<()> {
    visit(value)?;
    let Some(object) = value.as_object().filter(|object| object.repr() != ObjectRepr::Plain) else { return Ok(()) };
    if depth == DEPTH_MAX {
        return Err(beyond(format!("nests values more than {DEPTH_MAX} deep")));
    }
    let is_map = object.repr() == ObjectRepr::Map;
    for (key, value) in object.try_iter_pairs().into_iter().flatten() {
        if is_map {
            walk(&key, depth + 1, visit)?;
        }
        walk(&value, depth + 1, visit)?;
    }
    Ok(())
}

/// Charges for the bytes of a value and of all that it holds.
pub(super) fn weigh(value: &Value) -> Result<()> {
    walk(value, 0, &mut |value| {
        charge(VALUE_BYTES + value.as_str().map_or(0, str::len) + value.as_bytes().map_or(0, <[u8]>::len))
    })
}

/// Charges for a value as text, as which that of a list is longer than its parts.
pub(super) fn weigh_text(value: &Value) -> Result<()> {
    let times = if value.as_object().is_some() { ESCAPED } else { 1 };
    (0..times).try_for_each(|_| weigh(value))
}

/// Takes what a template made: a list in the place of what would be computed anew at each use, and nothing that is too
/// deep or too large.
pub(super) fn made(value: Value) -> Result<Value> {
    let Some(object) = value.as_object() else {
        charge(VALUE_BYTES + value.as_str().map_or(0, str::len))?;
        return Ok(value);
    };
    let value = if object.repr() == ObjectRepr::Iterable {
        let mut items = Vec::new();
        for item in value.try_iter()?.checked() {
            charge(VALUE_BYTES)?;
            items.push(item?);
        }
        Value::from(items)
    } else {
        value
    };
    charge(VALUE_BYTES * (2 + value.len().unwrap_or(0)))?;
    walk(&value, 0, &mut |_| {
        with_meter(|meter| {
            let left = meter.values.checked_sub(1);
            let beyond = || beyond(format!("walks over more than {} values", meter.limits.values));
            meter.values = left.ok_or_else(beyond)?;
            Ok(())
        })
    })?;
    Ok(value)
}
