"""ik_llama.cpp, llama.cpp's fork for CPUs, by its own llama-bench: the language model alone.

A C++ program and no package, so its figures are taken by itself: 616 positions read in one go, and
64 tokens after them. Weights are repacked when they are loaded (-rtr 1), attention is flash
attention, as its author recommends for CPUs; keys and values in float16.
"""

import json
import resource
import statistics
import subprocess
from typing import Any

from benchmarks.engines import Options
from benchmarks.figures import PICTURE_POSITIONS, Figures, Plan
from benchmarks.gguf_header import weight_bytes

LEAST_REPEATS = 3  # a repetition takes seconds, no model is loaded for it


class LlamaBench:
    """One file of weights; takes its figures itself (`figures.MeasuresItself`).

    Raises:
        SystemExit: nobody said where the programs are.
    """

    def __init__(self, options: Options) -> None:
        if options.programs is None:
            raise SystemExit("where are ik_llama.cpp's programs? Name their folder with --ik")
        self._program = options.programs / "llama-bench"
        self._model = options.files / "gguf" / f"{options.kind}.gguf"
        self._threads = options.threads

    def measure(self, plan: Plan) -> Figures:
        """Return prefill and decode of a prompt as long as the other engines' with a picture."""
        positions = PICTURE_POSITIONS + plan.text
        found = self._run(positions, plan.new_tokens, max(plan.repeats, LEAST_REPEATS))
        return read_figures(found, positions, plan.new_tokens) | {
            "weight_bytes": float(weight_bytes(self._model)),
            # In kilobytes, of the largest process that this one started and waited for.
            "peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
        }

    def _run(self, positions: int, new_tokens: int, repeats: int) -> list[dict[str, Any]]:
        command = [str(self._program), "-m", str(self._model), "-o", "json"]
        command += ["-p", str(positions), "-n", "0", "-gp", f"{positions},{new_tokens}"]
        command += ["-t", str(self._threads), "-r", str(repeats), "-fa", "1", "-rtr", "1"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"llama-bench of {self._model.name} failed: {done.stderr[-1000:]}")
        found: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("[") :])
        return found


def read_figures(found: list[dict[str, Any]], positions: int, new_tokens: int) -> Figures:
    """Return medians of the rates that llama-bench noted of every repetition.

    Args:
        found: its output: a test that reads `positions`, and one that writes after them.
        positions: of the prompt.
        new_tokens: after it.
    """
    rates = {(test["n_prompt"], test["n_gen"]): test["samples_ts"] for test in found}
    return {
        "prefill_tokens_per_s": statistics.median(rates[positions, 0]),
        "tokens_per_s": statistics.median(rates[positions, new_tokens]),
    }


def load(options: Options) -> LlamaBench:
    """kind: Q4_0, Q4_K_M, IQ4_KS, IQ4_K or any other of its quantizer's."""
    return LlamaBench(options)
