"""What every way to quantize costs, on models that see and on a real language model.

    python -m benchmarks.quantization --larger build/larger-model --text SMOLLM2 [--resume]

pebble, and its larger sibling where there is one (docs/guide/pebble.md), answer the questions of
the exam: right answers for each skill, and the divergence of the next token from float32's, in
nats, along float32's own answers. SmolLM2, made as smollm2.py says, reads text that it was never
trained on, cut as in quality.py. Every row is made by `lapilli quantize` or rounded while loading,
and read back from its files.

Calibration samples of pebble's world are drawn (pebble/calibration.py): conversations about
pictures that no exam has, and for "text" the same conversations without pictures. SmolLM2's are
texts that it was trained on. The result is results/quantization.json, one row after another;
quantization_report.py writes docs/quantization.md and its plot of what is there.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import lapilli
from benchmarks import smollm2
from benchmarks.machine import RESULTS, run_peer
from benchmarks.quality import LENGTH, WINDOWS, log_probabilities, own_bits
from lapilli.calibration import CalibrationOptions, quantize_from_samples
from lapilli.checkpoint.write.files import write_safetensors
from lapilli.config.generation import SamplingParams
from lapilli.generate.engine import EngineOptions, Request
from lapilli.model import FusedBatch
from lapilli.pipeline import Chat
from lapilli.prompt.encode import EncodedPrompt
from lapilli.quant import QuantConfig
from pebble.calibration import write_calibration
from pebble.draw import draw
from pebble.examine import messages_of
from pebble.score import ExamItem, exam, is_exact

RESULT = RESULTS / "quantization.json"
AT_ONCE = 20
Figures = dict[str, Any]
SAMPLES = {"pebble": 128, "larger": 128, "text": 16}
COMPARED = 300
"""Answers along which the divergence is taken."""


@dataclass(frozen=True, slots=True)
class Row:
    """One way to store a model.

    Attributes:
        name: in the table.
        config: None: float32.
        method: "" rounds while loading.
        bits: see CalibrationOptions.
        rotate: likewise.
        samples: "pictures", "text" or "" for none.
        of: the models that it is measured on.
        gguf: a kind of llama.cpp, whose rounded weights are read back in floats; SmolLM2's are in
            quality.py, run by llama.cpp.
    """

    name: str
    config: QuantConfig | None
    method: str = ""
    bits: int = 4
    rotate: bool = False
    samples: str = ""
    of: tuple[str, ...] = ("pebble", "larger", "text")
    gguf: str = ""


SEEING, PEBBLE = ("pebble", "larger"), ("pebble",)


def _rows() -> list[Row]:
    own = QuantConfig()
    rows = [
        Row("float32", None),
        Row("int8", QuantConfig(bits=8)),
        Row("nearest", own, "rtn"),
        Row("gptq", own, "gptq", samples="pictures"),
        Row("awq", own, "awq", samples="pictures"),
        Row("awq, text", own, "awq", samples="text", of=SEEING),
        Row("mbq", own, "mbq", samples="pictures", of=SEEING),
        Row("nearest, rotated", own, "rtn", rotate=True),
        Row("gptq, rotated", own, "gptq", rotate=True, samples="pictures"),
        Row("awq, rotated", own, "awq", rotate=True, samples="pictures", of=SEEING),
    ]
    rows += [Row(f"GGUF {kind}", None, of=SEEING, gguf=kind) for kind in ("Q4_0", "Q4_1", "Q4_K_M")]
    tower = replace(own, quantize_tower=True)
    rows.append(Row("gptq, tower int8", tower, "gptq", samples="pictures", of=SEEING))
    rows += _methods(QuantConfig(levels="zeros", group_size=128), 4, SEEING)
    rows += _methods(QuantConfig(levels="zeros", group_size=32), 3, SEEING)
    rows += _methods(QuantConfig(mode="weight_only"), 4, PEBBLE)
    for size, mode in ((32, "dynamic"), (64, "dynamic"), (128, "weight_only")):
        rows += _methods(QuantConfig(levels="zeros", group_size=size, mode=mode), 4, PEBBLE)
    for size, mode in ((32, "weight_only"), (64, "dynamic"), (128, "dynamic")):
        rows += _methods(QuantConfig(levels="zeros", group_size=size, mode=mode), 3, PEBBLE)
    return rows


def _methods(config: QuantConfig, bits: int, of: tuple[str, ...]) -> list[Row]:
    """Return the methods of a format; MBQ and AWQ as published where both models are measured."""
    rows = [
        Row("nearest", config, "rtn", bits, of=of),
        Row("gptq", config, "gptq", bits, samples="pictures", of=of),
        Row("awq", config, "awq", bits, samples="pictures", of=of),
    ]
    if of == SEEING:
        rows.append(Row("mbq", config, "mbq", bits, samples="pictures", of=of))
        rows.append(Row("awq-clip", config, "awq-clip", bits, samples="pictures", of=of))
    return rows


ROWS = _rows()


def key_of(row: Row) -> str:
    """Return what a row is called in the result."""
    if row.config is None:
        return row.name
    config = row.config
    if config.bits == 8:
        return row.name
    levels = (
        config.levels if config.levels == "nonlinear" else f"{config.levels} g{config.group_size}"
    )
    activations = 8 if config.mode == "dynamic" else 16
    return f"W{row.bits}A{activations} {levels}, {row.name}"


class Seeing:
    """An exam of a model that sees: answers for each skill, and the divergence along answers."""

    def __init__(self, source: str, questions: int) -> None:
        self.source = source
        self._items = exam(questions)
        self._chat = lapilli.load(source, device="cpu", dtype="float32")
        self._ids, self.truth = self._answer(self._chat)
        self._logs = self._distributions(self._chat)

    def _answer(self, chat: Chat) -> tuple[list[list[int]], dict[str, float]]:
        params, ids = SamplingParams(max_new_tokens=80), []
        right: dict[str, list[bool]] = {}
        for start in range(0, len(self._items), AT_ONCE):
            batch = self._items[start : start + AT_ONCE]
            asked = [messages_of(item, draw(item.scene)) for item in batch]
            answers = chat.batch(asked, params)
            ids += [list(answer.token_ids) for answer in answers]
            for answer, item in zip(answers, batch, strict=True):
                right.setdefault(item.skill, []).append(is_exact(answer.text, item.answer))
        every = [one for some in right.values() for one in some]
        skills = {skill: sum(some) / len(some) for skill, some in sorted(right.items())}
        return ids, {**skills, "all": sum(every) / len(every)}

    @torch.inference_mode()
    def _distributions(self, chat: Chat) -> list[torch.Tensor]:
        pairs = zip(self._items[:COMPARED], self._ids, strict=False)
        return [_along(chat, item, ids) for item, ids in pairs if ids]

    def measure(self, chat: Chat) -> dict[str, Any]:
        """Return the figures of another form of the model."""
        ids, skills = self._answer(chat)
        logs = zip(self._logs, self._distributions(chat), strict=True)
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in logs])
        same = [mine == theirs for mine, theirs in zip(ids, self._ids, strict=True)]
        return {"skills": skills, "kl": kl.mean().item(), "same answers": sum(same) / len(same)}


def _along(chat: Chat, item: ExamItem, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities at each position of an answer, [answer, V]."""
    ready = chat.encode(messages_of(item, draw(item.scene)))
    model = chat.model
    prompt = model.embed_prompts([ready.encoded], [list(ready.media)])
    answer = model.language_model.embed(torch.tensor([ids[:-1]], dtype=torch.long))
    fused = torch.cat((prompt.inputs_embeds, answer), dim=1)
    length = fused.shape[1]
    mask = torch.ones(1, length, dtype=torch.bool)
    hidden = model(FusedBatch(fused, mask, torch.arange(length)[None]))
    return torch.log_softmax(model.logits(hidden[:, -len(ids) :])[0].float(), dim=-1)


class Reading:
    """Held-out text read by a language model."""

    def __init__(self, folder: Path) -> None:
        self.source = str(folder / "model")
        words = smollm2.tokenizer(folder / "words.json")
        ids = words.encode((folder / "held_out.txt").read_text(encoding="utf-8")).ids
        self._windows = torch.tensor(ids[: WINDOWS * LENGTH]).view(WINDOWS, LENGTH)
        chat = lapilli.load(self.source, device="cpu", dtype="float32")
        self._logs = [log_probabilities(chat, window) for window in self._windows]
        self.truth = self._figures(self._logs)

    def _figures(self, found: Sequence[torch.Tensor]) -> dict[str, float]:
        pairs = zip(found, self._windows, strict=True)
        losses = [functional.nll_loss(logs, ids[-len(logs) :]) for logs, ids in pairs]
        return {"perplexity": math.exp(torch.stack(losses).mean())}

    def measure(self, chat: Chat) -> dict[str, Any]:
        """Return the figures of another form of the model."""
        found = [log_probabilities(chat, window) for window in self._windows]
        pairs = list(zip(self._logs, found, strict=True))
        kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in pairs])
        same = torch.cat([p.argmax(-1) == q.argmax(-1) for p, q in pairs])
        return {**self._figures(found), "kl": kl.mean().item(), "same": same.float().mean().item()}


@dataclass(slots=True)
class Table:
    """The result, on disk after every row."""

    path: Path
    found: dict[str, Any] = field(default_factory=lambda: {"models": {}})

    def add(self, model: str, key: str, figures: dict[str, Any]) -> None:
        """Note a row of a model."""
        self.found["models"].setdefault(model, {})[key] = figures
        self.write()
        print(model, key, json.dumps(figures)[:200], flush=True)

    def write(self) -> None:
        """Write the result, whole or not at all."""
        aside = self.path.with_suffix(".new")
        aside.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.path)

    def has(self, model: str, key: str) -> bool:
        """Return whether a row is there."""
        return key in self.found["models"].get(model, {})


def rounded_by_llama(source: str, kind: str, peers: str, folder: Path) -> tuple[Chat, Figures]:
    """Return a model with the weights of a GGUF kind in floats, and the bits that they take."""
    chat = lapilli.load(source, device="cpu", dtype="float32")
    language_model: Any = chat.model.language_model
    config = asdict(language_model.config)
    sizes = {
        "num_hidden_layers": config["num_layers"],
        "num_attention_heads": config["num_heads"],
        "num_key_value_heads": config["num_kv_heads"],
        "rms_norm_eps": config["norm_eps"],
        "max_position_embeddings": config["max_positions"],
    }
    (folder / "config.json").write_text(json.dumps({**config, **sizes}), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", language_model.state_dict())
    run_peer(peers, "benchmarks.gguf_round", str(folder), str(folder / "out.npz"), kind)
    found = dict(np.load(folder / "out.npz"))
    bits = {name: float(found.pop(name)) for name in ("bits", "bits of the head")}
    state = {name: torch.from_numpy(values) for name, values in found.items()}
    language_model.load_state_dict(state, assign=True)
    return chat, bits


def make(source: str, row: Row, calibration: str, number: int, folder: Path) -> tuple[Chat, float]:
    """Return the model in the form of a row, and the seconds that making it took."""
    start = time.perf_counter()
    if row.config is None or (not row.method):
        chat = lapilli.load(source, device="cpu", dtype="float32", quantize=row.config)
        return chat, time.perf_counter() - start
    target = folder / "llava-quantized"
    options = CalibrationOptions(
        method=row.method, bits=row.bits, rotate=row.rotate, samples=calibration, number=number
    )
    quantize_from_samples(source, target, row.config, options, overwrite=True)
    seconds = time.perf_counter() - start
    return lapilli.load(str(target), device="cpu", dtype="float32"), seconds


def measure(
    model: str,
    exam_of: Seeing | Reading,
    samples: dict[str, str],
    table: Table,
    peers: str | None = None,
) -> None:
    """Measure the rows of a model that are not there yet."""
    for row in ROWS:
        key = key_of(row)
        if model not in row.of or table.has(model, key):
            continue
        if row.gguf:
            if peers:
                with tempfile.TemporaryDirectory() as folder:
                    chat, bits = rounded_by_llama(exam_of.source, row.gguf, peers, Path(folder))
                    table.add(model, key, {**exam_of.measure(chat), **bits})
            continue
        with tempfile.TemporaryDirectory() as folder:
            chat, seconds = make(
                exam_of.source, row, samples.get(row.samples, ""), SAMPLES[model], Path(folder)
            )
            language_model: Any = chat.model.language_model
            figures = exam_of.measure(chat) if row.config else {"skills": exam_of.truth}
            if isinstance(exam_of, Reading) and row.config is None:
                figures = dict(exam_of.truth)
            bits = own_bits(language_model)
            config = None if row.config is None else asdict(row.config)
            table.add(model, key, {**figures, **bits, "seconds": seconds, "config": config})


SPEEDS: dict[str, QuantConfig | None] = {
    "float32": None,
    "int8": QuantConfig(bits=8),
    "W4A8 nonlinear": QuantConfig(),
    "W4A16 nonlinear": QuantConfig(mode="weight_only"),
    "W4A8 zeros g32": QuantConfig(levels="zeros", group_size=32),
    "W4A8 zeros g128": QuantConfig(levels="zeros", group_size=128),
    "W4A16 zeros g128": QuantConfig(levels="zeros", group_size=128, mode="weight_only"),
}
"""Formats whose speed is measured; the method that chose the integers makes no difference."""
PROMPT, DECODED, ROUNDS = 512, 48, 3


def speeds(source: str) -> dict[str, dict[str, float]]:
    """Return prompt and new tokens a second of every format, medians of rounds in turn."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"prompt": [], "decode": []} for name in SPEEDS
    }
    sizes: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, config in SPEEDS.items():
            options = EngineOptions(speculate="off")
            chat = lapilli.load(
                source, device="cpu", dtype="float32", quantize=config, engine=options
            )
            language_model: Any = chat.model.language_model
            tensors = [*language_model.parameters(), *language_model.buffers()]
            sizes[name] = sum(tensor.nbytes for tensor in tensors) / 1e6
            prompts = ([7, 11, 13, 17] * (PROMPT // 4), [19, 23, 29, 31] * (PROMPT // 4))
            _seconds(chat, prompts[0], 2)  # what is made once
            first = _seconds(chat, prompts[1], 1)
            whole = _seconds(chat, [*prompts[1][1:], 37], DECODED)
            found[name]["prompt"].append(PROMPT / first)
            found[name]["decode"].append((DECODED - 1) / max(whole - first, 1e-9))
    return {
        name: {"MB": sizes[name], **{key: statistics.median(one) for key, one in rows.items()}}
        for name, rows in found.items()
    }


def _seconds(chat: Chat, ids: list[int], tokens: int) -> float:
    end = chat.tokenizer.eos_id
    params = SamplingParams(max_new_tokens=tokens, logit_bias={} if end is None else {end: -100.0})
    request = Request(EncodedPrompt(ids, [False] * len(ids), ()), (), params)
    start = time.perf_counter()
    list(chat.engine.run([request]))
    return time.perf_counter() - start


def drawn_samples(folder: Path) -> dict[str, str]:
    """Write calibration samples of pebble's world; return the files, by kind."""
    pictures = write_calibration(folder, SAMPLES["pebble"])
    records = json.loads(pictures.read_text(encoding="utf-8"))
    for record in records:
        del record["image"]
        first = record["conversations"][0]
        first["value"] = first["value"].replace("<image>\n", "")
    text = folder / "text.json"
    text.write_text(json.dumps(records), encoding="utf-8")
    return {"pictures": str(pictures), "text": str(text)}


def texts_of_training(folder: Path) -> dict[str, str]:
    """Write texts that SmolLM2 was trained on; they are its samples of every kind."""
    path = folder / "training.txt"
    path.write_text("\n\n".join(smollm2.training_texts()[::7]), encoding="utf-8")
    return {"pictures": str(path), "text": str(path)}


def main(arguments: list[str] | None = None) -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--larger", type=Path, help="the larger sibling of pebble")
    parser.add_argument("--text", type=Path, help="folder of quality.py with SmolLM2")
    parser.add_argument("--peers-python", help="with llama.cpp, for the rows of GGUF")
    parser.add_argument("--only", default="", help="one model: pebble, larger or text")
    parser.add_argument("--speed", action="store_true", help="only speeds, on the text model")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    options = parser.parse_args(arguments)
    table = Table(options.out)
    table.found["samples"] = SAMPLES
    if options.resume and options.out.is_file():
        table.found |= json.loads(options.out.read_text(encoding="utf-8"))
    if options.speed:
        table.found["speeds"] = speeds(str(options.text / "model"))
        table.write()
        return
    seen = {"pebble": "pebble", "larger": options.larger and str(options.larger)}
    with tempfile.TemporaryDirectory() as place:
        for model, source in seen.items():
            if source and options.only in ("", model):
                samples = drawn_samples(Path(place))
                exam_of = Seeing(source, options.questions)
                table.found.setdefault("questions", {})[model] = options.questions
                measure(model, exam_of, samples, table, options.peers_python)
        if options.text and options.only in ("", "text"):
            measure("text", Reading(options.text), texts_of_training(Path(place)), table)


if __name__ == "__main__":
    main()
