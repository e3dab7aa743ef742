"""Impossible adapters are refused."""

import pytest

from lapilli.errors import ConfigError
from lapilli.lora.config import LoraConfig


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank must be at least 1, found 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out adapters belong to models"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ConfigError, match=match):
        LoraConfig(**{"rank": 2, "alpha": 4, **options})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.*.{q,k}_proj", [True, True, False]),
        ("{a,b}.1.{q,v}_proj", [True, False, True]),
        ("*", [True, True, True]),
        ("q_proj", [False, False, False]),
    ],
)
def test_targets(pattern, expected):
    config = LoraConfig(rank=1, alpha=1, targets=(pattern,))
    paths = ("a.1.q_proj", "a.2.k_proj", "a.1.v_proj")
    assert [config.is_target(path) for path in paths] == expected


def test_scaling():
    assert LoraConfig(rank=4, alpha=8).scaling("x") == 2.0
    assert LoraConfig(rank=4, alpha=8, use_rslora=True).scaling("x") == 4.0
