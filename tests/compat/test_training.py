import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.compat import conversation
from lapilli.compat.training import train
from lapilli.compat.training_arguments import parse_arguments
from lapilli.compat.training_data import LazySupervisedDataset
from lapilli.compat.training_files import recorded
from lapilli.errors import CheckpointError, ConfigError, PromptError, UnsupportedModelError
from tests.compat.conftest import MakeCheckpoint

NEEDED = ["--model_name_or_path", "b", "--vision_tower", "v", "--data_path", "d"]
NEEDED += ["--output_dir", "o"]


@pytest.fixture(autouse=True)
def _same_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training program assigns a global of the conversation module."""
    monkeypatch.setattr(conversation, "default_conversation", conversation.default_conversation)


def arguments(made: dict[str, Any], folder: Path, *more: str) -> list[str]:
    records = [
        {
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": f"<image>\nWhat is number {i}?"},
                {"from": "gpt", "value": "A boat." * (i + 1)},
            ],
        }
        for i in range(4)
    ]
    (folder / "records.json").write_text(json.dumps(records), encoding="utf-8")
    Image.linear_gradient("L").save(folder / "a.png")
    return [
        *("--model_name_or_path", made["model_base"], "--vision_tower", made["vision"]),
        *("--data_path", str(folder / "records.json"), "--image_folder", str(folder)),
        *("--output_dir", str(folder / "llava-out"), "--mm_vision_select_layer", "-2"),
        *("--mm_use_im_patch_token", "False", "--mm_projector_type", "mlp2x_gelu"),
        *("--bf16", "False", "--report_to", "none", "--version", "v1", *more),
    ]


@pytest.mark.slow
def test_what_was_trained_can_be_loaded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from llava.model.builder import load_pretrained_model

    made = make_checkpoint("llava-v1.5-tiny-projector")
    options = arguments(
        made,
        tmp_path,
        *("--tune_mm_mlp_adapter", "True", "--learning_rate", "1e-2", "--num_train_epochs", "2"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"),
        *("--lr_scheduler_type", "constant", "--group_by_modality_length", "True"),
    )
    trained = train(arguments=options)
    assert len(trained.losses) == 4
    assert trained.losses[-1] < trained.losses[0]
    out = tmp_path / "llava-out"
    weights = torch.load(out / "mm_projector.bin", weights_only=True)
    _, model, _, _ = load_pretrained_model(str(out), made["model_base"], "llava", device="cpu")
    named = dict(model.named_parameters())
    for name, value in weights.items():
        assert torch.equal(named[name], value)
    chosen = inspect_checkpoint(out, base=made["model_base"]).template
    assert chosen == {"name": "v1", "reason": "config.json says lapilli_template v1"}


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v1", {"lapilli_template": "v1"}),
        ("llava_llama_2", {"lapilli_template": "llava_llama_2"}),
        ("v0", {"lapilli_template": "vicuna_v1"}),
        ("nonsense", {"lapilli_template": "vicuna_v1"}),
        ("plain", {}),
    ],
)
def test_the_template_is_recorded_for_our_own_loader(
    version: str, expected: dict[str, str]
) -> None:
    assert recorded(parse_arguments([*NEEDED, "--version", version])) == expected


@pytest.mark.slow
def test_a_fresh_lora_can_be_loaded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from llava.model.builder import load_pretrained_model

    made = make_checkpoint("llava-v1.5-tiny-projector")
    options = arguments(
        made, tmp_path, *("--lora_enable", "True", "--lora_r", "2", "--max_steps", "1")
    )
    train(arguments=[*options, "--learning_rate", "1e-2", "--lr_scheduler_type", "constant"])
    out = str(tmp_path / "llava-out")
    _, model, _, _ = load_pretrained_model(out, made["model_base"], "llava-lora", device="cpu")
    base = load_pretrained_model(made["model_base"], None, "base", device="cpu")[1]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(
        dict(model.named_parameters())[name], dict(base.named_parameters())[name]
    )


def test_a_missing_adapter_is_named(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    made = make_checkpoint("llava-v1.5-tiny-projector")
    options = arguments(made, tmp_path, "--pretrain_mm_mlp_adapter", "lost.bin")
    with pytest.raises(CheckpointError, match=r"lost\.bin: no such file"):
        train(arguments=options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--learning_rte", "1"], "unknown training option '--learning_rte'"),
        (["stray"], "unknown training option 'stray'"),
        (["--learning_rate", "fast"], "--learning_rate fast"),
        (["--lora_enable", "maybe"], "expected True or False"),
        (["--lr_scheduler_type", "spiral"], "expected one of linear, cosine, constant"),
        (["--data_path", "None"], "--data_path is missing"),
    ],
)
def test_options_that_cannot_be_read(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments([*NEEDED, *given])


@pytest.mark.parametrize("given", [["--bits", "4"], ["--lora_enable", "--lora_bias", "all"]])
def test_options_that_are_not_there(given: list[str]) -> None:
    with pytest.raises(UnsupportedModelError, match="only"):
        parse_arguments([*NEEDED, *given])


def test_switches_and_equal_signs() -> None:
    read = parse_arguments([*NEEDED, "--lora_enable", "--lora_r=8", "--deepspeed", "zero.json"])
    assert (read.lora_enable, read.lora_r, read.learning_rate) == (True, 8, 5e-5)


def test_records_must_be_a_list(loaded: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(PromptError, match="does not hold a list"):
        LazySupervisedDataset(path, loaded[0], None)
