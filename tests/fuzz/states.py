"""Rows of the table for what we write ourselves and for the programs in a checkpoint: chat
templates, states of runs, saved prefixes.

Where a damaged state or prefix is taken, it must be what was saved: anything else is a fault too.
"""

import hashlib
import json
from pathlib import Path
from random import Random

import lapilli
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.errors import CheckpointError, ContextTooLongError, PromptError
from lapilli.prompt.message import Message
from lapilli.train.trainer.task import TrainingError
from tests.fuzz import honest, readers
from tests.fuzz.damage import JSON, PICKLE, SAFETENSORS, damaged_bytes, damaged_text
from tests.fuzz.kind import Kind

TEMPLATE = """\
{%- macro said(message) -%}{{ message['content'] | trim }}{%- endmacro -%}
{%- set ns = namespace(turn=0, text='') -%}
{{- bos_token }}
{%- for message in messages %}
    {%- set ns.turn = ns.turn + 1 %}
    {%- if (message.role == 'user') != (ns.turn % 2 == 1) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set ns.text = message.role ~ ':' %}
    {{- '%s %s' % (ns.text, said(message)) + ('\\n' if not loop.last else '') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{%- endif %}
"""
PIECES = (
    *("{{ 'a' * 10**9 }}", "{{ 9**9**9**9 }}", "{% for a in range(99999) %}", "{% endfor %}"),
    *("{{ messages * 10**8 }}", "{{ ns.text * 10**8 }}", "{{ 'a' | center(10**9) }}", "{{", "}}"),
    *(
        "{% set ns.text = ns.text ~ ns.text %}",
        "{% set ns.text = [ns.text, ns.text] %}",
        "{%",
        "%}",
    ),
    *("{{ ns.text | tojson(indent=10**8) }}", "{{ '%999999999d' % 1 }}", "{{ said(said) }}", "{#"),
    *("{{ ''.__class__.__mro__ }}", "{{ said.__globals__ }}", "{% include 'x' %}", "{{ 1 / 0 }}"),
    *("{% for a in messages recursive %}{{ loop([a, a]) }}{% endfor %}", "(" * 3000, "[" * 90_000),
    *("{{ messages | join(ns.text * 10**6) }}", "{{ ns.text.replace('', ns.text) }}", "\\ud800"),
    *("{{ loop }}{{ ns }}{{ self }}{{ said }}", "{{ raise_exception(messages) }}", "not " * 9000),
    *(
        "{{ strftime_now('%Y' * 10**6) }}",
        "x" * 10**6,
        "\0",
        "\x1b[31m",
        "{{ caller() }}",
        "|",
        "~",
    ),
    *("range(10**9)", "| list", "| map('upper')", "* 10**7", "** 10**7", "['x']", ".x", "(1)", "}"),
)


def changed_template(text: str, random: Random) -> str:
    """A template with pieces put in, cut out, repeated or moved."""
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        at, end = sorted(random.randrange(len(text) + 1) for _ in range(2))
        piece = random.choice((random.choice(PIECES), text[at:end], text[at:end][:4000] * 50, ""))
        text = (text[:at] + piece + text[random.choice((at, at, end)) :])[:3_000_000]
    return text


def damaged_template(data: bytes, random: Random) -> bytes:
    """The text of a template, changed."""
    return changed_template(data.decode(), random).encode()


def damaged_named_template(data: bytes, random: Random) -> bytes:
    """A JSON file with another template, or a list of named ones."""
    value = json.loads(data)
    text = changed_template(TEMPLATE, random)
    entries = [{"name": name, "template": text} for name in ("default", "tool_use")]
    value["chat_template"] = random.choice((text, text, entries, entries[1:], [text], {"a": text}))
    return json.dumps(value).encode()


def with_template(folder: Path) -> None:
    """Hugging Face's LLaVA 1.5 with a chat template in the newest place."""
    honest.hf_llava(folder)
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)


def with_named_template(folder: Path) -> None:
    """The same in the places of earlier versions."""
    honest.hf_llava(folder)
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "model" / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def inspect_and_render(folder: Path) -> None:
    """Inspect, load, write two turns."""
    inspect_checkpoint(folder / "model").to_text()
    chat = lapilli.load(folder / "model", device="cpu", dtype="float32", engine=readers.SMALL)
    turns = [Message.user("What?", readers.PICTURE), Message.assistant("A."), Message.user("Why?")]
    chat.encode(turns)
    _ = chat.template.stop


def _new_state():
    from tests.train.trainer.test_state import new_state

    return new_state()


def _said(state) -> str:
    """What a state comes to: a digest of all of it."""
    from lapilli.train.trainer.state_file import content_digest
    from tests.train.trainer.test_state import everything

    return content_digest(
        [sorted(everything(state).items()), state.step, state.skipped, str(state.best)]
    )


def trained(folder: Path) -> None:
    """The state of a small run, and its best weights."""
    from lapilli.train.trainer.state import save_best, save_state
    from lapilli.train.trainer.task import Best

    state = _new_state()
    state.best, state.fingerprint = Best(2, 0.5), {"run.seed": 1}
    folder.mkdir(parents=True, exist_ok=True)
    save_state(state, folder)
    save_best(state, folder)
    (folder / "said").write_text(_said(state))


def trained_in_pieces(folder: Path) -> None:
    """The same as several processes save it."""
    from tests.train.trainer.test_state import in_pieces

    state = _new_state()
    folder.mkdir(parents=True, exist_ok=True)
    in_pieces(state, folder)
    (folder / "said").write_text(_said(state))


def go_on(folder: Path) -> None:
    """Go on with a run; what is taken is what was saved."""
    from lapilli.train.trainer.state import load_best, load_state

    state = _new_state()
    state.fingerprint = {"run.seed": 1}
    if load_state(state, folder):
        assert _said(state) == (folder / "said").read_text(), "another state was taken"
    if state.best is not None:
        load_best(state, folder)


def read_ahead(folder: Path) -> None:
    """A prefix of a small engine."""
    engine = _engine()
    from tests.generate.engine.conftest import picture, request_of

    ticket = engine.submit(request_of([3, 4, picture(1), 5, 6, 7, 8, 9]))
    while engine.step():
        pass
    folder.mkdir(parents=True, exist_ok=True)
    engine.save_prefix(folder / "seen.safetensors", ticket.keys)
    (folder / "said").write_text(_kept(engine, folder))


def _engine():
    from lapilli.generate.engine import Engine
    from tests.generate.conftest import WordTokenizer
    from tests.generate.engine.conftest import SMALL, build

    return Engine(build(), WordTokenizer(), options=SMALL)


def _kept(engine, folder: Path) -> str:
    from lapilli.generate.engine.feature_cache import content_digest
    from lapilli.generate.engine.prefix_file import model_digest, read_prefix

    saved = read_prefix(folder / "seen.safetensors", engine.pool, model_digest(engine.model))
    return hashlib.sha256(str(saved.keys).encode() + content_digest(saved.tensors)).hexdigest()


def read_prefix_again(folder: Path) -> None:
    """Read a prefix; what is taken is what was saved."""
    assert _kept(_engine(), folder) == (folder / "said").read_text(), "another prefix was taken"


TEMPLATES = (damaged_template,) * 6 + (damaged_text, damaged_bytes)
NAMED = (damaged_named_template,) * 4 + JSON
FOLDER = "state/000003"
ERRORS = (CheckpointError, PromptError, ContextTooLongError)
STOPPED = (TrainingError,)
KINDS: tuple[Kind, ...] = (
    Kind(
        make=with_template,
        file="model/chat_template.jinja",
        damages=TEMPLATES,
        read=inspect_and_render,
        errors=ERRORS,
        share=8,
    ),
    *(
        Kind(
            make=with_named_template,
            file=f"model/{name}",
            damages=NAMED,
            read=inspect_and_render,
            errors=ERRORS,
            share=3,
        )
        for name in ("chat_template.json", "tokenizer_config.json")
    ),
    Kind(make=trained, file="state.pt", damages=PICKLE * 3, read=go_on, errors=STOPPED, share=4),
    Kind(make=trained, file="best.pt", damages=PICKLE * 3, read=go_on, errors=STOPPED),
    *(
        Kind(
            make=trained_in_pieces,
            file=f"{FOLDER}/{name}",
            damages=damages,
            read=go_on,
            errors=STOPPED,
        )
        for name, damages in (
            ("values.json", JSON),
            (".metadata", (damaged_bytes,)),
            ("__0_0.distcp", (damaged_bytes,)),
        )
    ),
    Kind(
        make=read_ahead,
        file="seen.safetensors",
        damages=(*SAFETENSORS, damaged_bytes),
        read=read_prefix_again,
        share=3,
    ),
)
