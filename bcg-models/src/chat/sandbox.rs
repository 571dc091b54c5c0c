//! Templates in bounds: whatever a template says, it ends, and takes a bounded memory.
//!
//! A template is a program that comes with a checkpoint. The template engine counts instructions, but one instruction may
//! double a text, compare two lists that share their parts, or fold constants while it is compiled. So the compiled
//! program is changed: what makes, compares or writes a value asks the [`meter`](super::meter) first. The depth of
//! expressions is bounded by the tokens of the source, and all work is done on a thread with a stack for that.
//!
//! This needs the compiled form, which the engine gives no promise to keep: its version is pinned.

use std::collections::BTreeMap;

use minijinja::machinery::{
    CodeGenerator, Instruction, Instructions, Token, eval, make_string_output, parse, tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{DynObject, Kwargs, Object, ObjectRepr, Rest, ValueKind};
use minijinja::{AutoEscape, Environment, Error, State, Value};

use super::meter::{self, Limits, VALUE_BYTES, beyond, charge, invalid, made, weigh, weigh_text};

/// The most tokens of a chat template's source; more is an error when it is loaded.
pub const TEMPLATE_TOKENS_MAX: usize = 32_768;
/// The most tokens between the braces of one tag of a chat template; more is an error when it is loaded.
pub const TAG_TOKENS_MAX: usize = 2_048;
/// The largest number that a filter or method takes for a width, a count or an indentation.
const NUMBER_MAX: i64 = 10_000;
/// Bytes of stack: for the deepest values and expressions of the limits above.
const STACK_BYTES: usize = 64 << 20;
type Result<T> = std::result::Result<T, Error>;
/// A change of the texts that a template holds itself.
pub(super) type Rewrite<'a> = Option<&'a (dyn Fn(&str) -> String + Sync)>;

/// A namespace of a template: the only thing that it can change. It only knows its place, so none can hold itself.
#[derive(Debug)]
struct Namespace(usize);

impl Object for Namespace {
    fn repr(self: &std::sync::Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &std::sync::Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        meter::with_names(self.0, |names| names.get(key).cloned()).ok()?
    }
}

#[allow(clippy::needless_pass_by_value)] // the signature that template functions have
fn namespace(values: Option<&Value>, named: Kwargs) -> Result<Value> {
    let mut names = BTreeMap::new();
    for (key, value) in pairs(values, &named)? {
        names.insert(key.to_string(), value);
    }
    Ok(Value::from_object(Namespace(meter::add_names(names)?)))
}

/// Keys and values that are given as a map and by name.
fn pairs(values: Option<&Value>, named: &Kwargs) -> Result<Vec<(Value, Value)>> {
    let given = values.and_then(Value::as_object).and_then(DynObject::try_iter_pairs).into_iter().flatten();
    let mut pairs = Vec::new();
    for pair in given {
        charge(4 * VALUE_BYTES)?;
        pairs.push(pair);
    }
    for name in named.args() {
        pairs.push((Value::from(name), named.get(name)?));
    }
    Ok(pairs)
}

/// `{% set namespace.name = value %}`.
fn set(value: &Value, target: &Value, name: &str) -> Result<()> {
    let Some(&Namespace(place)) = target.downcast_object_ref() else {
        return Err(invalid(format!("can only assign to namespaces, not {}", target.kind())));
    };
    charge(2 * VALUE_BYTES + name.len())?;
    meter::with_names(place, |names| drop(names.insert(name.to_owned(), value.clone())))
}

/// The pair for [`Instruction::UnpackList`], which puts it back in the order it came from.
fn back(a: &Value, b: &Value) -> Value {
    Value::from(vec![b.clone(), a.clone()])
}

/// Before `a + b`.
fn before_add(a: &Value, b: &Value) -> Result<Value> {
    charge(a.as_str().map_or(0, str::len) + b.as_str().map_or(0, str::len))?;
    Ok(back(a, b))
}

/// Before `a * b`.
fn before_mul(a: &Value, b: &Value) -> Result<Value> {
    for (value, times) in [(a, b), (b, a)] {
        let bytes = value.as_str().map(str::len).or(value.len().map(|len| len * VALUE_BYTES));
        if let Some(bytes) = bytes {
            charge(bytes.saturating_mul(times.as_usize().unwrap_or(0)))?;
        }
    }
    Ok(back(a, b))
}

/// Before what walks over both values.
fn before_both(a: &Value, b: &Value) -> Result<Value> {
    // A text or number differs from a list at once.
    if a.as_object().is_some() || b.as_object().is_some() {
        weigh(a)?;
        weigh(b)?;
    } else {
        charge(0)?;
    }
    Ok(back(a, b))
}

/// Before `a ~ b`.
fn before_concat(a: &Value, b: &Value) -> Result<Value> {
    weigh_text(a)?;
    weigh_text(b)?;
    Ok(back(a, b))
}

/// Before a loop over a value, and before it is unpacked.
fn before_loop(value: &Value) -> Result<Value> {
    charge(value.len().unwrap_or(0))?;
    Ok(value.clone())
}

/// At each round of a loop, and where an item is looked up: nothing else may look at the clock there.
fn seen(item: &Value) -> Result<Value> {
    charge(0)?;
    Ok(item.clone())
}

/// Charges for a filter, method or function that takes `args` (the first one is what it is applied to).
fn charge_call(name: &str, args: &[Value]) -> Result<()> {
    let texts = || args.iter().filter_map(Value::as_str);
    let is_text = args.iter().all(|value| value.as_object().is_none());
    let cheap = match name {
        "first" | "last" | "get" | "items" | "keys" | "values" => true,
        "startswith" | "endswith" | "find" | "rfind" | "count" => is_text,
        _ => name.starts_with("is"),
    };
    if cheap {
        return charge(VALUE_BYTES);
    }
    let number = args.get(1..).unwrap_or_default().iter().flat_map(numbers).map(i64::abs).max().unwrap_or(0);
    if number > NUMBER_MAX && !["int", "float", "range"].contains(&name) {
        return Err(beyond(format!("asks `{name}` for {number}, where {NUMBER_MAX} is the most")));
    }
    args.iter().try_for_each(weigh)?;
    let number = usize::try_from(number).unwrap_or(0);
    match name {
        "replace" => {
            let texts: Vec<&str> = texts().collect();
            let &[text, from, to, ..] = &texts[..] else { return Ok(()) };
            charge(text.matches(from).count().saturating_mul(to.len()))
        }
        "join" => {
            let (separators, items) = (texts().map(str::len).max(), args.iter().filter_map(Value::len).max());
            charge(separators.unwrap_or(0).saturating_mul(items.unwrap_or(0)))?;
            args.iter().try_for_each(weigh_text)
        }
        "indent" => charge(texts().map(|text| text.lines().count() + 1).sum::<usize>().saturating_mul(number)),
        "format" => charge_format(texts().next().unwrap_or_default(), args),
        "batch" | "slice" => charge(number * VALUE_BYTES),
        "list" | "reverse" | "map" | "select" | "reject" | "selectattr" | "rejectattr" => {
            let names = args.get(1..).unwrap_or_default().iter().filter_map(Value::as_str);
            match names.into_iter().find(|name| name.starts_with(ORIGINAL)) {
                Some(name) => Err(invalid(format!("there is no `{name}`"))),
                None => Ok(()),
            }
        }
        "sort" | "unique" | "groupby" | "min" | "max" | "dictsort" => (0..20).try_for_each(|_| weigh(&args[0])),
        _ if is_text => Ok(()),
        _ => args.iter().try_for_each(weigh_text),
    }
}

/// Charges for a format that may write each argument in each of its fields, as wide as it likes.
fn charge_format(format: &str, args: &[Value]) -> Result<()> {
    let widest = format.split(|c: char| !c.is_ascii_digit()).map(str::len).max().unwrap_or(0);
    if widest > 4 {
        return Err(beyond(format!("asks `format` for a number of {widest} digits, where {NUMBER_MAX} is the most")));
    }
    let left = meter::bytes_left()?;
    args.iter().try_for_each(weigh_text)?;
    let (weight, num_fields) = (left - meter::bytes_left()?, format.matches(['{', '%']).count());
    charge(num_fields.saturating_mul(weight + NUMBER_MAX as usize))
}

/// The integers of an argument, by position or by name.
fn numbers(value: &Value) -> Vec<i64> {
    let is_named = value.is_kwargs();
    let named = value.as_object().filter(|_| is_named).and_then(DynObject::try_iter_pairs).into_iter().flatten();
    named.map(|(_, value)| value).chain([value.clone()]).filter_map(|value| value.as_i64()).collect()
}

fn with_named(mut args: Rest<Value>, named: Kwargs) -> Vec<Value> {
    if named.args().next().is_some() {
        args.push(Value::from(named));
    }
    std::mem::take(&mut *args)
}

/// Stands before the name of what the template engine brings along, which only its metered form calls.
const ORIGINAL: char = '@';

/// Puts a metered form in the place of a filter.
macro_rules! filters {
    ($environment:ident: $($name:literal = $filter:path),* $(,)?) => {$(
        $environment.add_filter(concat!('@', $name), $filter);
        $environment.add_filter($name, |state: &mut State, args: Rest<Value>, named: Kwargs| {
            let args = with_named(args, named);
            charge_call($name, &args)?;
            made(state.apply_filter(concat!('@', $name), &args)?)
        });
    )*};
}

/// Puts a metered form in the place of a test.
macro_rules! tests {
    ($environment:ident: $($name:literal = $test:path),* $(,)?) => {$(
        $environment.add_test(concat!('@', $name), $test);
        $environment.add_test($name, |state: &mut State, args: Rest<Value>| {
            args.iter().try_for_each(weigh)?;
            state.perform_test(concat!('@', $name), &args)
        });
    )*};
}

/// An environment whose filters, tests, functions and methods are metered.
pub(super) fn environment() -> Environment<'static> {
    use minijinja::{filters as f, tests as t};
    let mut environment = Environment::new();
    environment.set_formatter(|out, state, value| {
        weigh_text(value)?;
        minijinja::escape_formatter(out, state, value)
    });
    environment.set_unknown_method_callback(|state, value, method, args| {
        let all: Vec<Value> = std::iter::once(value).chain(args).cloned().collect();
        charge_call(method, &all)?;
        made(minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)?)
    });
    filters!(environment: "upper" = f::upper, "lower" = f::lower, "title" = f::title, "capitalize" = f::capitalize,
        "replace" = f::replace, "dictsort" = f::dictsort, "items" = f::items, "reverse" = f::reverse, "trim" = f::trim,
        "join" = f::join, "split" = f::split, "lines" = f::lines, "round" = f::round, "int" = f::int, "float" = f::float,
        "sum" = f::sum, "min" = f::min, "max" = f::max, "sort" = f::sort, "list" = f::list, "string" = f::string,
        "slice" = f::slice, "batch" = f::batch, "indent" = f::indent, "select" = f::select, "selectattr" = f::selectattr,
        "reject" = f::reject, "rejectattr" = f::rejectattr, "map" = f::map, "groupby" = f::groupby, "unique" = f::unique,
        "first" = f::first, "last" = f::last, "escape" = f::escape, "e" = f::escape, "safe" = f::safe, "format" = f::format);
    tests!(environment: "eq" = t::is_eq, "equalto" = t::is_eq, "==" = t::is_eq, "ne" = t::is_ne, "!=" = t::is_ne,
        "lt" = t::is_lt, "lessthan" = t::is_lt, "<" = t::is_lt, "le" = t::is_le, "<=" = t::is_le, "gt" = t::is_gt,
        "greaterthan" = t::is_gt, ">" = t::is_gt, "ge" = t::is_ge, ">=" = t::is_ge, "in" = t::is_in,
        "startingwith" = t::is_startingwith, "endingwith" = t::is_endingwith);
    for name in ["chain", "zip", "pprint"] {
        environment.remove_filter(name);
    }
    environment.remove_global("debug");
    environment.add_filter("_", |value: Value| value);
    environment.add_function("dict", |values: Option<&Value>, named: Kwargs| {
        made(pairs(values, &named)?.into_iter().collect::<BTreeMap<Value, Value>>().into())
    });
    environment.add_function("namespace", namespace);
    environment.add_function("@set", set);
    environment.add_function("@before_add", before_add);
    environment.add_function("@before_mul", before_mul);
    environment.add_function("@before_both", before_both);
    environment.add_function("@before_concat", before_concat);
    environment.add_function("@before_loop", before_loop);
    environment.add_function("@seen", seen);
    environment.add_function("@made", made);
    environment
}

/// Compiles a template, and changes it so that it asks the meter.
fn compile<'a>(source: &'a str, name: &'a str, rewrite: Rewrite<'_>) -> Result<Instructions<'a>> {
    let ast = parse(source, name, syntax()?)?;
    let mut generator = CodeGenerator::new(name, source);
    generator.compile_stmt(&ast);
    let (compiled, _) = generator.finish();
    let mut metered = Instructions::new(name, source);
    let mut places = Vec::new();
    for at in 0.. {
        let Some(instruction) = compiled.get(at) else { break };
        let line = compiled.get_line(at).and_then(|line| u16::try_from(line).ok()).unwrap_or(0);
        let rewrite = rewrite.filter(|_| !is_looked_for(&compiled, at));
        let added: Vec<u32> =
            steps(instruction, rewrite)?.into_iter().map(|step| metered.add_with_line(step, line)).collect();
        places.push(added[0]);
    }
    let end = metered.add(Instruction::LoadConst(Value::from(())));
    places.push(end);
    for at in 0..=end {
        if let Some(
            Instruction::Jump(target)
            | Instruction::JumpIfFalse(target)
            | Instruction::JumpIfFalseOrPop(target)
            | Instruction::JumpIfTrueOrPop(target)
            | Instruction::Iterate(target)
            | Instruction::BuildMacro(_, target, _),
        ) = metered.get_mut(at)
        {
            *target = places[*target as usize];
        }
    }
    Ok(metered)
}

/// Whether a constant is only searched for in a text, or compared with one: it is not written then.
fn is_looked_for(instructions: &Instructions<'_>, at: u32) -> bool {
    use Instruction as I;
    const SEARCHES: [&str; 9] =
        ["split", "startswith", "endswith", "find", "rfind", "count", "strip", "lstrip", "rstrip"];
    // The values on the stack above the constant.
    let mut above = 0;
    for instruction in (at + 1..).map_while(|at| instructions.get(at)) {
        let taken = match instruction {
            I::Lookup(_) | I::LoadConst(_) => 0,
            I::GetAttr(_) | I::Not | I::Neg => 1,
            I::GetItem | I::Add | I::StringConcat | I::Mul | I::Sub | I::In | I::Eq | I::Ne => 2,
            I::PerformTest(_, Some(num), _) | I::ApplyFilter(_, Some(num), _) => usize::from(*num),
            I::CallMethod(_, Some(num)) | I::CallFunction(_, Some(num)) => usize::from(*num),
            _ => return false,
        };
        if taken <= above {
            above = above - taken + 1;
            continue;
        }
        // The constant is one of the values: the first one is what a filter or a method is applied to.
        let place = taken - 1 - above;
        return match instruction {
            I::In | I::Eq | I::Ne | I::PerformTest(..) => true,
            I::CallMethod("replace", _) | I::ApplyFilter("replace", ..) => place == 1,
            I::CallMethod(name, _) | I::ApplyFilter(name, ..) => place > 0 && SEARCHES.contains(name),
            _ => false,
        };
    }
    false
}

/// What is done in the place of an instruction: at least one step.
fn steps<'a>(instruction: &Instruction<'a>, rewrite: Rewrite<'_>) -> Result<Vec<Instruction<'a>>> {
    use Instruction as I;
    let text = |text: &str| rewrite.map_or_else(|| text.to_owned(), |rewrite| rewrite(text));
    let call = |name, num_args| I::CallFunction(name, Some(num_args));
    let binary = |name| Ok(vec![call(name, 2), I::UnpackList(2), instruction.clone()]);
    let refused = |what: &str| Err(invalid(format!("{what} is not supported in a chat template; write it without")));
    match instruction {
        I::EmitRaw(raw) => Ok(vec![I::LoadConst(Value::from(text(raw))), I::Emit]),
        I::LoadConst(value) => Ok(vec![I::LoadConst(rewritten(value, &text))]),
        I::Add => Ok([binary("@before_add")?, vec![call("@made", 1)]].concat()),
        I::Mul => Ok([binary("@before_mul")?, vec![call("@made", 1)]].concat()),
        I::StringConcat => binary("@before_concat"),
        I::Eq | I::Ne | I::Gt | I::Gte | I::Lt | I::Lte | I::In | I::CompareAndPreserve(_) => binary("@before_both"),
        I::BuildList(Some(_)) | I::BuildTuple(Some(_)) | I::BuildMap(_) | I::Slice => {
            Ok(vec![instruction.clone(), call("@made", 1)])
        }
        I::Iterate(_) | I::GetItem => Ok(vec![instruction.clone(), call("@seen", 1)]),
        I::PushLoop(_) | I::UnpackList(_) => Ok(vec![call("@before_loop", 1), instruction.clone()]),
        I::SetAttr(name) => Ok(vec![I::LoadConst(Value::from(*name)), call("@set", 3), I::DiscardTop]),
        I::BuildList(None) | I::BuildTuple(None) | I::UnpackLists(_) | I::MergeKwargs(_) => {
            refused("a call with `*` or `**`")
        }
        I::CallMethod("changed", _) => refused("`loop.changed`"),
        I::PushAutoEscape => refused("`autoescape`"),
        I::Include(_) | I::ExportLocals | I::LoadBlocks | I::CallBlock(_) | I::FastSuper => {
            refused("`include`, `import`, `extends` or `block`")
        }
        other => Ok(vec![other.clone()]),
    }
}

/// A constant with its texts changed.
fn rewritten(value: &Value, text: &dyn Fn(&str) -> String) -> Value {
    if let Some(value) = value.as_str() {
        return Value::from(text(value));
    }
    match value.kind() {
        ValueKind::Seq if !value.is_tuple() => {
            value.try_iter().into_iter().flatten().map(|item| rewritten(&item, text)).collect()
        }
        _ => value.clone(),
    }
}

pub(super) fn syntax() -> Result<SyntaxConfig> {
    SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()
}

/// The source as it is compiled: the left side of each product goes through a filter that changes nothing, because the
/// engine computes products of constants, `'a' * 100000000`, already while it compiles.
///
/// # Errors
/// If the source has too many tokens, or one that is none.
fn without_constant_products(source: &str) -> Result<String> {
    let (mut prepared, mut copied, mut is_operand_due) = (String::with_capacity(source.len()), 0, true);
    let mut tag_tokens = 0;
    for (num, token) in tokenize(source, false, syntax()?).enumerate() {
        let (token, span) = token?;
        if num == TEMPLATE_TOKENS_MAX {
            return Err(invalid(format!("a chat template of more than {TEMPLATE_TOKENS_MAX} tokens")));
        }
        // The work on an expression grows with the square of its operators.
        tag_tokens = if matches!(token, Token::VariableStart | Token::BlockStart) { 0 } else { tag_tokens + 1 };
        if tag_tokens > TAG_TOKENS_MAX {
            return Err(invalid(format!("a tag of more than {TAG_TOKENS_MAX} tokens")));
        }
        if matches!(token, Token::Mul) && !is_operand_due {
            let at = span.start_offset as usize;
            prepared.extend([&source[copied..at], "|_ "]);
            copied = at;
        }
        is_operand_due = matches!(token, Token::ParenOpen | Token::Comma); // `f(*list)` is no product
    }
    prepared.push_str(&source[copied..]);
    Ok(prepared)
}

/// Runs `work` on a thread with a stack for the deepest values and expressions that the limits allow.
///
/// # Errors
/// A message if there is no thread to be had, or if `work` panics.
pub(super) fn on_a_large_stack<T: Send>(work: impl FnOnce() -> T + Send) -> std::result::Result<T, String> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("bcg-chat".into()).stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, work).map_err(|error| format!("there is no thread for it: {error}"))?;
        // minijinja panics in places that messages can reach: 3.0.5 where a template reverses an empty list or text.
        thread.join().map_err(|_| "the template cannot render these messages".to_owned())
    })
}

/// Checks a template and returns it as [`render`] takes it. For a [large stack](on_a_large_stack).
///
/// # Errors
/// The engine's, for a source that is no template; that something in it is not supported.
pub(super) fn prepare(source: &str) -> Result<String> {
    let prepared = without_constant_products(source)?;
    compile(&prepared, "chat", None)?;
    Ok(prepared)
}

/// Renders a template that was [prepared](prepare). For a [large stack](on_a_large_stack).
///
/// # Errors
/// The engine's; that the template needs more than it may.
pub(super) fn render(
    environment: &Environment<'static>,
    limits: Limits,
    prepared: &str,
    context: Value,
    rewrite: Rewrite<'_>,
) -> Result<String> {
    let _meter = meter::start(limits);
    let instructions = compile(prepared, "chat", rewrite)?;
    let (blocks, mut text) = (BTreeMap::new(), String::new());
    let mut out = make_string_output(&mut text);
    eval(environment, &instructions, context, &blocks, &mut out, AutoEscape::None).map(drop)?;
    Ok(text)
}
