"""Medians, shares of limits and ratios from figures that are known."""

from typing import Any

import pytest

from benchmarks.summary import (
    figures_of_format,
    limits,
    medians,
    quality_ratios,
    ratios,
    rivals,
    shares,
    spreads,
    work,
)

CONFIG = {
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
    },
    "vision_config": {
        "image_size": 336,
        "patch_size": 14,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "vision_feature_layer": -2,
}
MOST = {"bytes_per_s": 30e9, "float32_per_s": 2e11, "bfloat16_per_s": 4e11, "int8_per_s": 1e12}


@pytest.fixture
def found() -> dict[str, Any]:
    def ik(prefill: float, rate: float) -> dict[str, float]:
        return {"prefill_tokens_per_s": prefill, "tokens_per_s": rate, "weight_bytes": 5e8}

    def row(first: float, rate: float, many: float) -> dict[str, float]:
        return {
            "tower_s": 0.5,
            "first_s": first,
            "tokens_per_s": rate,
            "second_over_first": 0.05,
            "many_tokens_per_s": many,
            "weight_bytes": 5e8,
            "peak_bytes": 1e9,
        }

    return {
        "settings": {"shape": "S"},
        "config": CONFIG,
        "done": {
            "limits/0": MOST | {"bytes_per_s": 20e9},
            "limits/1": MOST,
            "figures/lapilli int4/0": row(2.0, 40.0, 200.0),
            "figures/lapilli int4/1": row(3.0, 42.0, 200.0),
            "figures/lapilli int4/2": row(9.0, 41.0, 200.0),
            "figures/llama.cpp Q4_0/0": row(6.0, 19.0, 50.0),
            "figures/llama.cpp Q4_0, no flash attention/0": row(7.0, 20.0, 40.0),
            "figures/transformers float32/0": row(9.0, 4.0, 8.0),
            "figures/ik_llama.cpp Q4_0, text alone/0": ik(500.0, 90.0),
            "figures/ik_llama.cpp IQ4_KS, text alone/0": ik(200.0, 50.0),
            "figures/ik_llama.cpp IQ4_K, text alone/0": ik(123.2, 41.0),
        },
    }


def test_medians_and_spread(found: dict[str, Any]) -> None:
    row = medians(found)["lapilli int4"]
    assert (row["first_s"], row["tokens_per_s"]) == (3.0, 41.0)
    assert spreads(found, "first_s")["lapilli int4"] == (2.0, 9.0)


def test_prefill_is_what_the_tower_leaves_of_the_first_token(found: dict[str, Any]) -> None:
    rows = medians(found)
    assert rows["lapilli int4"]["prefill_tokens_per_s"] == pytest.approx(616 / 2.5)
    assert rows["ik_llama.cpp Q4_0, text alone"]["prefill_tokens_per_s"] == 500


def test_limits_are_the_best_of_all_rounds(found: dict[str, Any]) -> None:
    assert limits(found) == MOST


def test_work_of_shape_s(found: dict[str, Any]) -> None:
    tasks = work(found)
    assert tasks["positions"] == 616
    assert tasks["prompt_operations"] == pytest.approx(1.19e12, rel=0.05)
    assert tasks["tower_operations"] == pytest.approx(0.365e12, rel=0.05)


def test_shares_of_the_limits(found: dict[str, Any]) -> None:
    one = shares(found, medians(found))["lapilli int4"]
    assert one["decode"] == pytest.approx(5e8 * 41 / 30e9)
    assert one["prefill"] == pytest.approx(work(found)["prompt_operations"] / 2.5 / 1e12)
    assert one["tower"] == pytest.approx(work(found)["tower_operations"] / 0.5 / 4e11)


def test_ratios_and_targets(found: dict[str, Any]) -> None:
    reached = {one["figure"]: one for one in ratios(found, medians(found))}
    first = reached["first token: times faster than llama.cpp Q4_0"]
    assert first["value"] == pytest.approx(2.0)
    assert (first["target"], first["met"]) == ("at least 2.2", False)
    assert reached["first token: times faster than transformers float32"]["value"] == 3.0
    assert reached["decode: times the rate of llama.cpp Q4_0"]["value"] == pytest.approx(2.05)
    assert reached["decode: times the rate of ik_llama.cpp Q4_0"]["value"] == pytest.approx(41 / 90)
    assert reached["8 at once: times llama.cpp Q4_0's slots"]["value"] == pytest.approx(4.0)
    own = reached["8 at once: times our own single request"]
    assert own["value"] == pytest.approx(200 / 41)
    assert own["met"] is False
    tower = reached["tower: part of the fastest float format's peak"]
    assert (tower["target"], tower["met"]) == ("at least 0.75", True)
    second = reached["second question: first token as part of the first question's"]
    assert (second["value"], second["met"]) == (0.05, True)
    assert reached["peak memory, GB"]["met"] is None  # a target of L alone


def _formats(**kls: float) -> dict[str, Any]:
    formats = {f"ik_llama.cpp {kind}": {"kl": kl, "bits": 4.5} for kind, kl in kls.items()}
    formats["lapilli int4"] = {"kl": 0.2, "bits": 4.5}
    formats["lapilli int8"] = {"kl": 0.01, "bits": 8.0, "greedy answers equal": 0.62}
    return {"formats": formats}


def test_the_rivals_are_as_good_as_ours(found: dict[str, Any]) -> None:
    found["quality"] = _formats(Q4_0=0.4, IQ4_KS=0.205, IQ4_K=0.15)
    assert rivals(found) == ["ik_llama.cpp IQ4_KS, text alone", "ik_llama.cpp IQ4_K, text alone"]
    reached = {one["figure"]: one for one in ratios(found, medians(found))}
    best = "times the best of ik_llama.cpp at equal or better KL, ik_llama.cpp IQ4_KS, text alone"
    assert reached[f"prefill: {best}"]["value"] == pytest.approx(616 / 2.5 / 200)
    assert reached[f"decode: {best}"]["value"] == pytest.approx(41 / 50)
    assert reached[f"decode: {best}"]["target"] == "at least 1.1"


def test_the_better_quantizer_of_a_kind_counts() -> None:
    formats = {"llama.cpp Q4_0": {"kl": 0.3}, "ik_llama.cpp Q4_0": {"kl": 0.4}}
    formats["lapilli int4"] = {"kl": 0.2}
    for name in ("llama.cpp Q4_0", "ik_llama.cpp Q4_0"):
        assert figures_of_format(formats, name) == {"kl": 0.3}
    assert figures_of_format(formats, "lapilli int4") == {"kl": 0.2}
    assert figures_of_format(formats, "ik_llama.cpp IQ4_K") is None


def test_where_nobody_is_as_good_the_best_is_the_rival(found: dict[str, Any]) -> None:
    found["quality"] = _formats(Q4_0=0.4, IQ4_KS=0.5, IQ4_K=0.25)
    assert rivals(found) == ["ik_llama.cpp IQ4_K, text alone"]
    del found["quality"]
    assert rivals(found) == []


def test_quality_has_targets_of_its_own() -> None:
    reached = {
        one["figure"]: one for one in quality_ratios(_formats(Q4_0=0.4, Q4_K_M=0.16)["formats"])
    }
    assert reached["KL of int4 over that of Q4_0"]["value"] == pytest.approx(0.5)
    assert reached["KL of int4 over that of Q4_0"]["met"] is True
    assert reached["KL of int4 over that of Q4_K_M"]["met"] is False
    assert reached["bits per weight of int4 over those of Q4_K_M, layers alone"]["met"] is True
    assert reached["int8: greedy answers equal to float32's"]["met"] is True
    assert quality_ratios({}) == []


def test_nothing_of_ours_gives_no_ratios(found: dict[str, Any]) -> None:
    rows = medians(found)
    del rows["lapilli int4"]
    assert ratios(found, rows) == []
