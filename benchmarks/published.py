"""How fast checkpoints in AWQ and GPTQ answer, beside lapilli's own 4 bits of the same shape.

    python -m benchmarks.published --shape S --folder DIR

Files of AutoAWQ (gemm), llm-awq and GPTQ with random integers, everything else in float16, as such
files are published; loaded as they are and with quantize="int4", which packs the output layer too.
One model after the other in one process would warm each other's caches, so all stand side by side
and take turns: the first token of a prompt without a picture, one answer, eight at once.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lapilli
from benchmarks.checkpoint import write_checkpoint, write_quantized
from benchmarks.figures import Question, rate, rate_of_many, words
from benchmarks.machine import RESULTS, machine
from benchmarks.timed import TimedChat

GROUP = 128
EIGHTS = -0x77777778  # a zero of 8 in every nibble
SEVENS = 0x77777777  # the same as version 1 of GPTQ stores it
SCALE = 0.003
SECTIONS = {
    "awq": {"quant_method": "awq", "version": "gemm", "zero_point": True},
    "llm-awq": {"quant_method": "awq", "backend": "llm-awq", "version": "gemv"},
    "gptq": {"quant_method": "gptq", "desc_act": False, "sym": False},
}


def packed_layer(kind: str, shape: tuple[int, int], draw: torch.Generator) -> dict[str, Any]:
    """The tensors of one layer: random integers, zeros of 8, one scale for all groups."""
    out, inputs = shape
    groups = inputs // GROUP

    def numbers(*size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        limits = torch.iinfo(dtype)
        return torch.randint(limits.min, limits.max, size, generator=draw, dtype=dtype)

    if kind == "llm-awq":
        scales = torch.zeros(-(-groups // 8) * 8, out).half()
        scales[:groups] = SCALE
        weight = numbers(out // 4, inputs, dtype=torch.int16)
        return {"qweight": weight, "scales": scales, "scaled_zeros": -8 * scales}
    scales = torch.full((groups, out), SCALE).half()
    zeros = torch.full((groups, out // 8), EIGHTS if kind == "awq" else SEVENS, dtype=torch.int32)
    if kind == "awq":
        return {"qweight": numbers(inputs, out // 8), "qzeros": zeros, "scales": scales}
    order = torch.arange(inputs, dtype=torch.int32) // GROUP
    weight = numbers(inputs // 8, out)
    return {"qweight": weight, "qzeros": zeros, "scales": scales, "g_idx": order}


def write_published(source: Path, out: Path, kind: str) -> Path:
    """A checkpoint of `write_checkpoint` in a published format, written once."""
    if (out / "complete").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".model", ".json") and "index" not in path.name:
            shutil.copy(path, out)
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118  no mapping
                if name.endswith("_proj.weight") and "vision" not in name:
                    shape = tuple(file.get_slice(name).get_shape())
                    made = packed_layer(kind, shape, draw)
                    tensors |= {f"{name[:-6]}{part}": tensor for part, tensor in made.items()}
                else:
                    tensors[name] = file.get_tensor(name).half()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    section = {"bits": 4, "group_size": GROUP, **SECTIONS[kind]}
    config |= {"quantization_config": section, "dtype": "float16"}
    (out / "config.json").write_text(json.dumps(config))
    (out / "complete").touch()
    return out


def ways(folder: Path, shape: str, kinds: list[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every model that is measured, and what loads it."""
    source = write_checkpoint(shape, folder / "float")
    own = write_quantized(source, folder / "int4", 4)
    yield "own int4", lambda: lapilli.load(str(own), device="cpu")
    for kind in kinds:
        path = str(write_published(source, folder / kind, kind))
        yield kind, lambda path=path: lapilli.load(path, device="cpu")
        yield f"{kind}, int4", lambda path=path: lapilli.load(path, device="cpu", quantize="int4")


def figures(engine: TimedChat, number: int, *, prompt: int, tokens: int) -> dict[str, float]:
    """The figures of one turn: tokens a second of a prompt, of one answer and of eight."""
    text = words(number, prompt - 1, 900)
    [one] = engine.answer([Question((), text)], tokens)
    many = [Question((), words(1000 * number + i, 39, 900)) for i in range(8)]
    return {
        "prefill_tokens_per_s": prompt / one[0],
        "tokens_per_s": rate(one),
        "many_tokens_per_s": rate_of_many(engine.answer(many, tokens)),
    }


def measure(wanted: argparse.Namespace) -> dict[str, Any]:
    """Medians of all rounds, and ratios to lapilli's own format, round by round."""
    engines, load_s = {}, {}
    for name, load in ways(wanted.folder, wanted.shape, wanted.kinds.split(",")):
        started = time.perf_counter()
        engines[name] = TimedChat(load())
        load_s[name] = time.perf_counter() - started
        engines[name].answer([Question((), words(0, 8, 900))], 2)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for number in range(1, wanted.rounds + 1):
        for name, engine in engines.items():
            one = figures(engine, number, prompt=wanted.prompt, tokens=wanted.new_tokens)
            rows[name].append(one)
    own = rows["own int4"]
    found: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads()}
    for name, turns in rows.items():
        found[name] = engines[name].facts | {"load_s": load_s[name]}
        for key in turns[0]:
            found[name][key] = statistics.median(turn[key] for turn in turns)
            pairs = [turn[key] / same[key] for turn, same in zip(turns, own, strict=True)]
            found[name][f"{key}, over own"] = statistics.median(pairs)
    return found


def describe(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = []
    for name, row in found.items():
        if isinstance(row, dict) and "tokens_per_s" in row:
            parts = [
                f"{word} {row[key]:.1f} ({row[f'{key}, over own']:.2f})"
                for word, key in (
                    ("prefill", "prefill_tokens_per_s"),
                    ("decode", "tokens_per_s"),
                    ("eight", "many_tokens_per_s"),
                )
            ]
            read = f"{row['weight_bytes'] / 1e6:.0f} MB a token"
            lines.append(f"{name:<16} {', '.join(parts)}, {read}, loaded in {row['load_s']:.1f} s")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", default="S", choices=("tiny", "S", "L"))
    parser.add_argument("--folder", type=Path, required=True, help="where the models lie")
    parser.add_argument("--kinds", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--out", type=Path, help=f"JSON, such as {RESULTS.name}/published-S.json")
    wanted = parser.parse_args(arguments)
    found = measure(wanted)
    if wanted.out is not None:
        wanted.out.write_text(json.dumps(found, indent=1) + "\n")
    print(describe(found))


if __name__ == "__main__":
    main()
