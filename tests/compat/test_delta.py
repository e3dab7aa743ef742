"""A base and a difference make the LLaVA that the difference was taken of."""

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from lapilli.compat.__main__ import main
from tests.compat.conftest import MakeCheckpoint

Weights = dict[str, torch.Tensor]
EMBEDDINGS = "model.embed_tokens.weight"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Name of a program, its options -> it has run."""
    monkeypatch.setattr(sys, "argv", sys.argv)

    def run(name: str, **options: object) -> None:
        monkeypatch.delitem(sys.modules, f"llava.model.{name}", raising=False)
        given = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items()]
        main(["-m", f"llava.model.{name}", *(word for pair in given for word in pair)])

    return run


def weights(path: str | Path) -> Weights:
    from llava.model import LlavaLlamaForCausalLM

    return LlavaLlamaForCausalLM.from_pretrained(path, torch_dtype=torch.float16).state_dict()


def write_base(path: Path, llava: Weights, checkpoint: str, drop_rows: int) -> Weights:
    """Write a language model of other weights, with fewer tokens than the LLaVA has."""
    from llava.model import LlavaConfig

    said = LlavaConfig.from_pretrained(checkpoint).to_dict() | {"model_type": "llama"}
    said["vocab_size"] = len(llava[EMBEDDINGS]) - drop_rows
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaForCausalLM.config_class(**said)).half()
    base.save_pretrained(path)
    return base.state_dict()


@pytest.mark.parametrize("drop_rows", [0, 2])
def test_base_and_delta_are_the_target(
    make_checkpoint: MakeCheckpoint, program: Any, tmp_path: Path, drop_rows: int
) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    expected = weights(path)
    base = write_base(tmp_path / "base", expected, path, drop_rows)
    names = {"base_model_path": tmp_path / "base", "delta_path": tmp_path / "llava-delta"}
    program("make_delta", target_model_path=path, **names)
    program("apply_delta", target_model_path=tmp_path / "llava", **names)
    found, delta = weights(tmp_path / "llava"), weights(tmp_path / "llava-delta")
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-3, rtol=1e-2)
    rows = len(base[EMBEDDINGS])
    assert torch.equal(delta[EMBEDDINGS][:rows], expected[EMBEDDINGS][:rows] - base[EMBEDDINGS])
    assert torch.equal(delta[EMBEDDINGS][rows:], expected[EMBEDDINGS][rows:])
    assert torch.equal(
        delta["model.mm_projector.0.weight"], expected["model.mm_projector.0.weight"]
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "llava")("a b") == (
        AutoTokenizer.from_pretrained(path)("a b")
    )


def test_another_base_is_one_line(
    make_checkpoint: MakeCheckpoint,
    program: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    write_base(tmp_path / "base", weights(path), path, drop_rows=-3)
    names = {"base_model_path": tmp_path / "base", "delta_path": path}
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        program("apply_delta", target_model_path=tmp_path / "llava", **names)
    said = capsys.readouterr().err
    assert "give the base that it was made from\n" in said
    assert not (tmp_path / "llava").exists()


@pytest.mark.parametrize("place", ["lost/in/paths", "empty", "untold", "damaged"])
def test_what_cannot_be_read_is_one_line(
    program: Any,
    tmp_path: Path,
    place: str,
    make_checkpoint: MakeCheckpoint,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    path = Path(make_checkpoint("llava-v1.5-tiny-pad")["model_path"])
    shutil.copytree(path, "untold", ignore=shutil.ignore_patterns("tokenizer*", "special_*"))
    shutil.copytree(path, "damaged", ignore=shutil.ignore_patterns("*.bin", "*.safetensors*"))
    Path("damaged/model.safetensors").write_bytes(bytes(64))
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        program("consolidate", src=place, dst="out")
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("llava.model.consolidate: ")
    assert place in said.splitlines()[-1]


def test_consolidated_weights_are_the_same(
    make_checkpoint: MakeCheckpoint, program: Any, tmp_path: Path
) -> None:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    program("consolidate", src=path, dst=tmp_path / "llava")
    expected, found = weights(path), weights(tmp_path / "llava")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    from llava.model.builder import load_pretrained_model

    _, model, processor, _ = load_pretrained_model(str(tmp_path / "llava"), None, "llava")
    assert model.get_vision_tower().is_loaded
    assert processor is not None
