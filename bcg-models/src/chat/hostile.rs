//! Templates that want to hang the process, to take its memory, or to end it.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Map, json};

use super::meter::Limits;
use super::{ChatMessage, ChatTemplate};

/// Small ones, because code is slow in tests.
const LIMITS: Limits = Limits { instructions: 300_000, bytes: 16 << 20, values: 300_000, time: Duration::from_secs(5) };

fn load(source: &str) -> crate::Result<ChatTemplate> {
    ChatTemplate::parse(Path::new("/folder/chat_template.jinja"), source, Map::new())
}

fn render(source: &str) -> crate::Result<String> {
    let mut template = load(source)?;
    template.limits = LIMITS;
    template.environment.set_fuel(Some(LIMITS.instructions));
    let call = json!({"function": {"name": "f", "arguments": "{\"a\": [1, 2]}"}});
    let extra = Map::from_iter([("tool_calls".to_owned(), json!([call]))]);
    let messages = [ChatMessage { extra, ..ChatMessage::new("user", "Hi <b>") }];
    template.render(&messages, Some(&json!([{"type": "function"}])), true, &Map::new())
}

/// What the error says, and that it came in time.
#[track_caller]
fn refused(source: &str, said: &str) {
    let began = Instant::now();
    let error = render(source).expect_err(source).to_string();
    assert!(error.contains(said), "{}: {error}", source.chars().take(100).collect::<String>());
    assert!(error.contains("chat_template.jinja"), "{error}");
    assert!(began.elapsed() < 2 * LIMITS.time, "{source}: {:?}", began.elapsed());
}

const BYTES: &str = "makes more than 16777216 bytes of text and lists";
const VALUES: &str = "walks over more than 300000 values";
const DEPTH: &str = "nests values more than 200 deep";

/// A body that is repeated, by nested loops over 100,000 numbers.
fn forever(body: &str) -> String {
    let loops = "{% for i in range(100000) %}".repeat(3);
    format!("{{% set ns = namespace(x='x', l=[1]) %}}{loops}{body}{}", "{% endfor %}".repeat(3))
}

#[test]
fn a_template_that_does_not_end_is_stopped() {
    refused(&forever(""), "executes more instructions than it may");
    refused(&forever("{% set y = 1 + i %}"), "executes more instructions than it may");
    refused(&forever("{% if messages | length == 7 or messages == [7] %}{% endif %}"), "executes more instructions");
    for recursive in [
        "{% macro f() %}{% for i in range(1000) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
        "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    ] {
        let error = render(recursive).expect_err("it never ends").to_string();
        assert!(error.contains("recursion limit exceeded"), "{error}");
    }
}

#[test]
fn a_text_does_not_grow_without_end() {
    for grow in ["ns.x ~ ns.x", "ns.x + ns.x", "ns.x * 2", "ns.x | replace('x', 'xx')", "ns.x.replace('x', 'xx')"] {
        refused(&forever(&format!("{{% set ns.x = {grow} %}}")), BYTES);
    }
    for join in ["[ns.x, ns.x] | join", "ns.x.join([ns.x, ns.x])", "(ns.x ~ '\n' ~ ns.x) | indent(2, true)"] {
        refused(&forever(&format!("{{% set ns.x = {join} %}}")), BYTES);
    }
    refused(&forever("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), BYTES);
    refused(&forever("{% set ns.x %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}"), BYTES);
    refused(&forever(&"raw ".repeat(20_000)), BYTES);
    refused(&forever(&format!("{{{{ '{}' }}}}", "a".repeat(20_000))), BYTES);
    refused(&forever("{% set ns.x = ns.x ~ ([ns.x] * 1000) %}"), BYTES);
    refused(&forever("{% set ns.x = (ns.x ~ 'y') | escape | list | tojson %}"), BYTES);
    refused(&forever("{% set ns.x = ns.x ~ messages | tojson(indent=64) %}"), BYTES);
    refused("{{ raise_exception('x' * 400000000) }}", BYTES);
    refused("{% set x = 'x' * 10000000 %}{{ strftime_now(x) }}{{ x.split('') }}", BYTES);
}

#[test]
fn one_operation_is_bounded() {
    for widest in ["'a\nb' | indent(10000000000)", "[1] | batch(1000000000, 0)", "[1] | slice(1000000000)"] {
        refused(&format!("{{{{ {widest} }}}}"), "where 10000 is the most");
    }
    refused("{{ 'a\nb' | indent(width=10000000000) }}", "where 10000 is the most");
    refused("{{ '%1000000000d' | format(1) }}{{ '{:>1000000000}'.format(1) }}", "where 10000 is the most");
    refused("{{ '{:>1000000000}'.format(1) }}", "where 10000 is the most");
    refused("{{ '{:{}}'.format(1, 1000000000) }}", "where 10000 is the most");
    refused("{{ '{0}{0}{0}{0}'.format('a' * 5000000) }}", BYTES);
    for large in ["'a' * 1000000000", "[0] * 100000000", "(0,) * 100000000", "1000000000 * 'a'"] {
        refused(&format!("{{% set x = {large} %}}"), BYTES);
        refused(&format!("{{{{ ({large}) | length }}}}"), BYTES);
    }
    // Constants are not folded when the template is compiled either.
    let products = "{% set x = 'a' * 99999999 ~ 'a' * 99999999 ~ 'a' * 99999999 %}".repeat(1000);
    let began = Instant::now();
    load(&products).expect("it parses");
    assert!(began.elapsed() < LIMITS.time, "{:?}", began.elapsed());
    refused(&products, BYTES);
    let error = render("{{ range(1000000000) }}").expect_err("too many").to_string();
    assert!(error.contains("range has too many elements"), "{error}");
}

#[test]
fn lists_that_share_their_parts_are_bounded() {
    for grow in ["[ns.l, ns.l]", "{'a': ns.l, 'b': ns.l}", "(ns.l, ns.l)", "[ns.l] * 2", "dict(a=[ns.l], b=[ns.l])"] {
        let error = render(&forever(&format!("{{% set ns.l = {grow} %}}"))).expect_err(grow).to_string();
        assert!(error.contains(VALUES) || error.contains(DEPTH), "{grow}: {error}");
    }
    for grow in ["ns.l + ns.l", "ns.l * 2", "ns.l[:] + ns.l[::-1]"] {
        refused(&forever(&format!("{{% set ns.l = {grow} %}}")), "more than");
    }
    for deep in
        ["[ns.l]", "[ns.l][:]", "{'a': ns.l}.items()", "[[ns.l]] | list", "[ns.l] | map('list')", "[ns.l] | sort"]
    {
        refused(&forever(&format!("{{% set ns.l = {deep} %}}")), DEPTH);
    }
    let wide = "{% set x = 'x' * 10000000 %}{% set l = [x] * 1000 %}";
    for use_ in
        ["l | string", "l == l", "l | tojson", "l ~ ''", "l | join", "x in l", "l | sort", "l is eq(l)", "l | safe"]
    {
        refused(&format!("{wide}{{{{ {use_} }}}}"), BYTES);
    }
}

#[test]
fn a_namespace_that_holds_itself_is_harmless() {
    let source =
        "{% set ns = namespace() %}{% set ns.a = ns %}{% set ns.b = [ns, loop] %}{{ ns.a.a.b | length }}{{ ns }}";
    assert!(render(source).expect("it ends").starts_with('2'));
    let error = render("{% set x = {} %}{% set x.a = 1 %}").expect_err("no namespace").to_string();
    assert!(error.contains("can only assign to namespaces"), "{error}");
}

#[test]
fn deep_sources_are_refused_or_compiled_but_never_end_the_process() {
    for (open, close) in [("(", ")"), ("[", "]"), ("x if y else ", "")] {
        let deep = format!("{{{{ {}1{} }}}}", open.repeat(500), close.repeat(500));
        let error = load(&deep).err().map(|error| error.to_string());
        assert!(error.is_none_or(|error| error.starts_with("/folder/chat_template.jinja: ")), "{open}");
    }
    for part in ["-", "not "] {
        let _ = render(&format!("{{{{ {}1 }}}}", part.repeat(2_000)));
    }
    for part in ["~x", "+1", ".a", "|upper", "[0]", "()", " and x", " == x"] {
        let _ = render(&format!("{{{{ x{} }}}}", part.repeat(1_000)));
    }
    let _ = render(&format!("{{% if x %}}{}{{% endif %}}", "{% elif y %}".repeat(6_000)));
    let _ = render(&format!("{}{}", "{% if x %}".repeat(6_000), "{% endif %}".repeat(6_000)));
    let error = load(&format!("{{{{ x{} }}}}", "~x".repeat(2_000))).expect_err("too many").to_string();
    assert!(error.contains("a tag of more than 2048 tokens"), "{error}");
    let error = load(&"{{ x }}".repeat(20_000)).expect_err("too many").to_string();
    assert!(error.contains("a chat template of more than 32768 tokens"), "{error}");
}

#[test]
fn what_chat_templates_do_not_need_is_refused_when_they_are_loaded() {
    for part in [
        "{% include 'chat' %}",
        "{% import 'chat' as x %}",
        "{% extends 'chat' %}",
        "{% block x %}{% endblock %}",
        "{% autoescape true %}{% endautoescape %}",
        "{% for x in y %}{{ loop.changed(loop) }}{% endfor %}",
        "{{ range(*[1, 2]) }}",
    ] {
        let error = load(part).expect_err(part).to_string();
        assert!(error.contains("chat_template.jinja") && error.contains("is not supported"), "{part}: {error}");
    }
    render("{{ debug() }}").expect_err("it writes all that there is");
    render("{{ [1] | map('@list') }}").expect_err("not for templates");
}

#[test]
fn what_chat_templates_do_still_works() {
    for (source, text) in [
        ("{{ 1 + 2 * 3 - 4 // 2 }}{{ 'a' * 3 }}{{ 2 ** 3 }}{{ [1] + [2] }}", "5aaa8[1, 2]"),
        ("{{ -2 * 3 }}{{ (1, 2) + (3,) }}{{ 'a' ~ 1 ~ none }}", "-6(1, 2, 3)a1None"),
        (
            "{% if 1 < 2 < 3 and 'a' in ['a'] and 'b' not in 'abc' or messages[0].role != 'user' %}y{% else %}n{% endif %}",
            "n",
        ),
        ("{% if 1 < 2 <= 2 %}y{% endif %}{% if 3 > 2 > 2 %}n{% endif %}", "y"),
        (
            "{% for a, b in {'x': 1, 'y': 2}.items() %}{{ loop.index }}{{ a }}{{ b }}{{ loop.last }}{% endfor %}",
            "1x1False2y2True",
        ),
        (
            "{% macro f(a, b=2) %}<{{ a }}{{ b }}{{ caller() if caller else '' }}>{% endmacro %}{{ f(1) }}{% call f(3) %}c{% endcall %}",
            "<12><32c>",
        ),
        (
            "{% set x %}a{% if true %}b{% endif %}{% endset %}{{ x | upper }}{% filter lower %}ABC{% endfilter %}",
            "ABabc",
        ),
        (
            "{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}{{ ns.b is defined }}",
            "4False",
        ),
        ("{% for m in messages[1:] %}x{% else %}none{% endfor %}{{ messages[:1] | length }}", "none1"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(',') }}", "Hi <b>"),
        ("{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is sequence else x }}{% endfor %}", "123"),
        (
            "{% for i in [1, 2, 3, 4] %}{% if i == 2 %}{% continue %}{% elif i > 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
            "13",
        ),
        (
            "{{ messages[0].tool_calls[0].function.arguments | tojson }}{{ tools | tojson }}",
            "{\"a\": [1, 2]}[{\"type\": \"function\"}]",
        ),
        (
            "{% set a, b = 'x y'.split(' ') %}{{ b }}{{ a }}{{ dict(a=1) | items | list }}{{ {'a': 1} | tojson }}",
            "yx[('a', 1)]{\"a\": 1}",
        ),
        (
            "{% with x = 1 %}{{ x }}{% endwith %}{{ x is defined }}{{ 'a  ' | trim }}{{ [3, 1] | sort | first }}",
            "1Falsea1",
        ),
        ("{{ '%s: %02d' | format('a', 7) }}{{ '{} {b}'.format(1, b='c') }}", "a: 071 c"),
        ("{{- '  a' }}  \n{%- if true %}\n  b\n{% endif %}c", "  a  b\nc"),
        (
            "{{ messages[-1].content[:2] }}{{ 'abc'[::-1] }}{{ [1, 2, 3][::-1][0] }}{{ messages[7] is undefined }}",
            "Hicba3True",
        ),
    ] {
        assert_eq!(render(source).unwrap_or_else(|error| panic!("{source}: {error}")), text, "{source}");
    }
}

#[test]
fn a_long_conversation_is_within_the_limits() {
    let source = "{% set ns = namespace(last='') %}{% for m in messages %}\
                  {% set c = m.content.split('</think>')[-1].lstrip('\n') %}\
                  {% if loop.index0 > 0 and messages[loop.index0 - 1].role == m.role %}{{ raise_exception('twice') }}{% endif %}\
                  {% if loop.index0 == messages | length - 1 %}{% set ns.last = m.role %}{% endif %}\
                  {{ '<|im_start|>' + m.role + '\n' + c.strip() + '<|im_end|>\n' }}{% endfor %}\
                  {% for m in messages[1:] %}{{ m.role[0] }}{% endfor %}{{ ns.last }}";
    let roles = ["user", "assistant"].into_iter().cycle();
    let text = "What is said takes a line. ".repeat(100);
    let messages: Vec<_> = roles.take(3000).map(|role| ChatMessage::new(role, text.as_str())).collect();
    let prompt = load(source).expect("it parses").render(&messages, None, true, &Map::new()).expect("a prompt");
    assert!(prompt.len() > 3000 * text.len() && prompt.ends_with("uaassistant"));
}
