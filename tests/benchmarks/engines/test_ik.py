"""What llama-bench says, as it said it, and the program run as a process."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import Options
from benchmarks.engines.ik import load, read_figures
from benchmarks.figures import MeasuresItself, Plan
from tests.benchmarks.test_gguf_header import write_gguf

# `llama-bench -p 616 -n 0 -gp 616,64 -t 1 -r 2 -fa 1 -rtr 1 -o json` of the tiny shape, IQ4_KS;
# most of its fields are left out.
SAID = """[
  {
    "build_commit": "unknown",
    "cpu_info": "AMD EPYC",
    "model_type": "llama ?B IQ4_KS - 4.25 bpw",
    "flash_attn": true,
    "repack": true,
    "n_prompt": 616,
    "n_gen": 0,
    "avg_ts": 6422.573141,
    "test": "pp616",
    "samples_ns": [ 48196515, 9604112575 ],
    "samples_ts": [ 12781, 64.1392 ]
  },
  {
    "build_commit": "unknown",
    "cpu_info": "AMD EPYC",
    "model_type": "llama ?B IQ4_KS - 4.25 bpw",
    "flash_attn": true,
    "repack": true,
    "n_prompt": 616,
    "n_gen": 64,
    "avg_ts": 1244.310254,
    "test": "tg64@pp616",
    "samples_ns": [ 56138659, 47457109 ],
    "samples_ts": [ 1140.03, 1348.59 ]
  }
]
"""


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """A folder with a file of weights, and a program that notes its arguments."""
    (tmp_path / "gguf").mkdir()
    shape = ([32, 4], 72)
    write_gguf(
        tmp_path / "gguf" / "Q4_0.gguf", {"output.weight": shape, "token_embd.weight": shape}
    )
    return Options(tmp_path, "Q4_0", 2, programs=tmp_path)


def _program(folder: Path, body: str) -> None:
    path = folder / "llama-bench"
    path.write_text(f"#!{sys.executable}\nimport sys\n{body}\n")
    path.chmod(0o755)


def test_the_median_of_the_repetitions_counts() -> None:
    found: list[dict[str, Any]] = json.loads(SAID)
    found[0]["samples_ts"] = [100.0, 10.0, 90.0]
    figures = read_figures(found, 616, 64)
    assert figures == {"prefill_tokens_per_s": 90.0, "tokens_per_s": pytest.approx(1244.31)}


def test_figures_of_the_program(options: Options) -> None:
    _program(
        options.files, f"open(__file__ + '.txt', 'w').write(' '.join(sys.argv))\nprint({SAID!r})"
    )
    engine = load(options)
    assert isinstance(engine, MeasuresItself)
    found = engine.measure(Plan(repeats=2))
    assert found["tokens_per_s"] == pytest.approx(1244.31)
    assert found["weight_bytes"] == 96  # the embeddings are not read for a token; 24 are padding
    assert found["peak_bytes"] > 1e6
    asked = (options.files / "llama-bench.txt").read_text()
    assert "-p 616 -n 0 -gp 616,64 -t 2 -r 3 -fa 1 -rtr 1" in asked


def test_a_program_that_fails_says_why(options: Options) -> None:
    _program(options.files, "sys.exit('unknown model architecture')")
    with pytest.raises(SystemExit, match="failed: unknown model architecture"):
        load(options).measure(Plan())


def test_without_a_folder_the_option_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--ik"):
        load(Options(tmp_path, "Q4_0", 2))
