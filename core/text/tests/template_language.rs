//! What chat templates use of Jinja and Python, construct by construct, and the bounds they are held to.

use std::{sync::mpsc, thread, time::Duration};

use mesh_text::{Template, TemplateError, TemplateInput};
use serde_json::{Map, Value, json};

fn try_render(source: &str, variables: Value) -> Result<String, TemplateError> {
    let kwargs: Map<String, Value> = variables.as_object().expect("an object").clone();
    Template::compile(source)?.render(&TemplateInput {
        messages: &json!([{"role": "user", "content": "Hi"}]),
        tools: None,
        add_generation_prompt: true,
        bos_token: Some("<s>"),
        eos_token: None,
        kwargs: &kwargs,
        now: "2026-01-05T09:07:00".parse().expect("a date"),
    })
}

fn render(source: &str, variables: Value) -> String {
    try_render(source, variables).unwrap_or_else(|error| panic!("{source}: {error}"))
}

/// Expressions and what Python prints for them.
fn prints(cases: &[(&str, &str)]) {
    let variables = json!({
        "f": 1e16, "small": 1e-7, "whole": 2.0, "n": null, "t": true, "s": "it's", "q": "a\"b'c\n\u{1}é😀\u{a0}",
        "d": {"b": 1, "a": [true, null, 1.5, "x"]}, "l": [1, 2, 3, 4], "big": 18446744073709551615u64,
        "params": {"items": {"type": "string"}}, "empty": {},
    });
    for (expression, expected) in cases {
        assert_eq!(render(&format!("{{{{ {expression} }}}}"), variables.clone()), *expected, "{expression}");
    }
}

#[test]
fn values_print_as_in_python() {
    prints(&[
        ("t", "True"),
        ("n", "None"),
        ("nothing", ""),
        ("whole", "2.0"),
        ("f", "1e+16"),
        ("small", "1e-07"),
        ("big", "18446744073709551615"),
        ("d", "{'b': 1, 'a': [True, None, 1.5, 'x']}"),
        ("[s]", r#"["it's"]"#),
        ("[q]", r#"['a"b\'c\n\x01é😀\xa0']"#),
        ("(1,)", "(1,)"),
        ("(1, 'a')", "(1, 'a')"),
        ("(7 // 2, 7 / 2, -7 % 3)", "(3, 3.5, 2)"),
        ("d | string", "{'b': 1, 'a': [True, None, 1.5, 'x']}"),
        ("small | string ~ '!'", "1e-07!"),
        ("'%s is %d' | format(s, 3)", "it's is 3"),
        ("'{} {x}'.format(1, x=2)", "1 2"),
        ("bos_token ~ eos_token", "<s>"),
        ("eos_token is defined", "False"),
        ("tools is none and tools is defined", "True"),
    ]);
}

#[test]
fn json_is_dumped_as_in_transformers() {
    prints(&[
        ("d | tojson", r#"{"b": 1, "a": [true, null, 1.5, "x"]}"#),
        ("d | tojson(sort_keys=true)", r#"{"a": [true, null, 1.5, "x"], "b": 1}"#),
        ("d | tojson(separators=(',', ':'))", r#"{"b":1,"a":[true,null,1.5,"x"]}"#),
        ("{'a': [1], 'b': {}, 'c': []} | tojson(indent=2)", "{\n  \"a\": [\n    1\n  ],\n  \"b\": {},\n  \"c\": []\n}"),
        ("[1, 2] | tojson(indent=0)", "[\n1,\n2\n]"),
        ("[1] | tojson(indent='\t')", "[\n\t1\n]"),
        ("q | tojson", "\"a\\\"b'c\\n\\u0001é😀\u{a0}\""),
        ("q | tojson(ensure_ascii=True)", r#""a\"b'c\n\u0001\u00e9\ud83d\ude00\u00a0""#),
        ("'<&>' | tojson(ensure_ascii=False)", "\"<&>\""),
        ("[f, small, whole] | tojson", "[1e+16, 1e-07, 2.0]"),
        ("{1: 2, none: 3, true: 4} | tojson", r#"{"1": 4, "null": 3}"#),
        ("l[1:] | tojson", "[2, 3, 4]"),
    ]);
    for bad in ["nothing", "[nothing]", "{(1, 2): 3}", "namespace", "d | tojson(indent='x' * 100)"] {
        let error = try_render(&format!("{{{{ {bad} | tojson }}}}"), json!({"d": 1})).unwrap_err();
        assert!(matches!(error, TemplateError::Failed { .. }), "{bad}: {error}");
    }
}

#[test]
fn slices_and_methods_work_as_in_python() {
    prints(&[
        ("l[::-1]", "[4, 3, 2, 1]"),
        ("l[1:-1]", "[2, 3]"),
        ("l[::2]", "[1, 3]"),
        ("'abcdef'[::-2]", "fdb"),
        ("'abc'[-1]", "c"),
        ("l[-1]", "4"),
        ("' a b  c '.split()", "['a', 'b', 'c']"),
        ("'a,b,,c'.split(',', 1)", "['a', 'b,,c']"),
        ("'a b c'.split(maxsplit=1)", "['a', 'b c']"),
        ("'a,b,c'.rsplit(',', 1)", "['a,b', 'c']"),
        ("' a b c '.rsplit(none, 1)", "[' a b', 'c']"),
        ("''.split(',')", "['']"),
        ("''.split()", "[]"),
        ("'xxaxx'.strip('x') ~ '|' ~ ' a\n'.rstrip() ~ '|' ~ '\u{1f} a'.lstrip()", "a| a|a"),
        ("'abc'.removeprefix('a').removesuffix('c')", "b"),
        ("'a=b=c'.partition('=')", "('a', '=', 'b=c')"),
        ("'a=b=c'.rpartition('=')", "('a=b', '=', 'c')"),
        ("'abc'.startswith(('x', 'ab'))", "True"),
        ("'aBc'.upper() ~ 'aBc'.lower() ~ 'ab cd'.title() ~ 'ab'.capitalize()", "ABCabcAb CdAb"),
        ("'abcb'.replace('b', 'x', 1) ~ 'abcb'.find('b') ~ 'abcb'.count('b')", "axcb12"),
        ("', '.join(['a', 'b'])", "a, b"),
        ("d.get('b') ~ d.get('z') ~ d.get('z', 7)", "1None7"),
        ("d.keys() | list", "['b', 'a']"),
        ("d.items() | list", "[('b', 1), ('a', [True, None, 1.5, 'x'])]"),
        ("params.items() | list", "[('items', {'type': 'string'})]"),
        ("d | dictsort | map('first') | list", "['a', 'b']"),
        ("l.index(3) ~ l.count(3)", "21"),
        ("(l | reject('equalto', 2) | list) + [9]", "[1, 3, 4, 9]"),
        ("5 | trim ~ '|' ~ '  x ' | trim ~ '|' ~ '--x-' | trim('-')", "5|x|x"),
    ]);
}

#[test]
fn filters_mean_what_they_mean_in_jinja() {
    prints(&[
        ("nothing | default('x') ~ n | default('x') ~ n | default('x', true)", "xNonex"),
        ("n | default('x', boolean=true) ~ '' | d(default_value='y', boolean=true)", "xy"),
        ("nothing | default ~ '|'", "|"),
        (
            "'3' | int ~ '|' ~ '3.7' | int ~ '|' ~ 'x' | int ~ '|' ~ 'x' | int(7) ~ '|' ~ n | int(default=8)",
            "3|3|0|7|8",
        ),
        (
            "' -12 ' | int ~ '|' ~ '0x1f' | int(base=16) ~ '|' ~ '+1_0' | int ~ '|' ~ '--1' | int ~ '|' ~ '-+1' | int",
            "-12|31|10|0|0",
        ),
        ("3.9 | int ~ '|' ~ (-3.9) | int ~ '|' ~ t | int ~ '|' ~ d | int", "3|-3|1|0"),
        ("'3.5' | float ~ '|' ~ 'x' | float ~ '|' ~ 3 | float ~ '|' ~ 'x' | float(1.5)", "3.5|0.0|3.0|1.5"),
        ("'<a href=\"x\">it\\'s & /' | e", "&lt;a href=&#34;x&#34;&gt;it&#39;s &amp; /"),
        ("' a b\tc ' | wordcount", "3"),
        ("'Ab'.swapcase() ~ 'it\\'s a-b2c'.title()", "aBIt'S A-B2C"),
        ("'ab'.center(5) ~ '|' ~ 'abc'.center(6) ~ '|' ~ 'abc'.center(6, '*')", "  ab | abc  |*abc**"),
        ("'ab'.ljust(4) ~ '|' ~ 'ab'.rjust(4, '.') ~ '|' ~ '-7'.zfill(4) ~ '|' ~ '7'.zfill(1)", "ab  |..ab|-007|7"),
    ]);
    for source in ["{{ 'a'.center(5, 'xy') }}", "{{ 'a' | int(base=1) }}", "{{ 'a' | default(foo=1) }}"] {
        assert!(matches!(try_render(source, json!({})), Err(TemplateError::Failed { .. })), "{source}");
    }
}

#[test]
fn tests_mean_what_they_mean_in_jinja() {
    let mut cases = Vec::new();
    for (test, holds_for) in [
        ("string", "s"),
        ("mapping", "d"),
        ("iterable", "s d l u"),
        ("sequence", "s d l u"),
        ("number", "i f t"),
        ("integer", "i"),
        ("float", "f"),
        ("boolean", "t"),
        ("none", "n"),
        ("undefined", "u"),
        ("true", "t"),
        ("callable", "c"),
    ] {
        for value in ["s", "d", "l", "u", "i", "f", "t", "n", "c"] {
            cases.push((value, test, holds_for.split(' ').any(|name| name == value)));
        }
    }
    let variables = json!({"s": "", "d": {}, "l": [], "i": 1, "f": 1.0, "t": true, "n": null});
    for (value, test, holds) in cases {
        let source = format!("{{% set c = raise_exception %}}{{{{ {value} is {test} }}}}");
        let expected = if holds { "True" } else { "False" };
        assert_eq!(render(&source, variables.clone()), expected, "{value} is {test}");
    }
}

#[test]
fn blocks_trim_as_in_transformers() {
    assert_eq!(render("a\n  {% if true %}\n  b\n  {% endif %}\nc\n", json!({})), "a\n  b\nc");
    assert_eq!(
        render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", json!({})),
        "13"
    );
    assert_eq!(
        render("{% for x in [1, 2, 3] %}{% if x == 2 %}{% break %}{% endif %}{{ x }}{% endfor %}", json!({})),
        "1"
    );
    assert_eq!(
        render(
            "{% set ns = namespace(n=0) %}{% for x in [1, 2] %}{% set ns.n = ns.n + x %}{% endfor %}{{ ns.n }}",
            json!({})
        ),
        "3"
    );
    assert_eq!(
        render("{% macro m(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ m(1) }}{{ m(1, b=2) }}", json!({})),
        "1x12"
    );
}

#[test]
fn generation_blocks_render_their_content() {
    let source = "{# {% generation %} #}{% set x = 1 %}a\n{%- generation -%}\n b{% set x = 2 %}{% endgeneration %}{{ x }} generation";
    assert_eq!(render(source, json!({})), "ab1 generation");
    assert_eq!(render("{%generation%}{{ '{% generation %}' }}{%+ endgeneration %}", json!({})), "{% generation %}");
}

#[test]
fn the_clock_is_the_callers() {
    assert_eq!(render("{{ strftime_now('%d %b %Y, %H:%M %A %-d') }}", json!({})), "05 Jan 2026, 09:07 Monday 5");
    let error = try_render("{{ strftime_now('%Q') }}", json!({})).unwrap_err();
    assert!(error.to_string().contains("%Q"), "{error}");
}

#[test]
fn refusals_arrive_in_the_templates_words() {
    let source = "{% macro m() %}{{ raise_exception('Roles must alternate' ~ '!') }}{% endmacro %}{{ m() }}";
    let error = try_render(source, json!({})).unwrap_err();
    assert_eq!(error, TemplateError::Refused { what: "Roles must alternate!".into() });
}

#[test]
fn failures_say_where_and_what() {
    let error = try_render("\n{{ messages[0].tool.name }}", json!({})).unwrap_err().to_string();
    assert!(error.contains("messages[0].tool") && error.contains(":2)"), "{error}");
    let error = Template::compile("{% if %}").unwrap_err();
    assert!(matches!(&error, TemplateError::Syntax { what } if what.contains(":1")), "{error}");
    for source in ["{{ 'a' + 1 }}", "{{ 'a' + [1] }}", "{{ [].append(1) }}", "{{ {}.pop('a') }}", "{{ none.split() }}"]
    {
        assert!(matches!(try_render(source, json!({})), Err(TemplateError::Failed { .. })), "{source}");
    }
}

/// A template that evaluates an expression over a lazy list `ns.l` of 2^19 items.
fn huge(expression: &str) -> String {
    format!(
        "{{% set ns = namespace(l=['1']) %}}{{% for a in range(19) %}}{{% set ns.l = ns.l + ns.l %}}{{% endfor \
         %}}{{{{ {expression} }}}}"
    )
}

/// Renders on a thread of its own, as a server's worker would, and gives up on templates that don't end.
fn refuses(source: String) -> Result<(), String> {
    let start: String = source.chars().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect();
    let (done, outcome) = mpsc::channel();
    thread::spawn(move || done.send(try_render(&source, json!({})).map(|text| text.len())));
    match outcome.recv_timeout(Duration::from_secs(100)) {
        Ok(Err(error)) if error.to_string().contains("did not end") => Err(format!("…{start}: {error}")),
        Ok(Err(_)) => Ok(()),
        Ok(Ok(len)) => Err(format!("…{start}: rendered {len} bytes")),
        Err(_) => Err(format!("…{start}: does not end")),
    }
}

#[test]
fn hostile_templates_end() {
    let nested = format!("{}x{}", "(".repeat(100_000), ")".repeat(100_000));
    let mut sources: Vec<String> = [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{{ 'x' * 99999 }}{% endfor %}",
        "{% set ns = namespace(s='x') %}{% for a in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ [1] | tojson(indent=99999999999) }}",
        "{{ ('a' * 9999999).replace('a', 'b' * 99999) }}",
        "{{ strftime_now('%c' * 9999999) }}",
        "{{ 'x' | center(999999999999) }}",
        "{{ 'x'.center(999999999999) ~ 'x'.zfill(99999999) }}",
        "{{ '%999999999999d' | format(1) }}",
        "{{ '{:999999999999}'.format(1) }}",
        "{{ '{x:.999999999999f}'.format(x=1.5) }}",
        "{{ '{:{}}'.format(1, 999999999999) }}",
        "{% include 'chat_template' %}",
    ]
    .map(str::to_owned)
    .into();
    sources.extend([format!("{{{{ {nested} }}}}"), "x".repeat(5 << 20)]);
    let failures: Vec<String> = sources.into_iter().filter_map(|source| refuses(source).err()).collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn lazy_giants_are_not_unrolled() {
    let expressions = [
        "ns.l",
        "ns.l | tojson",
        "ns.l | string",
        "','.join(ns.l)",
        "ns.l | join(',')",
        "ns.l.count(7)",
        "ns.l.index(7)",
        "7 in ns.l",
        "ns.l == ns.l + [1]",
        "'{}'.format(ns.l)",
        "'{x}'.format(x=ns.l)",
        "ns.l | list | length",
        "ns.l | map('string') | list | length",
        "ns.l | trim",
        "'a'.startswith(ns.l)",
        "raise_exception(ns.l)",
        "dict(a=ns.l)",
    ];
    // Fuel stops them. Where minijinja prints a list by itself (`~`, `upper`), only the deadline does.
    let failures: Vec<String> = expressions.iter().filter_map(|expression| refuses(huge(expression)).err()).collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

#[test]
fn deep_nesting_is_survived() {
    for nest in
        ["[[[[[[[[[[ns.l]]]]]]]]]]", "((((((((((ns.l,),),),),),),),),),)", "{1:{1:{1:{1:{1:{1:{1:{1:ns.l}}}}}}}}"]
    {
        for (turns, expression) in [(90, "ns.l"), (90, "ns.l | tojson"), (99_999, "1")] {
            let source = nested(nest, turns, expression);
            assert_eq!(refuses(source), Ok(()), "{nest} {expression}");
        }
        // These are not refused as such; they must not take the process along.
        for expression in ["1", "('x' ~ ns.l) | length", "ns.l == [ns.l]", "ns.l | pprint", "{(1, ns.l): 1} | length"] {
            for turns in [10, 1_500, 2_500, 4_000] {
                let _ = refuses(nested(nest, turns, expression));
            }
        }
    }
}

fn nested(nest: &str, turns: u32, expression: &str) -> String {
    format!(
        "{{% set ns = namespace(l=[]) %}}{{% for a in range({turns}) %}}{{% set ns.l = {nest} %}}{{% endfor \
         %}}{{{{ {expression} }}}}"
    )
}

#[test]
fn what_does_not_end_is_given_up() {
    // Comparing looks at 2^40 lists that are all the same two.
    let source = "{% set ns = namespace(l=[], m=[]) %}{% for a in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% set ns.m = \
                  [ns.m, ns.m] %}{% endfor %}{{ ns.l == ns.m if messages[0].content == 'Hi' }}";
    let template = Template::compile(source).unwrap();
    let kwargs = Map::new();
    let mut input = TemplateInput {
        messages: &json!([{"role": "user", "content": "Hello"}]),
        tools: None,
        add_generation_prompt: true,
        bos_token: None,
        eos_token: None,
        kwargs: &kwargs,
        now: Default::default(),
    };
    assert_eq!(template.render(&input).unwrap(), "");
    let hi = json!([{"role": "user", "content": "Hi"}]);
    input.messages = &hi;
    let error = template.render(&input).unwrap_err().to_string();
    assert!(error.contains("within 5 s"), "{error}");
    let error = template.render(&input).unwrap_err().to_string();
    assert!(error.contains("earlier conversation"), "no second thread goes the same way: {error}");
}
