"""`lapilli serve`: what cannot be served is refused before a model is loaded."""

import socket

import pytest
from typer.testing import CliRunner

import lapilli
from lapilli.cli.main import COMMANDS, build_program


@pytest.fixture
def refused(monkeypatch):
    """Run `lapilli serve` with options; return what it says when it refuses them."""

    def load(*_, **__):
        pytest.fail("the model is loaded")

    monkeypatch.setattr(lapilli, "load", load)
    monkeypatch.delenv("LAPILLI_API_KEY", raising=False)

    def run(*options: str) -> str:
        done = CliRunner().invoke(build_program(COMMANDS), ["serve", "pebble", *options])
        assert done.exit_code == 2, done.output
        return " ".join(done.output.split())

    return run


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--num-beams", "3"), "does not search by beams"),
        (("--length-penalty", "0.5"), "does not search by beams"),
        (("--name", ""), "--name is empty"),
        (("--name", "  "), "--name is empty"),
        (("--cache-bytes", "5"), "greater than or equal to 1048576"),
        (("--api-key", "=S"), "no name before it"),
        (("--api-key", "a=b=c"), "has an '=' in it"),
        (("--api-key", "anna="), "not empty"),
        (("--api-key", "anna=S:0:0"), "whole numbers above 0"),
        (("--api-key", "anna=S:-1"), "whole numbers above 0"),
        (("--api-key", "anna=S:1:2:3"), "whole numbers above 0"),
        (("--api-key", ""), "not empty"),
        (("--api-key", "S", "--api-key", "S"), "must differ"),
    ],
)
def test_what_cannot_be_served_is_said_before_a_model_is_loaded(refused, options, cause):
    assert cause in refused("--port", "0", *options)


def test_a_port_that_is_taken_is_said_before_a_model_is_loaded(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = refused("--port", str(taken.getsockname()[1]))
    assert "cannot be listened on: Address already in use" in said
