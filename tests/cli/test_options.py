"""The sampling options of the commands are the fields of SamplingParams."""

import inspect
from dataclasses import fields

import pytest

from lapilli.cli.ask import ask
from lapilli.cli.batch import batch
from lapilli.cli.chat import chat
from lapilli.cli.options import with_sampling
from lapilli.config.generation import SamplingParams

IN_TERMINAL = {
    one.name: one for one in fields(SamplingParams) if one.metadata["option"].in_terminal
}


@pytest.mark.parametrize("command", [ask, batch, chat])
def test_every_field_is_an_option_with_its_default(command):
    parameters = inspect.signature(command).parameters
    assert "sampling" not in parameters
    for name, one in IN_TERMINAL.items():
        assert name in parameters
        several = not isinstance(one.default, int | float | None)
        assert parameters[name].default == (None if several else one.default)


def test_a_command_gets_what_was_said_as_sampling_options():
    seen = {}

    @with_sampling
    def command(*, sampling, quiet=False):
        seen.update(sampling, quiet=quiet)

    said = dict.fromkeys(IN_TERMINAL) | {"temperature": 0.5, "logit_bias": ["5=-100", "7=1.5"]}
    command(**said, quiet=True)
    assert seen == {"temperature": 0.5, "logit_bias": ["5=-100", "7=1.5"], "quiet": True}
    seen.pop("quiet")
    assert SamplingParams.from_options(**seen).logit_bias == {5: -100.0, 7: 1.5}


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--logit-bias", "5", "ID=BIAS"),
        ("--logit-bias", "5=200", "logit_bias of token 5 must be in [-100, 100]"),
        ("--top-p", "0", "top_p must be in (0, 1]"),
    ],
)
def test_a_wrong_value_is_one_line_before_a_model_is_loaded(lapilli, option, value, message):
    done = lapilli("ask", "Hello?", "--model", "no/such/folder/here", option, value)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_bias_forbids_a_token(lapilli, checkpoint):
    options = ("--max-new-tokens", "1", "--device", "cpu", "--dtype", "float32")
    free = lapilli("ask", "Hello?", "--model", checkpoint, *options)
    forced = lapilli("ask", "Hello?", "--model", checkpoint, *options, "--logit-bias", "70=100")
    assert free.returncode == forced.returncode == 0, forced.stderr
    assert free.stdout != forced.stdout
