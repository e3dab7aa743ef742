from pathlib import Path

import pytest

from lapilli.config.reader import given_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [("~", "/home/a"), ("~/x", "/home/a/x"), ("x/~", "x/~"), ("~no-one-here/x",) * 2],
)
def test_a_tilde_in_front_is_the_home(monkeypatch, given, meant):
    monkeypatch.setenv("HOME", "/home/a")
    assert given_path(given) == given_path(Path(given)) == Path(meant)
