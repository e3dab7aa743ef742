"""Points of the plot of KL against speed, and bytes that stay the same."""

from pathlib import Path
from typing import Any

from benchmarks.plot import LEAST_KL, colour, draw_quality, points

FOUND: dict[str, Any] = {
    "settings": {"shape": "S"},
    "machine": {"cpu": "CPU"},
    "date": "2026-01-01",
    "quality": {"formats": {"lapilli int4": {"kl": 0.2}, "llama.cpp Q4_0": {"kl": 0.36}}},
}
ROWS = {
    "lapilli int4": {"tokens_per_s": 60.0},
    "llama.cpp Q4_0, no flash attention": {"tokens_per_s": 49.0},
    "llama.cpp Q4_K_M": {"tokens_per_s": 45.0},
    "transformers float32": {"tokens_per_s": 5.0},
}


def test_engines_stand_at_the_kl_of_their_format() -> None:
    assert points(FOUND, ROWS, "tokens_per_s") == [
        ("lapilli int4", 60.0, 0.2),
        ("llama.cpp Q4_0, no flash attention", 49.0, 0.36),
        ("transformers float32", 5.0, LEAST_KL),  # weights as they are
    ]


def test_the_same_figures_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        draw_quality(FOUND, ROWS, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_every_family_has_a_colour_of_its_own() -> None:
    families = ("lapilli int4", "llama.cpp Q4_0", "ik_llama.cpp Q4_0", "transformers x", "other")
    assert len({colour(name) for name in families}) == len(families)
