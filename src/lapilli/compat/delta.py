"""Programs of the original that write a checkpoint anew.

llava.model.apply_delta    a base and the published difference from it become a LLaVA
llava.model.make_delta     the other way round
llava.model.consolidate    the same weights again, in float16
"""

import argparse
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from lapilli.checkpoint.source import resolve
from lapilli.compat import models
from lapilli.compat.mm_utils import Foreign, auto_upgrade
from lapilli.errors import CheckpointError

__all__ = ["apply_delta", "consolidate_ckpt", "make_delta"]

HALF = {"torch_dtype": torch.float16}
OWN = ("mm_projector", "vision_tower", "image_newline")
"""Parts of names that a base has not."""
RESIZED = ("model.embed_tokens.weight", "lm_head.weight")
"""Parameters that have a row more for each token that was added."""


def apply_delta(base_model_path: str, target_model_path: str, delta_path: str) -> None:
    """Write to `target_model_path` the sum of a base and the difference of a LLaVA from it.

    Raises:
        CheckpointError: one cannot be read, or the two do not belong together.
    """
    model = _read(models.LlavaLlamaForCausalLM, delta_path, **HALF)
    _add(model, base_model_path, 1)
    _write(model, delta_path, target_model_path)


def make_delta(
    base_model_path: str, target_model_path: str, delta_path: str, hub_repo_id: str | None = None
) -> None:
    """Write to `delta_path` (and to the hub, if asked) the difference of a LLaVA from a base.

    Raises:
        CheckpointError: one cannot be read, or the two do not belong together.
    """
    auto_upgrade(target_model_path)
    model = _read(AutoModelForCausalLM, target_model_path, **HALF)
    _add(model, base_model_path, -1)
    published: dict[str, Any] = {}
    if hub_repo_id:
        published = {"push_to_hub": True, "repo_id": hub_repo_id}
    _write(model, target_model_path, delta_path, **published)


def consolidate_ckpt(src_path: str, dst_path: str) -> None:
    """Write a checkpoint again in float16, in as few files as it takes, without its tower.

    Raises:
        CheckpointError: it cannot be read.
    """
    auto_upgrade(src_path)
    model = _read(AutoModelForCausalLM, src_path, **HALF)
    _write(model, src_path, dst_path, use_fast=False)


def _read(kind: Foreign, path: str, **options: Foreign) -> Foreign:
    """Return what transformers reads of a checkpoint, or one error for its many."""
    folder = resolve(path)
    try:
        return kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        said = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read by {kind.__name__}: {said}") from error


def _add(model: Foreign, base_path: str, sign: int) -> None:
    """Add `sign` times a base to a model, in float16 as the original does."""
    base = _read(AutoModelForCausalLM, base_path, **HALF).state_dict()
    for name, parameter in model.state_dict().items():
        if name not in base:
            if not any(part in name for part in OWN):
                raise CheckpointError(
                    f"{base_path} has no {name}: give the base that the LLaVA was made from"
                )
            continue
        rows = base[name]
        fits = len(parameter) >= len(rows) if name in RESIZED else len(parameter) == len(rows)
        if not fits or parameter.shape[1:] != rows.shape[1:]:
            raise CheckpointError(
                f"{name} is {list(rows.shape)} in {base_path}, but {list(parameter.shape)} in the "
                "LLaVA: give the base that it was made from"
            )
        parameter[: len(rows)] += sign * rows


def _write(
    model: Foreign, tokenizer_path: str, path: str, *, use_fast: bool = True, **published: Foreign
) -> None:
    tokenizer = _read(AutoTokenizer, tokenizer_path, use_fast=use_fast)
    model.save_pretrained(path, **published)
    tokenizer.save_pretrained(path, **published)


def run(kind: str) -> None:
    """Run a program with the options of the command line."""
    program = {"apply_delta": apply_delta, "make_delta": make_delta}.get(kind, consolidate_ckpt)
    parser = argparse.ArgumentParser()
    paths = ("--base-model-path", "--target-model-path", "--delta-path")
    for name in ("--src", "--dst") if kind == "consolidate" else paths:
        parser.add_argument(name, required=True)
    if kind == "make_delta":
        parser.add_argument("--hub-repo-id")
    program(*vars(parser.parse_args()).values())
