"""Chat templates of strangers are refused soon, whatever they ask for; honest ones pay little.

A template that is refused is one PromptError. Time and memory are those of a machine that others
use too; the count of steps is the same everywhere.
"""

import json
import os
import subprocess
import sys
import threading
import time
from unittest.mock import patch

import jinja2.ext
import jinja2.sandbox
import pytest

from lapilli.errors import PromptError
from lapilli.prompt import jinja
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.message import Message
from lapilli.prompt.sandbox import MOST_SOURCE, budget_of, compile_template
from tests.prompt.test_jinja import PARTS, STRING, TOKENS

MANY = "range(100000)"
BIG = "{% set big = 'a' * 900000 %}"
LOOP = "{% for i in range(100000) %}@{% endfor %}"


def repeated(expression, times=60, start="'abcdefgh'", name="ns"):
    """A value that is put into itself again and again."""
    step = expression.replace("x", f"{name}.x")
    return (
        f"{{% set {name} = namespace(x={start}) %}}{{% for i in range({times}) %}}"
        f"{{% set {name}.x = {step} %}}{{% endfor %}}"
    )


SHARED = repeated("[x, x]", start="[1]")
TWO = SHARED + repeated("[x, x]", start="[1]", name="m")
TUPLES = repeated("(x, x)", start="(1,)")
DEEP = repeated("(x,)", times=100000, start="(1,)")
DICT = "{% set d = dict(range(100000) | batch(2) | list) %}"

COMPILED = {
    "text times a number": "{{ 'a' * 10**9 }}",
    "powers": "{{ 9**9**9**9**9**9 }}",
    "a list times a number": "{{ [0] * 10**9 }}",
    "autoescape of powers": "{% autoescape 9**9**9 %}{% endautoescape %}",
    "autoescape of text": "{% autoescape 'a' * 10**9 %}{% endautoescape %}",
    "autoescape of a filter": "{% autoescape 'a' | center(10**9) %}{% endautoescape %}",
    "a long number": "{{ " + "9" * 100_000 + " }}",
    "a long number in base 16": "{{ 0x" + "f" * 100_000 + " }}",
    "long numbers": "{{ " + "9" * 4000 + " * " + "9" * 4000 + " }}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists in lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "not not not": "{{ " + "not " * 20_000 + "1 }}",
    "signs": "{{ " + "-" * 50_000 + "1 }}",
    "sums": "{{ " + "+".join("a" * 20_000) + " }}",
    "attributes": "{{ a" + ".a" * 30_000 + " }}",
    "filters": "{{ a" + "|upper" * 15_000 + " }}",
    "conditions": "{{ " + "1 if a else " * 8000 + "1 }}",
    "ifs in ifs": "{% if a %}" * 3000 + "{% endif %}" * 3000,
    "loops in loops": "{% for a in b %}" * 30 + "{% endfor %}" * 30,
    "megabytes": "x" * 3_000_000,
    "a little too long": "x" * (MOST_SOURCE + 1),
    "never closed": "{{" * 60_000,
    "comments never closed": "{#" * 60_000,
    "lines": "\n" * 130_000 + "{{",
    "spaces": " " * 130_000 + "{%-",
    "half a pair": "\ud800{{ messages[0].content }}",
    "unknown filter": "{{ 1 | nothing }}",
    "another file": "{% include '/etc/passwd' %}",
    "a file that it extends": "{% extends 'a' %}",
    "a file that it imports": "{% import 'a' as b %}",
    "what a file has": "{% if false %}{% from 'a' import b %}{% endif %}",
}
RUN = {
    "text times a count": "{% set n = 10**9 %}{{ 'a' * n }}",
    "text of messages": "{{ messages[0].role * 999999999 }}",
    "products": repeated("x * x", start="9"),
    "loops": "{% for a in R %}{% for b in R %}{% for c in R %}{% endfor %}{% endfor %}{% endfor %}",
    "loops that take nothing": "{% for a in R %}{% for b in R if false %}{% endfor %}{% endfor %}",
    "loops that are left": LOOP.replace("@",
    "{% for b in R %}{{ loop.length }}{% break %}{% endfor %}"),
    "a long range": "{{ range(10**9) | list }}",
    "a macro for ever": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a macro twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(60) }}",
    "a loop for ever": "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{% endfor %}",
    "a block for ever": "{% block a %}{{ self.a() }}{% endblock %}",
    "plus": repeated("x + x"),
    "tilde": repeated("x ~ x"),
    "join": repeated("[x, x] | join"),
    "join with": repeated("x.join([x] * 9)"),
    "replace": repeated("x | replace('a', 'aa')"),
    "replace by itself": repeated("x.replace('a', x)"),
    "format": repeated("'%s%s' | format(x, x)"),
    "percent": repeated("'%s%s' % (x, x)"),
    "braces": repeated("'{0}{0}'.format(x)"),
    "braces with a map": repeated("'{a}{a}'.format_map({'a': x})"),
    "json of json": repeated("x | tojson | tojson"),
    "set blocks": "{% set ns = namespace(x='abcd') %}{% for i in range(60) %}{% set y %}{{ ns.x }}"
    "{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "filter block": "{% filter center(10**9) %}a{% endfilter %}",
    "center": "{{ 'a' | center(10**9) }}",
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width given": "{{ '%*d' % (1000000000, 1) }}",
    "precision": "{{ '%.1000000000f' % 1.0 }}",
    "width of a filter": "{{ '%1000000000d' | format(1) }}",
    "many of one": "{{ ('%(a)s' * 100000) % {'a': 'b' * 100000} }}",
    "width in braces": "{{ '{:>1000000000}'.format(1) }}",
    "width in braces in braces": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "many braces": "{{ ('{0}' * 100000).format('b' * 100000) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "translate": "{{ 'aaaa'.translate({97: 'x' * 100000}) }}",
    "encode": "{{ ('a' * 1000).encode('idna') }}",
    "bytes of a number": "{{ (1).to_bytes(10**9, 'big') }}",
    "keys": "{{ dict.fromkeys(range(100000), 1) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 2.5 | round(10**9, 'ceil') }}",
    "truncate": "{{ 'a' | truncate(10**9) }}",
    "wordwrap": "{{ ('a ' * 50000) | wordwrap(1, wrapstring='x' * 10000) }}",
    "urlize": "{{ ('www.a.de ' * 10000) | urlize(rel='x' * 10000) }}",
    "striptags": "{{ ('<!--' * 100000) | striptags }}",
    "sum of lists": "{{ [[1] * 1000] * 1000 | sum(start=[]) }}",
    "json with indent": "{{ [[[[[1] * 100]]]] | tojson(indent=10**9) }}",
    "json with separators": "{{ range(1000) | list | tojson(separators=['x' * 100000, 'y']) }}",
    "lorem ipsum": "{{ lipsum(10**9) }}",
    "the last place": BIG + "{{ big.rfind('b' + 'a' * 400000) }}",
    "strip many": BIG + "{{ big.strip('a' * 400000) }}",
    "cuts": BIG + LOOP.replace("@", "{% set x = big[1:] %}"),
    "comparisons": BIG + "{% set c = 'a' * 900000 %}" + LOOP.replace("@", "{{ big == c }}"),
    "searches": BIG + LOOP.replace("@", "{{ 'b' in big }}"),
    "capitals": BIG + LOOP.replace("@", "{% set x = big.upper() %}"),
    "much text": LOOP.replace("@", "x" * 1000),
    "much text of a macro": "{% macro f() %}" + "x" * 1000 + "{% endmacro %}" + LOOP.replace("@",
    "{{ f() }}"),
    "too much output": "{% for i in range(20) %}{{ 'x' * 100000 }}{% endfor %}",
    "kept texts": repeated("x + ['a' * 10000 ~ i]", times=100000, start="[]"),
    "kept records": repeated("[x, {}, {}, {}, namespace(a=i)]", times=100000, start="[]"),
    "kept ranges": repeated("[x, range(100000) | list]", times=100000, start="[]"),
    "items": DICT + LOOP.replace("@", "{% set x = d | items | list %}"),
    "items searched": DICT + LOOP.replace("@", "{{ 1 in (d | items) }}"),
    "rejected": LOOP.replace("@", "{{ R | reject | first }}"),
    "arguments": "{% macro f() %}{% endmacro %}" + LOOP.replace("@", "{{ f(*R) }}"),
    "filters of filters": repeated("x | map('upper')", times=100000, start="[1]")
    + "{{ ns.x | list }}",
    "a wide year": "{{ strftime_now('%1000000000Y' * 100000) }}",
    "escapes": "{% autoescape true %}{{ '<' * 900000 }}{{ '<' * 900000 }}{% endautoescape %}",
    **{
        f"a list many times: {use}": TWO + f"{{{{ {use} }}}}"
        for use in (
            "ns.x", "ns.x | string", "ns.x | tojson", "ns.x | pprint", "ns.x == m.x",
            "ns.x in [m.x]",
            "ns.x is eq(m.x)", "[ns.x, m.x] | sort", "ns.x ~ ''", "[ns.x] | join",
            "[ns.x, m.x] | max",
            "[ns.x].count(m.x)", "{'a': ns.x}.items()", "'%s' % [ns.x]", "'{0!r}'.format(ns.x)",
            "raise_exception(ns.x)", "[ns.x] | select('eq', m.x) | list", "[].nothing[ns.x]",
            "{}[ns.x].a", "messages | map(ns.x) | list", "ns.x | attr(m.x)",
        )
    },
    **{
        f"a tuple many times: {use}": TUPLES + f"{{{{ {use} }}}}"
        for use in ("{ns.x: 1}", "{}[ns.x]", "{}.get(ns.x)", "[ns.x] | unique | list", "ns.x in {}")
    },
    **{
        f"a deep tuple: {use}": DEEP + f"{{{{ {use} }}}}"
        for use in ("{ns.x: 1}", "{}[ns.x]", "ns.x", "[ns.x] | unique | list", "ns.x in {}")
    },
    "half a pair of code units": "{{ '\\ud800' }}{{ messages[0].content }}",
    "a long complaint": "{{ raise_exception('a' * 900000) }}",
    "a complaint that is no text": "{{ raise_exception(1) }}",
    "a division": "{{ 1 / 0 }}",
    "nothing called": "{{ nothing() }}",
    "a time that is no text": "{{ strftime_now(1) }}",
}  # fmt: skip
ESCAPES = [
    "''.__class__.__mro__[1].__subclasses__()", "cycler.__init__.__globals__",
    "namespace.__globals__", "namespace.mro()", "namespace(__class__=1)",
    "'' | attr('__class__')", "self._TemplateReference__context", "''['__class__']", "dict.mro()",
    "'{0.__class__.__mro__}'.format('')", "'{0[__class__]}'.format('')", "strftime_now.__globals__",
    "messages | map(attribute='__class__') | list", "(messages | map('upper')).gi_frame",
    "(messages | map('upper')).throw(1)", "dict.get({}, 1)", "('%s'.format | attr('__self__')).x",
    "messages.append(1)", "messages[0].update(a=1)", "messages[0].pop('role')", "[].copy.__self__",
]  # fmt: skip


FEW = 20_000  # steps: checking types at every call costs a hundred times what is checked


def refused(source):
    """The message, with a small budget."""
    few = patch.multiple(jinja, _STEPS=FEW, _STEPS_OF_MESSAGE=0)
    with few, pytest.raises(PromptError) as told:
        JinjaTemplate(source.replace("R", MANY)).render([Message.user("Q")])
    assert len(str(told.value)) < 700
    return str(told.value)


PROGRAM = """
import json, sys, time
from pathlib import Path
from lapilli.errors import PromptError
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.message import Message

def peak():  # not ru_maxrss, which begins with what the program that started this one had
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) if status.exists() else 0

for name, source in json.load(sys.stdin).items():
    before, started = peak(), time.process_time()
    try:
        JinjaTemplate(source).render([Message.user("Q")])
        told = "not refused"
    except PromptError as error:
        told = ""
    seconds = time.process_time() - started
    grown = peak() - before
    print(json.dumps([name, seconds, grown, told]), flush=True)
"""


@pytest.mark.slow
def test_with_the_whole_budget_they_are_refused_within_seconds():
    """In a process that does not check types at every call; all of them in `make stress`."""
    every = 1 if "LAPILLI_FUZZ_CASES" in os.environ else 8
    chosen = list({**COMPILED, **RUN}.items())[::every]
    sources = {name: source.replace("R", MANY) for name, source in chosen}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == list(sources)
    assert not done.stderr
    for name, seconds, kibibytes, told in found:
        assert not told, name
        assert seconds < 5, name
        assert kibibytes < 400_000, name


@pytest.mark.slow
@pytest.mark.parametrize("source", COMPILED.values(), ids=COMPILED.keys())
def test_what_cannot_be_compiled_in_bounds_is_refused(source):
    refused(source)


@pytest.mark.slow
@pytest.mark.parametrize("source", RUN.values(), ids=RUN.keys())
def test_what_does_not_end_in_bounds_is_refused(source):
    refused(source)


@pytest.mark.parametrize("expression", ESCAPES)
def test_nothing_leads_out_of_the_sandbox(expression):
    refused("{{ (" + expression + ") ~ '' }}{{ messages[0].content }}{{ 1 / 0 }}")
    try:
        text = JinjaTemplate("{{ " + expression + " }}")._run([{"role": "user"}], open_turn=True)
    except PromptError:
        return
    assert text in ("", "None", "[Undefined]")  # an attribute that nobody may see is undefined


def test_nothing_is_computed_while_a_template_is_compiled():
    started = time.process_time()
    source = "{{ 'a' * 10**9 }}{{ 9**9**9 }}{{ 'a' | center(10**9) }}{{ 'a' ~ 'b' * 10**9 }}"
    JinjaTemplate(source)
    assert time.process_time() - started < 1


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ 'a' * 10**9 }}", "takes more than 20,000 steps"),
        (SHARED + "{{ ns.x }}", "makes or compares values that are too large"),
        ("{{ 9**99999999 }}", "makes numbers that are too large"),
        ("{{ 'a'.encode() }}", "may not call 'encode' of a str"),
        ("{{ (1).to_bytes(9) }}", "may not call 'to_bytes' of a int"),
        ("{{ '\\ud800' }}", "half of a surrogate pair"),
        ("{% include 'a' %}", "line 1: a chat template reads no other files"),
        ("x" * 200_000, "has 200,000 characters, at most 131,072 are read"),
        ("{{ " + "(" * 5000 + " }}", "nested too deeply"),
    ],
)
def test_a_refusal_says_its_reason(source, expected):
    assert expected in refused(source)


def plain_environment():
    """Jinja2's own sandbox, set up as transformers does."""
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )


HONEST = [
    "{{ m | map(attribute='a') | join(', ') }}", "{{ m | selectattr('a', 'equalto', 2) | list }}",
    "{{ (m | first).a }}{{ (m | last).b }}",
    "{{ m | rejectattr('a', 'gt', 1) | map(attribute='b') | list }}",
    "{{ 'a b c'.split(' ')[-1] }}{{ ' x '.strip() }}{{ 'aXb'.split('X', 1) }}",
    "{{ '%s-%03d' % ('a', 7) }}",
    "{{ '{}:{:>5}'.format('a', 3) }}", "{{ 'abc'[1:] ~ 'd' ~ 1 ~ none }}", "{{ 'x' * 3 + 'y' }}",
    "{% for a in m %}{{ loop.index }}/"
    "{{ loop.length }}{% if not loop.last %},{% endif %}{% endfor %}",
    "{% for a in m if a.a > 1 %}{{ loop.first }}{{ a.b }}{% else %}none{% endfor %}",
    "{% macro f(x, y='z') %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}{{ f(1) }}"
    "{% call f(2) %}c{% endcall %}",
    "{% set ns = namespace(n=0, l=[]) %}{% for a in m %}{% set ns.n = ns.n + a.a %}"
    "{% set ns.l = ns.l + [a.b] %}{% endfor %}{{ ns.n }}{{ ns.l }}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x | upper }}{% filter upper %}b{% endfilter %}",
    "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}{{ d | dictsort }}"
    "{{ d | items | list }}",
    "{{ m | length }}{{ m[::-1] | map(attribute='a') | list }}{{ m | reverse | list }}",
    "{{ nothing }}",
    "{{ 1 < 2 < 3 }}{{ 'a' in 'abc' }}{{ 2 not in [1, 3] }}{{ d == {'x': 1, 'y': [1, 2]} }}",
    "{{ 7 // 2 }}{{ 7 % 3 }}{{ 2 ** 8 }}{{ 7 / 2 }}{{ -7 }}{{ 1.5 * 2 }}", "{{ none is none }}",
    "{{ d | tojson }}{{ 'x' is string }}{{ d is mapping }}{{ m is iterable }}"
    "{{ 3 is divisibleby 3 }}",
    "{{ 'a\nb' | indent(2) }}{{ 'ab' | center(6) }}{{ 'a b' | title }}"
    "{{ 'abcd' | truncate(3, true) }}",
    "{{ [3, 1, 2] | sort }}{{ [1, 1, 2] | unique | list }}{{ [1, 2] | sum }}{{ [1, 2] | max }}",
    "{{ range(3) | list }}{{ 2.345 | round(1) }}{{ '12' | int + 1 }}{{ 'x' | default('y') }}",
    "{{ m | groupby('a') | map('first') | list }}{{ [1, 2, 3] | batch(2) | list }}",
    "{% autoescape true %}{{ '<' ~ '&' }}{{ '<b>' | safe }}{% endautoescape %}",
    "{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}",
    "{% for a in m %}{% if a.a == 2 %}{% continue %}{% endif %}{{ a.b }}{% endfor %}"
    "{{ cycler('a', 'b').next() }}",
    "{% with a = 3 %}{{ a }}{% endwith %}{% block b %}c{% endblock %}{{ self.b() }}",
    "{{ 'ab'.replace('a', 'x').upper().startswith('X') }}{{ 'a,b'.split(',') | join('|') }}",
    "{{ ['b', 'a'] | join(d.x) }}{{ d.get('q', 'r') }}{{ d['y'][0] }}{{ 'a-b'.partition('-') }}",
]  # fmt: skip


@pytest.mark.parametrize("source", HONEST)
def test_honest_templates_write_what_jinja_writes(source):
    values = {"m": [{"a": n, "b": f"b{n}"} for n in range(1, 4)], "d": {"x": 1, "y": [1, 2]}}
    expected = plain_environment().from_string(source).render(**values)
    with budget_of(100_000) as budget:
        assert compile_template(source).render(**values) == expected
    assert budget.left > 97_000


@pytest.mark.slow
@pytest.mark.parametrize("source", [PARTS, STRING])
def test_a_long_conversation_takes_a_small_part_of_what_it_may(source):
    turns = [Message.user("x" * 5000), Message.assistant("y" * 5000)] * 200
    template = JinjaTemplate(source, **TOKENS)
    template.render([Message.user("Q")])
    with budget_of(1_000_000) as budget:
        template._template.render(
            messages=[
                {"role": turn.role, "content": [{"type": "text", "text": "a" * 40}]}
                if template._takes_parts
                else {"role": turn.role, "content": "a" * 40}
                for turn in turns
            ],
            **TOKENS,
        )
    assert 1_000_000 - budget.left < 300 * len(turns)  # of 20,000 for each
    assert len(template.render(turns[:-1])) >= 2 * len(turns) - 1


@pytest.mark.slow
def test_threads_have_budgets_of_their_own():
    template = JinjaTemplate(STRING, **TOKENS)
    greedy = JinjaTemplate(
        "{% for a in R %}{% for b in R %}{% endfor %}{% endfor %}".replace("R", MANY)
    )
    expected, found = template.render([Message.user("Q")]), []

    def ask():
        found.extend(template.render([Message.user("Q")]) for _ in range(20))
        with pytest.raises(PromptError, match="steps"):
            greedy.render([Message.user("Q")])

    threads = [threading.Thread(target=ask) for _ in range(4)]
    with patch.multiple(jinja, _STEPS=FEW, _STEPS_OF_MESSAGE=0):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [expected] * 80
