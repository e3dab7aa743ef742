"""Values that no type checker would pass: each ends at once in one error of lapilli's own.

They are given in a process of their own, because in this one the types of arguments are checked.
"""

import json
import re
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import lapilli
from lapilli import Message

chat = lapilli.load("pebble", device="cpu", dtype="float32")
load = lapilli.load
found = {}
for text in json.load(sys.stdin):
    try:
        exec(text)
        found[text] = ["nothing", ""]
    except Exception as error:
        kind = type(error).__name__
        own = isinstance(error, lapilli.LapilliError)
        found[text] = [kind if own else f"bare {kind}", str(error)]
print(json.dumps(found))
"""

WRONG = {
    "chat.ask(None)": ("PromptError", "must be text, a string, got None"),
    "chat.ask(5)": ("PromptError", "must be text, a string, got 5"),
    "chat.stream(b'x')": ("PromptError", "must be text, a string, got b'x'"),
    "chat.ask('q', ['a.png', 'b.png'])": ("MediaError", "pass several pictures as separate arg"),
    "chat.check_image(('a.png',))": ("MediaError", "pass several pictures as separate arguments"),
    "chat.ask('q', logit_bias={'5': 1})": ("GenerationError", "token id of logit_bias must .*'5'"),
    "chat.system = 5": ("PromptError", "must be text, a string, got 5"),
    "chat.alpha = 'x'": ("ConfigError", "alpha 'x' is unknown: choose from drop, composite"),
    "chat.template = 'vicuna_v1'": ("PromptError", "must have the methods of Template .*vicuna"),
    "chat.limits = 5": ("ConfigError", "limits must be FetchLimits, got 5"),
    "chat.ask_many('hi')": ("PromptError", "expected a list, .* got 'hi'"),
    "chat.ask_many(5)": ("PromptError", "expected a list, .* got 5"),
    "chat.ask_many([None])": ("PromptError", "a question must be a text, or a tuple .* got None"),
    "chat.ask_many([(5, 'a.png')])": ("PromptError", "a question must be a text, or a tuple"),
    "chat.answer('hi')": ("PromptError", "must be a list of Message, got 'hi'"),
    "chat.answer([5])": ("PromptError", r"must be a list of Message, got \[5\]"),
    "chat.answer([Message.user('x')], 5)": ("GenerationError", "params must be SamplingParams"),
    "chat.batch(5)": ("PromptError", "expected a list, .* got 5"),
    "chat.batch('hi')": ("PromptError", "expected a list, .* got 'hi'"),
    "Message('user', ('hi',))": ("PromptError", "must be a tuple of TextPart and MediaPart"),
    "load(None)": ("CheckpointError", "a directory, a hub id or 'pebble', got None"),
    "load(5)": ("CheckpointError", "a directory, a hub id or 'pebble', got 5"),
    "load('pebble', adapter=5)": ("CheckpointError", "a directory, a hub id .* got 5"),
    "load('pebble', engine=5)": ("GenerationError", "engine must be EngineOptions or None, got 5"),
    "load('pebble', engine={})": ("GenerationError", "engine must be EngineOptions or None"),
    "load('pebble', template=5)": ("PromptError", "a template must have the methods .* got 5"),
    "load('pebble', device='meta')": ("ConfigError", "device 'meta' keeps no numbers"),
    "load('pebble', device=None)": ("ConfigError", "device must be a name .* got None"),
    "load('pebble', device=5)": ("ConfigError", "device must be a name .* got 5"),
    "load('pebble', device='xpu')": ("ConfigError", "device 'xpu' cannot be used here"),
    "load('pebble', dtype=5)": ("ConfigError", "dtype must be a name such as float32, got 5"),
    "load('pebble', progress=5)": ("ConfigError", "progress must be a function or None, got 5"),
    "load('pebble', prefix=5)": ("ConfigError", "a path must be a text or a Path, got 5"),
    "load('pebble', prefix='~/none')": ("MissingFileError", "^[^~]*/none[^~]*$"),
    "chat.load_prefix(None)": ("ConfigError", "a path must be a text or a Path, got None"),
    "load('pebble', alpha=None)": ("ConfigError", "alpha None is unknown"),
}


@pytest.mark.slow
def test_each_ends_in_an_error_that_names_what_was_expected_and_found():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(WRONG)),
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found = json.loads(done.stdout)
    odd = {
        text: found[text]
        for text, (kind, match) in WRONG.items()
        if found[text][0] != kind or not re.search(match, found[text][1]) or "\n" in found[text][1]
    }
    assert odd == {}
