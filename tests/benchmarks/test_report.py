"""The page of a run: what every engine reached, and what its format costs."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import write_report
from tests.benchmarks.test_summary import CONFIG, MOST

FORMAT = {
    "kl": 0.2, "kl error": 0.004, "same": 0.75, "perplexity": 21.5, "perplexity of float32": 18.5,
    "bits": 4.5, "bits with the head": 4.9,
}  # fmt: skip


@pytest.fixture
def found() -> dict[str, Any]:
    ours = {
        "tower_s": 0.5, "first_s": 1.5, "tokens_per_s": 60.0, "weight_bytes": 5e8,
        "second_over_first": 0.05, "many_tokens_per_s": 300.0,
    }  # fmt: skip
    machine = {
        "cpu": "CPU", "family and model": "1 2", "features": ["avx2"], "cores": 2,
        "memory_bytes": 25e9, "torch": "2", "transformers": "5",
    }  # fmt: skip
    formats = {"lapilli int4": FORMAT | {"greedy answers equal": 0.1}}
    formats["ik_llama.cpp IQ4_KS"] = FORMAT | {"kl": 0.19}
    return {
        "settings": {"shape": "S", "threads": 2, "new_tokens": 64},
        "config": CONFIG,
        "date": "2026-01-01",
        "machine": machine,
        "peers": {"llama_cpp_python": "0.3"},
        "rounds": 1,
        "skipped": {"llama.cpp Q8_0": "not asked for"},
        "failed": {},
        "quality": {"positions": 4080, "formats": formats},
        "done": {
            "limits/0": MOST,
            "figures/lapilli int4/0": ours,
            "figures/ik_llama.cpp IQ4_KS, text alone/0": {
                "prefill_tokens_per_s": 308.0, "tokens_per_s": 50.0, "weight_bytes": 4e8,
            },
            "figures/transformers float32/0": ours | {"tokens_per_s": 5.0},
        },
    }  # fmt: skip


def test_speed_and_quality_stand_beside_each_other(found: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(found, tmp_path, "inference-S")
    assert "| lapilli int4 | 500 | 1.50 | 616 | 60.0 | 300.0 |" in page
    assert "| ik_llama.cpp IQ4_KS, text alone |  |  | 308 | 50.0 |" in page
    assert "| lapilli int4 | 0.2000 | 0.0040 | 75.0 % | 21.50 | 4.50 | 4.90 | 10 % |" in page
    rows = [line for line in page.splitlines() if line.startswith("| ik_llama.cpp IQ4_KS | 0.19")]
    assert rows == ["| ik_llama.cpp IQ4_KS | 0.1900 | 0.0040 | 75.0 % | 21.50 | 4.50 | 4.90 |  |"]
    best = "at equal or better KL, ik_llama.cpp IQ4_KS, text alone"
    assert f"| prefill: times the best of ik_llama.cpp {best} | 2.00 | at least 1.5 | yes |" in page
    assert "Perplexity of float32: 18.50." in page
    assert "- not measured: llama.cpp Q8_0: not asked for" in page
    for name in ("inference-S.svg", "inference-S-quality.svg"):
        assert (tmp_path / name).read_text().startswith("<?xml")


def test_without_quality_there_is_no_table_of_it(found: dict[str, Any], tmp_path: Path) -> None:
    del found["quality"]
    page = write_report(found, tmp_path, "inference-S")
    assert "quality" not in page
    assert not (tmp_path / "inference-S-quality.svg").exists()
