"""What every format of weights costs in quality, on the same real model and the same text.

    python -m benchmarks.quality --peers-python PEERS/bin/python --ik IK/build/bin

The model is SmolLM2-135M, made as smollm2.py says. KL is that of the next token's distribution
from float32's, in nats, and `same` how often the first choice stays; both and the perplexity are
taken in the second half of every window of 512 tokens, as llama-perplexity of ik_llama.cpp takes
them, on the tokens that it wrote down. lapilli's formats run through its own kernels, those of
GGUF through ik_llama.cpp's. Greedy answers are compared with float32's token by token.

The result is results/quality.json; a format that is in it is not measured again (--resume).
"""

import argparse
import json
import math
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from platform import python_version
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

import lapilli
from benchmarks import smollm2
from benchmarks.gguf_header import stored_tensors
from benchmarks.machine import RESULTS, package_version, run_peer
from benchmarks.quantizer import run_quantizer
from lapilli.config.generation import SamplingParams
from lapilli.generate.engine import EngineOptions, Request
from lapilli.pipeline import Chat
from lapilli.prompt.encode import EncodedPrompt
from lapilli.quant import QuantConfig, quant_config

LENGTH, WINDOWS = 512, 16
"""Tokens of a window, and windows: 4,080 positions are compared."""
QUESTIONS, ASKED, ANSWERED = 50, 40, 60
"""Greedy answers, tokens of their prompts, and their own."""
OURS: dict[str, QuantConfig] = {
    "lapilli int8": quant_config("int8"),
    "lapilli int4": quant_config("int4"),
    "lapilli int4, values in 4 bits": QuantConfig(value_bits=4),
    "lapilli int4, symmetric g128": QuantConfig(levels="symmetric", group_size=128),
    "lapilli int4, symmetric g32": QuantConfig(levels="symmetric", group_size=32),
    "lapilli int4, zeros g32": QuantConfig(levels="zeros", group_size=32),
}
IK = ("Q4_0", "Q4_1", "Q4_K_S", "Q4_K_M", "Q5_K_M", "IQ4_KS", "IQ4_K", "Q8_0")
LLAMA = ("Q4_0", "Q4_K_M", "Q8_0")
"""Rounded by llama.cpp's own quantizer, which is not always ik_llama.cpp's."""
PROGRAMS = ("llama-perplexity", "llama-quantize")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Places:
    """Where things are.

    Attributes:
        folder: the model, and GGUF files while they are measured.
        peers: Python of the peers' environment.
        programs: the folder of ik_llama.cpp's programs; None: only ours are measured.
        threads: of all computations.
    """

    folder: Path
    peers: str
    programs: Path | None
    threads: int

    @property
    def base(self) -> Path:
        """Tokens and float32's log-probabilities, as llama-perplexity writes them."""
        return self.folder / "base.bin"

    @property
    def floats(self) -> Path:
        """The model as GGUF in float32."""
        return self.folder / "F32.gguf"


def read_tokens(path: Path) -> torch.Tensor:
    """Return the tokens that llama-perplexity cut a text into: [windows, length].

    Raises:
        SystemExit: the file is none of `--kl-divergence-base`.
    """
    with path.open("rb") as file:
        magic, length, _, windows = struct.unpack("<8sIii", file.read(20))
        if magic != b"_logits_":
            raise SystemExit(f"{path} holds no log-probabilities of llama-perplexity: {magic!r}")
        tokens = np.frombuffer(file.read(4 * length * windows), dtype="<i4")
    return torch.from_numpy(tokens.astype(np.int64)).view(windows, length)


_FIGURES = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "perplexity of float32": r"Mean PPL\(base\)\s*:\s*([\d.]+)",
    "kl": r"Mean\s+KLD:\s*(-?[\d.]+)",
    "kl error": r"Mean\s+KLD:\s*-?[\d.]+\s*±\s*([\d.]+)",
    "kl median": r"Median\s+KLD:\s*(-?[\d.]+)",
    "same": r"Same top p:\s*([\d.]+)",
}


def read_statistics(said: str) -> Row:
    """Return the figures of what llama-perplexity --kl-divergence says at the end.

    Raises:
        SystemExit: a figure is not there.
    """
    found = {}
    for name, pattern in _FIGURES.items():
        seen = re.search(pattern, said)
        if seen is None:
            raise SystemExit(f"llama-perplexity says no {name!r}: {said[-500:]}")
        found[name] = float(seen.group(1))
    found["same"] /= 100
    return found


def gguf_bits(path: Path) -> Row:
    """Return the bits per weight of the layers of a GGUF file, and with the head."""
    tensors = stored_tensors(path)
    layers = [t for name, t in tensors.items() if name.startswith("blk.") and t.dimensions > 1]
    return _bits(
        [(tensor.nbytes, tensor.weights) for tensor in layers],
        (tensors["output.weight"].nbytes, tensors["output.weight"].weights),
    )


def own_bits(language_model: nn.Module) -> Row:
    """Return the bits per weight of the linear layers as they are stored, and with the head."""
    layers, head = [], (0, 0)
    for name, module in language_model.named_modules():
        if hasattr(module, "out_features"):
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            size = sum(tensor.nbytes for tensor in tensors)
            one = (size, cast("Any", module).out_features * cast("Any", module).in_features)
            if name.endswith("lm_head"):
                head = one
            else:
                layers.append(one)
    return _bits(layers, head)


def _bits(layers: Sequence[tuple[int, int]], head: tuple[int, int]) -> Row:
    """Return bits per weight of (bytes, weights)."""
    size, weights = sum(one[0] for one in layers), sum(one[1] for one in layers)
    return {
        "bits": 8 * size / weights,
        "bits of the head": 8 * head[0] / head[1],
        "bits with the head": 8 * (size + head[0]) / (weights + head[1]),
    }


@torch.inference_mode()
def log_probabilities(chat: Chat, window: torch.Tensor) -> torch.Tensor:
    """Return those of all tokens in the second half of a window: [length - 1 - length // 2, V]."""
    model = cast("Any", chat.model.language_model)
    positions = torch.arange(len(window))[None]
    hidden = model(model.embed(window[None]), position_ids=positions)
    scores = model.logits(hidden[:, len(window) // 2 : -1])
    return functional.log_softmax(scores[0].float(), dim=-1)


class Reference:
    """What the float model says: log-probabilities of every window, and greedy answers.

    Args:
        chat: of the float model.
        windows: tokens, [windows, length].
        questions: prompts of greedy answers.
    """

    def __init__(self, chat: Chat, windows: torch.Tensor, questions: list[list[int]]) -> None:
        self.windows = windows
        self._questions = questions
        self._truth = [log_probabilities(chat, window) for window in windows]
        self._answers = greedy(chat, questions)

    @property
    def perplexity(self) -> float:
        """Return that of the float model."""
        pairs = zip(self._truth, self.windows, strict=True)
        return math.exp(torch.cat([_losses(logs, window) for logs, window in pairs]).mean())

    def compare(self, chat: Chat) -> Row:
        """Return the figures of another format of the same model."""
        kls, same, losses = [], [], []
        for truth, window in zip(self._truth, self.windows, strict=True):
            logs = log_probabilities(chat, window)
            kls.append((truth.exp() * (truth - logs)).sum(dim=-1))
            same.append(truth.argmax(dim=-1) == logs.argmax(dim=-1))
            losses.append(_losses(logs, window))
        kl = torch.cat(kls)
        answers = greedy(chat, self._questions)
        pairs = list(zip(answers, self._answers, strict=True))
        kept = [_common(mine, theirs) / len(theirs) for mine, theirs in pairs]
        return {
            "perplexity": math.exp(torch.cat(losses).mean()),
            "perplexity of float32": self.perplexity,
            "kl": kl.mean().item(),
            "kl error": (kl.std() / math.sqrt(len(kl))).item(),
            "kl median": kl.median().item(),
            "same": torch.cat(same).float().mean().item(),
            "greedy answers equal": sum(mine == theirs for mine, theirs in pairs) / len(pairs),
            "greedy tokens before another one": sum(kept) / len(kept),
        }


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Return how many tokens at the beginning are the same."""
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _losses(logs: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Return the negative log-probabilities of the tokens that follow, one for each position."""
    return -logs.gather(1, window[-len(logs) :, None])[:, 0]


def greedy(chat: Chat, questions: list[list[int]]) -> list[tuple[int, ...]]:
    """Return greedy answers to prompts of ids, nothing guessed ahead."""
    params = SamplingParams(max_new_tokens=ANSWERED)
    requests = [
        Request(EncodedPrompt(ids, [False] * len(ids), ()), (), params) for ids in questions
    ]
    return [answer.token_ids for answer in chat.engine.run(requests)]


def load(model: Path, config: QuantConfig | None) -> Chat:
    """Return the model in a format; None: float32."""
    options = EngineOptions(speculate="off")
    return lapilli.load(str(model), device="cpu", dtype="float32", quantize=config, engine=options)


class Result:
    """What was found, on disk after every format.

    Args:
        path: of the file.
        resume: go on with what is there.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self.found: dict[str, Any] = {"formats": {}}
        if resume and path.exists():
            self.found = json.loads(path.read_text())

    def has(self, name: str) -> bool:
        """Return whether a format was measured."""
        return name in self.found["formats"]

    def add(self, name: str, row: Row) -> None:
        """Note a format's figures."""
        self.found["formats"][name] = row
        kl, same = row["kl"], 100 * row["same"]
        print(f"{name}: KL {kl:.4f}, same {same:.1f} %, {row['bits']:.2f} bits", flush=True)
        self.write()

    def write(self) -> None:
        """To disk, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        aside = self._path.with_suffix(".new")
        aside.write_text(json.dumps(self.found, indent=1) + "\n")
        aside.replace(self._path)


def perplexity(places: Places, model: Path, *more: str) -> str:
    """Run llama-perplexity of ik_llama.cpp on the held-out text; return what it said.

    Raises:
        SystemExit: it failed; the message is the end of what it said.
    """
    assert places.programs is not None
    command = [str(places.programs / "llama-perplexity"), "-m", str(model)]
    command += ["-f", str(places.folder / "held_out.txt"), "--no-escape"]
    command += ["-c", str(LENGTH), "--chunks", str(WINDOWS), "-t", str(places.threads)]
    command += ["--kl-divergence-base", str(places.base), *more]
    # There, since it leaves its log where it is started.
    done = subprocess.run(command, cwd=places.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"llama-perplexity of {model.name} failed: {done.stderr[-1000:]}")
    return done.stdout


def measure_gguf(places: Places, model: Path, result: Result, wanted: list[str]) -> None:
    """Figures of the kinds of GGUF files, each made, measured and removed."""
    if not places.floats.exists():
        command = ("write", str(model), str(places.floats))
        run_peer(places.peers, "benchmarks.smollm2_gguf", *command)
    if not places.base.exists():
        perplexity(places, places.floats)
    for maker, kinds in (("ik_llama.cpp", IK), ("llama.cpp", LLAMA)):
        if maker == "llama.cpp" and package_version(places.peers, "llama_cpp_python") is None:
            result.found["not measured"] = {maker: "llama_cpp_python is not installed"}
            continue
        for kind in kinds:
            name = f"{maker} {kind}"
            if _is_wanted(name, wanted) and not result.has(name):
                path = _quantized(places, maker, kind)
                row = read_statistics(perplexity(places, path, "--kl-divergence"))
                result.add(name, row | gguf_bits(path))
                path.unlink()


def _quantized(places: Places, maker: str, kind: str) -> Path:
    """Return a GGUF file of a kind, by the quantizer of ik_llama.cpp or of llama.cpp."""
    assert places.programs is not None
    path = places.folder / f"{kind}.gguf"
    if maker == "ik_llama.cpp":
        program = places.programs / "llama-quantize"
        run_quantizer(program, places.floats, path, kind, places.threads)
    else:
        arguments = [str(places.floats), str(path), kind, "--threads", str(places.threads)]
        run_peer(places.peers, "benchmarks.quantizer", *arguments)
    return path


def measure_ours(places: Places, model: Path, result: Result, wanted: list[str]) -> None:
    """Figures of lapilli's formats."""
    names = [name for name in OURS if _is_wanted(name, wanted) and not result.has(name)]
    if not names:
        return
    held_out = (
        smollm2.tokenizer(places.folder / "words.json")
        .encode((places.folder / "held_out.txt").read_text(encoding="utf-8"))
        .ids
    )
    windows = torch.tensor(held_out[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
    if places.base.exists() and not torch.equal(read_tokens(places.base), windows):
        raise SystemExit("llama-perplexity cut the held-out text into other tokens than we do")
    last = len(held_out) - ASKED
    starts = range(0, last, last // QUESTIONS)[:QUESTIONS]
    questions = [held_out[start : start + ASKED] for start in starts]
    truth = Reference(load(model, None), windows, questions)
    result.found["perplexity of float32, lapilli"] = truth.perplexity
    for name in names:
        chat = load(model, OURS[name])
        bits = own_bits(cast("nn.Module", chat.model.language_model))
        result.add(name, truth.compare(chat) | bits | {"config": asdict(OURS[name])})


def _is_wanted(name: str, wanted: list[str]) -> bool:
    return not wanted or any(name.startswith(each) for each in wanted)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers-python", default=sys.executable)
    parser.add_argument("--ik", type=Path, help="folder of ik_llama.cpp's programs")
    default = Path(tempfile.gettempdir()) / "lapilli-bench-quality"
    parser.add_argument("--folder", type=Path, default=default, help="for the model; kept")
    parser.add_argument("--formats", default="", help="beginnings of names, by semicolon")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--resume", action="store_true", help="measure what is missing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    wanted = parse(arguments)
    torch.set_num_threads(wanted.threads)
    programs = None if wanted.ik is None else wanted.ik.resolve()
    places = Places(wanted.folder.resolve(), wanted.peers_python, programs, wanted.threads)
    places.folder.mkdir(parents=True, exist_ok=True)
    result = Result(wanted.out / "quality.json", resume=wanted.resume)
    names = [name.strip() for name in wanted.formats.split(";") if name.strip()]
    model = smollm2.make(places.folder, places.peers)
    facts = json.loads((places.folder / "facts.json").read_text())
    result.found |= {"python": python_version(), "model": facts}
    result.found["positions"] = WINDOWS * (LENGTH - 1 - LENGTH // 2)
    if places.programs is None:
        result.found["not measured"] = {"GGUF": "--ik names no folder of ik_llama.cpp's programs"}
    else:
        measure_gguf(places, model, result, names)
    measure_ours(places, model, result, names)
    result.write()


if __name__ == "__main__":
    main()
