import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.compat import conversation
from lapilli.compat.trainer import LazySupervisedDataset
from lapilli.compat.training import (
    find_all_linear_names,
    parse_arguments,
    recipe_of,
    smart_tokenizer_and_embedding_resize,
    starting_config,
    train,
)
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
    train(arguments=options)
    out = tmp_path / "llava-out"
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert len(history) == 4
    assert history[-1]["loss"] < history[0]["loss"]
    assert not (out / ".lapilli").exists()
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
    make_checkpoint: MakeCheckpoint, tmp_path: Path, version: str, expected: dict[str, str]
) -> None:
    made = make_checkpoint("llava-v1.5-tiny-projector")
    options = arguments(made, tmp_path, "--version", version)
    config = starting_config(parse_arguments(options))
    assert {k: v for k, v in config.items() if k == "lapilli_template"} == expected


def test_options_become_a_recipe() -> None:
    given = [*NEEDED, "--lora_enable", "True", "--bits", "4", "--lora_r", "8", "--bf16", "True"]
    given += ["--gradient_checkpointing", "True", "--save_steps", "7", "--report_to", "wandb"]
    given += ["--group_by_modality_length", "True", "--mm_projector_lr", "2e-5"]
    given += ["--deepspeed", "./scripts/zero3.json", "--freeze_mm_mlp_adapter", "True"]
    given += ["--warmup_ratio", "0.03", "--lr_scheduler_type", "constant_with_warmup"]
    recipe = recipe_of(parse_arguments(given), Path("s"), {"model_type": "llava_llama"})
    assert (recipe.stage, recipe.run.precision, recipe.run.sharding) == (
        *("instruct", "bfloat16", "fsdp"),
    )
    assert recipe.lora is not None
    assert (recipe.lora.rank, recipe.lora.base, recipe.lora.double_quant) == (8, "nf4", True)
    assert (recipe.run.save_every, recipe.run.loggers) == (7, ("wandb",))
    assert (recipe.run.reduction, recipe.data.group) == ("llava", "modality")
    assert (recipe.optim.projector_lr, recipe.optim.warmup_ratio) == (2e-5, 0.03)
    assert recipe.model.freeze == ("modalities.image.projector.",)


@pytest.mark.slow
def test_a_killed_run_goes_on(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lapilli.compat import training

    made = make_checkpoint("llava-v1.5-tiny-projector")
    options = arguments(
        made,
        tmp_path,
        *("--tune_mm_mlp_adapter", "True", "--max_steps", "2", "--save_steps", "1"),
        *("--per_device_train_batch_size", "2"),
    )
    with monkeypatch.context() as patched:

        def killed(*_: object) -> None:
            raise KeyboardInterrupt

        patched.setattr(training, "_save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(arguments=options)
    assert (tmp_path / "llava-out/.lapilli/state.pt").is_file()
    train(arguments=options)
    assert (tmp_path / "llava-out/mm_projector.bin").is_file()


@pytest.mark.slow
def test_a_trainer_of_transformers_trains_it(
    make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    from llava.model.builder import load_pretrained_model
    from llava.train.llava_trainer import LLaVATrainer
    from llava.train.train import make_supervised_data_module
    from transformers import TrainingArguments

    made = make_checkpoint("llava-v1.5-tiny-pad")
    arguments({"model_base": "b", "vision": "v"}, tmp_path)
    tokenizer, model, processor, _ = load_pretrained_model(
        made["model_path"], None, "llava", device="cpu"
    )
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.model_max_length = 128
    data = SimpleNamespace(
        data_path=str(tmp_path / "records.json"),
        is_multimodal=True,
        mm_use_im_start_end=False,
        image_folder=str(tmp_path),
        image_processor=processor,
        image_aspect_ratio="pad",
    )
    settings = TrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=2,
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
    )
    settings.group_by_modality_length, settings.mm_projector_lr = True, 1e-3
    settings.tune_mm_mlp_adapter = True
    trainer = LLaVATrainer(
        model=model,
        tokenizer=tokenizer,  # as the original's release of transformers calls it
        args=settings,
        **make_supervised_data_module(tokenizer, data),
    )
    # The original's training program leaves the tower in half precision under float32 layers.
    model.get_vision_tower().to(torch.float16)
    trainer.train()
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-3, settings.learning_rate}
    saved = torch.load(tmp_path / "run/checkpoint-2/mm_projector.bin", weights_only=True)
    assert "model.mm_projector.0.weight" in saved
    assert trainer.processing_class is tokenizer
    trainer.save_model(str(tmp_path / "whole"))
    assert not list((tmp_path / "whole").glob("*.safetensors"))  # the projector alone is trained


def test_names_of_the_training_program(make_checkpoint: MakeCheckpoint) -> None:
    from llava.model.builder import load_pretrained_model

    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    tokenizer, model, _, _ = load_pretrained_model(path, None, "llava", device="cpu")
    layers = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert find_all_linear_names(model) == layers
    smart_tokenizer_and_embedding_resize({"pad_token": "[PAD]"}, tokenizer, model)
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[-1], rows[:-1].mean(dim=0))
    assert (tokenizer.pad_token_id, len(rows)) == (1000, 1001)


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
        (["--learning_rte", "1"], "learning_rte"),
        (["stray"], "stray"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--lora_enable", "maybe"], "lora_enable"),
        (["--data_path", "None"], "--data_path is missing"),
    ],
)
def test_options_that_cannot_be_read(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_arguments([*NEEDED, *given])


@pytest.mark.parametrize(
    "given",
    [
        ["--bits", "4"],
        ["--bits", "8", "--lora_enable"],
        ["--lora_enable", "--lora_bias", "all"],
        ["--fp16", "True"],
        ["--optim", "adafactor"],
        ["--lr_scheduler_type", "polynomial"],
    ],
)
def test_options_that_are_not_there(given: list[str]) -> None:
    with pytest.raises(UnsupportedModelError, match="only"):
        parse_arguments([*NEEDED, *given])


def test_switches_and_equal_signs() -> None:
    _, _, read = parse_arguments([*NEEDED, "--lora_enable", "--lora_r=8", "--tf32", "True"])
    assert (read.lora_enable, read.lora_r, read.learning_rate) == (True, 8, 5e-5)


def test_records_must_be_a_list(loaded: Any, tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(PromptError, match="does not hold a list"):
        LazySupervisedDataset(path, loaded[0], None)
    path.write_text('[{"id": 1, "id": 2}]', encoding="utf-8")
    with pytest.raises(PromptError, match="the key 'id' comes twice"):
        LazySupervisedDataset(path, loaded[0], None)
