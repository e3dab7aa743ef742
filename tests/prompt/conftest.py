"""Golden cases and the tokenizers that they were made with."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lapilli.prompt.tokenizer import Tokenizer, TokenizerFiles, build_tokenizer

NEOX_TOKENS = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")


def token(content: str) -> dict[str, object]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"content": content, **flags}


LLAMA_TOKENS = {
    "bos_token": token("<s>"),
    "eos_token": token("</s>"),
    "unk_token": token("<unk>"),
}


class Goldens:
    """Cases of the original and its tokenizer files."""

    def __init__(self, directory: Path, name: str) -> None:
        self._tokenizers: dict[str, Tokenizer] = {}
        self.cases_dir = directory / "cases" / name
        assets = directory / "assets" / name
        self.spm = (assets / "tokenizer.model").read_bytes()
        self.neox = (assets / "neox_tokenizer.json").read_text(encoding="utf-8")

    def cases(self, variant: str, op: str) -> Iterator[dict[str, Any]]:
        text = (self.cases_dir / variant / "cases.json").read_text(encoding="utf-8")
        return (case for case in json.loads(text)["cases"] if case["op"] == op)

    def files(self, spec: dict[str, Any]) -> TokenizerFiles:
        """What make_checkpoint.py writes for a tokenizer of a golden case."""
        if spec.get("type") == "neox":
            config = {
                "tokenizer_class": "GPTNeoXTokenizer",
                "clean_up_tokenization_spaces": True,
                "model_max_length": spec.get("model_max_length", 2048),
            }
            return TokenizerFiles(
                json=self.neox, config=config | NEOX_TOKENS, special_map=NEOX_TOKENS
            )
        config = {
            "add_bos_token": True,
            "add_eos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": spec.get("model_max_length", 2048),
            "padding_side": spec.get("padding_side", "right"),
            "tokenizer_class": "LlamaTokenizer",
            "pad_token": None,
            **LLAMA_TOKENS,
        }
        if spec.get("legacy") is not None:
            config["legacy"] = spec["legacy"]
        special = LLAMA_TOKENS | ({"pad_token": "<unk>"} if spec.get("pad_unk", True) else {})
        return TokenizerFiles(
            model=self.spm, config=config, special_map=special, added=spec.get("added") or {}
        )

    def tokenizer(self, spec: dict[str, Any], grow: Sequence[Sequence[str]] = ()) -> Tokenizer:
        """The tokenizer of a golden case with `grow` added, made once: not to be changed."""
        key = json.dumps([spec, grow], sort_keys=True)
        if key not in self._tokenizers:
            tokenizer = self._tokenizers[key] = self.build(spec)
            for names in grow:
                tokenizer.add_tokens(names, special=True)
        return self._tokenizers[key]

    def build(self, spec: dict[str, Any]) -> Tokenizer:
        """The tokenizer of a golden case, to be changed at will."""
        fast = bool(spec.get("fast")) or spec.get("type") == "neox"
        return build_tokenizer(self.files(spec), fast=fast)

    def of_model(self, spec: dict[str, Any]) -> Tokenizer:
        """The tokenizer of a model's spec.json, grown as the original grows it at loading."""
        mm = spec["mm"]
        grow = [["<im_patch>"]] if mm.get("mm_use_im_patch_token", True) else []
        grow += [["<im_start>", "<im_end>"]] if mm.get("mm_use_im_start_end", False) else []
        return self.tokenizer(spec["tokenizer"] | {"fast": spec["lm"]["arch"] != "llama"}, grow)

    def specs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and spec.json of every model."""
        for directory in sorted(self.cases_dir.glob("llava*")):
            text = (directory / "spec.json").read_text(encoding="utf-8")
            yield directory.name, json.loads(text)


SPECS: dict[str, dict[str, Any]] = {
    "slow_legacy": {"legacy": True},
    "slow": {"legacy": False},
    "fast": {"fast": True},
    "neox": {"type": "neox"},
}


@pytest.fixture(scope="session")
def goldens(conformance: Path) -> Goldens:
    """The open set of golden cases."""
    return Goldens(conformance, "open")


@pytest.fixture(params=SPECS)
def tokenizer(request: pytest.FixtureRequest, goldens: Goldens) -> Tokenizer:
    """One tokenizer of every kind."""
    return goldens.tokenizer(SPECS[request.param])


@pytest.fixture(params=SPECS)
def fresh_tokenizer(request: pytest.FixtureRequest, goldens: Goldens) -> Tokenizer:
    """One tokenizer of every kind, to be changed at will."""
    return goldens.build(SPECS[request.param])
