"""Options that commands share: one frozen value, with the fields of SamplingParams in it."""

import inspect
from dataclasses import FrozenInstanceError, fields

import pytest
from typer.testing import CliRunner

from lapilli.cli.ask import ask
from lapilli.cli.batch import batch
from lapilli.cli.chat import chat
from lapilli.cli.main import app
from lapilli.cli.terminal import ChatOptions, with_options
from lapilli.config.generation import SamplingParams

IN_TERMINAL = {
    one.name: one for one in fields(SamplingParams) if one.metadata["option"].in_terminal
}


@pytest.mark.parametrize("command", [ask, batch, chat])
def test_every_field_is_an_option_with_its_default(command):
    parameters = inspect.signature(with_options(command)).parameters
    assert "how" not in parameters
    for name, one in IN_TERMINAL.items():
        assert name in parameters
        several = not isinstance(one.default, int | float | None)
        assert parameters[name].default == (None if several else one.default)
    for one in fields(ChatOptions):
        assert one.name == "sampling" or parameters[one.name].default == one.default


def test_a_command_gets_what_was_said_as_one_frozen_value():
    seen = {}

    @with_options
    def command(how: ChatOptions, as_json: bool = False):
        seen.update(how=how, as_json=as_json)

    said = dict.fromkeys(IN_TERMINAL) | {"temperature": 0.5, "logit_bias": ["5=-100", "7=1.5"]}
    plain = {one.name: one.default for one in fields(ChatOptions) if one.name != "sampling"}
    command(**plain, **said | {"seed": 3}, as_json=True)
    how = seen["how"]
    assert how.sampling == {"temperature": 0.5, "logit_bias": ["5=-100", "7=1.5"], "seed": 3}
    assert (how.model, how.alpha, seen["as_json"]) == ("pebble", "drop", True)
    assert SamplingParams.from_options(**how.sampling).logit_bias == {5: -100.0, 7: 1.5}
    with pytest.raises(FrozenInstanceError):
        how.model = "other"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--logit-bias", "5", "ID=BIAS"),
        ("--logit-bias", "5=200", "logit_bias of token 5 must be in [-100, 100]"),
        ("--top-p", "0", "top_p must be in (0, 1]"),
    ],
)
def test_a_wrong_value_is_one_line_before_a_model_is_loaded(option, value, message):
    asked = ["ask", "Hello?", "--model", "no/such/folder/here", option, value]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_bias_forbids_a_token(lapilli, checkpoint):
    options = ("--max-new-tokens", "1", "--device", "cpu", "--dtype", "float32")
    free = lapilli("ask", "Hello?", "--model", checkpoint, *options)
    forced = lapilli("ask", "Hello?", "--model", checkpoint, *options, "--logit-bias", "70=100")
    assert free.returncode == forced.returncode == 0, forced.stderr
    assert free.stdout != forced.stdout
