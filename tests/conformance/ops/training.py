"""Ops of training: labels, dataset, sampler, train."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from lapilli.checkpoint.keymaps import ORIGINAL
from lapilli.train import launch
from lapilli.train.recipe import Recipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.optim import decays, peak_lr
from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check
from tests.conformance.ops.pictures import compare_pixels, picture_processor
from tests.conformance.ops.text import open_tokenizer
from tests.conformance.ops.vision import loaded

IGNORE_INDEX = -100
WARNING = re.compile(r"tokenization mismatch: (\d+ vs\. \d+)")


@contextlib.contextmanager
def conversation(version: str) -> Iterator[None]:
    """Training takes the template from a global of the conversation module."""
    import llava.conversation

    chosen = llava.conversation.conv_templates[version]
    with mock.patch.object(llava.conversation, "default_conversation", chosen):
        yield


def training_tokenizer(workshop: Workshop, given: dict[str, Any]) -> Any:
    """A tokenizer as training prepares it: the pad token is the unknown token."""
    tokenizer = open_tokenizer(workshop, given)
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def labels(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.train.train import preprocess, preprocess_multimodal

    given, expect = case.given, case.expect
    tokenizer = training_tokenizer(workshop, given["tokenizer"])
    start_end = given.get("im_start_end", False)
    if start_end:
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=start_end)
    sources = [[dict(turn) for turn in given["conversation"]]]
    out = io.StringIO()

    def run() -> dict[str, Any]:
        nonlocal sources
        if given["has_image"]:
            sources = preprocess_multimodal(sources, arguments)
        return preprocess(sources, tokenizer, has_image=given["has_image"])

    with conversation(given["version"]), contextlib.redirect_stdout(out):
        if case.raises:
            check.raises(case.raises, run)
            return
        found = run()
    values = [turn["value"] for turn in sources[0]]
    check.equal("values_after_multimodal", values, expect["values_after_multimodal"])
    ids, masked = found["input_ids"][0], found["labels"][0]
    check.equal("input_ids", ids, expect["input_ids"])
    check.equal("labels", masked, expect["labels"])
    check.equal("label_runs", runs(masked.tolist()), expect["label_runs"])
    warning = WARNING.search(out.getvalue())
    check.equal("mismatch_warning", warning is not None, expect["mismatch_warning"])
    wanted = expect["mismatch"] and expect["mismatch"].rstrip(".")
    check.equal("mismatch", warning and warning.group(1), wanted)


def runs(labels: list[int]) -> list[list[int]]:
    """[start, end) of the stretches that count."""
    found: list[list[int]] = []
    for at, label in enumerate(labels):
        if label == IGNORE_INDEX:
            continue
        if found and found[-1][1] == at:
            found[-1][1] = at + 1
        else:
            found.append([at, at + 1])
    return found


def dataset(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset

    given, expect = case.given, case.expect
    for record in given["records"]:
        if "image" in record:
            workshop.picture(record["image"])
    tokenizer = training_tokenizer(workshop, given["tokenizer"])
    path = workshop.folder("records") / f"{case.id}.json"
    path.write_text(json.dumps(given["records"]), encoding="utf-8")
    arguments = SimpleNamespace(
        is_multimodal=True,
        mm_use_im_start_end=False,
        image_folder=str(workshop.variant.images),
        image_processor=picture_processor(given["crop"]),
        image_aspect_ratio=given["aspect"],
    )
    with conversation(given["version"]), contextlib.redirect_stdout(io.StringIO()):
        data = LazySupervisedDataset(str(path), tokenizer, arguments)
        check.equal("lengths", data.lengths, expect["lengths"])
        check.equal("modality_lengths", data.modality_lengths, expect["modality_lengths"])
        batch = DataCollatorForSupervisedDataset(tokenizer)([data[i] for i in given["batch"]])
    for name in ("input_ids", "labels"):
        check.equal(name, batch[name], expect[name])
    check.equal("attention_mask", batch["attention_mask"].long(), expect["attention_mask"])
    jpeg = any(record.get("image", "").endswith(".jpg") for record in given["records"])
    compare_pixels(check, batch["images"], case, expect["images"], jpeg=jpeg)


def sampler(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.train.llava_trainer import LengthGroupedSampler

    given = case.given
    torch.manual_seed(given["global_seed"])
    found = LengthGroupedSampler(
        batch_size=given["batch_size"],
        world_size=given["world_size"],
        lengths=given["lengths"],
        generator=torch.Generator().manual_seed(given["seed"]),
        group_by_modality=given["by_modality"],
    )
    if case.raises:
        check.raises(case.raises, lambda: list(found))
        return
    check.equal("indices", list(found), case.expect["indices"])
    check.equal("length", len(found), len(given["lengths"]))


LOSS_ATOL = 2e-4
SAVED_ATOL = 2e-4
OUTLIERS = 0.01  # AdamW turns the noise of a gradient near zero into a whole step


def train(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.train.train import train as original_train

    for record in case.given["records"]:
        if "image" in record:
            workshop.picture(record["image"])
    output = workshop.folder(f"train-{case.id}")
    arguments = _train_arguments(case, workshop, output)
    described: list[dict[str, Any]] = []

    def run() -> None:
        # The golden numbers begin with weights that the original drew, and so must ours.
        begins = partial(_begin, case, described)
        out, errors = io.StringIO(), io.StringIO()
        with (
            mock.patch.object(launch, "choose_trainable", begins),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            original_train(arguments=arguments)

    if case.raises:
        check.raises(case.raises, run)
        return
    run()
    check.equal("optimizer_groups", described, case.expect["optimizer_groups"])
    if "batch_shapes" in case.expect:
        check.equal("batch_shapes", _batch_shapes(case, workshop), case.expect["batch_shapes"])
    _compare_training(case, check, output)
    shutil.rmtree(output)


def _begin(
    case: Case, described: list[dict[str, Any]], model: Any, recipe: Recipe
) -> tuple[str, ...]:
    """Choose what is trained, lay the golden start over it and describe the groups."""
    chosen = choose_trainable(model, recipe)
    parameters = dict(model.named_parameters())
    named = {_original_name(name, lora=recipe.lora is not None): name for name in parameters}
    with torch.no_grad():
        for name, value in case.arrays.items():
            if name.startswith("initial/"):
                parameters[named[name.removeprefix("initial/")]].copy_(torch.from_numpy(value))
    described += _groups(model, chosen, recipe)
    return chosen


def _original_name(name: str, *, lora: bool) -> str:
    """What the original calls a parameter of ours, inside of its wrapper where it has one."""
    module, half, rest = name.partition(".lora_")
    foreign = ORIGINAL.to_foreign(f"{module}.weight" if half else name) or name
    if half:
        foreign = (
            foreign.removesuffix(".weight") + half + rest.replace(".weight", ".default.weight")
        )
    return f"base_model.model.{foreign}" if lora else foreign


def _groups(model: Any, chosen: tuple[str, ...], recipe: Recipe) -> list[dict[str, Any]]:
    """The groups of the optimizer as the original lists them, by what ours decides for each."""
    optim = recipe.optim
    rates = [optim.lr] + ([] if optim.projector_lr is None else [optim.projector_lr])
    members: dict[tuple[float, bool], list[str]] = {
        (rate, decayed): [] for rate in rates for decayed in (True, False)
    }
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if full in chosen:
                key = (peak_lr(full, optim), decays(module, name, parameter, optim))
                members[key].append(_original_name(full, lora=recipe.lora is not None))
    return [
        {
            "weight_decay": optim.weight_decay if decayed else 0.0,
            "lr": rate,
            "n": len(names),
            "names": sorted(names),
        }
        for (rate, decayed), names in members.items()
    ]


def _batch_shapes(case: Case, workshop: Workshop) -> dict[str, list[int]]:
    """Shapes of the batch that the original's own dataset and collator make of the records."""
    from llava.train.train import make_supervised_data_module, parse_arguments, template_of

    from lapilli.compat.tokenizer import PreTrainedTokenizer

    model, data, training = parse_arguments(_train_arguments(case, workshop, Path("nowhere")))
    tokenizer = PreTrainedTokenizer.from_pretrained(model.model_name_or_path, use_fast=False)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.model_max_length = training.model_max_length
    data.is_multimodal, data.mm_use_im_start_end = True, model.mm_use_im_start_end
    if model.mm_use_im_start_end:
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
    data.image_processor = loaded(workshop).processor
    with conversation(template_of(model.version)), contextlib.redirect_stdout(io.StringIO()):
        module = make_supervised_data_module(tokenizer, data)
        rows = [module["train_dataset"][i] for i in range(len(case.given["records"]))]
        batch = module["data_collator"](rows)
    return {name: list(value.shape) for name, value in batch.items() if torch.is_tensor(value)}


def _train_arguments(case: Case, workshop: Workshop, output: Path) -> list[str]:
    """The command line of the original training program."""
    made, given = workshop.checkpoint(), case.given
    mm = workshop.spec["mm"]
    data = workshop.folder("records") / f"{case.id}.json"
    data.write_text(json.dumps(given["records"]), encoding="utf-8")
    options = {
        "model_name_or_path": made["model_base"],
        "vision_tower": made["vision"],
        "data_path": data,
        "image_folder": workshop.variant.images,
        "output_dir": output,
        "mm_projector_type": mm.get("mm_projector_type", "linear"),
        "mm_vision_select_layer": mm["mm_vision_select_layer"],
        "mm_vision_select_feature": mm.get("mm_vision_select_feature", "patch"),
        "mm_patch_merge_type": mm.get("mm_patch_merge_type", "flat"),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "max_steps": given["steps"],
        "per_device_train_batch_size": len(given["records"]),
        "model_max_length": 2048,
        "lr_scheduler_type": "cosine",
        "seed": 42,
    }
    if given.get("pretrained_adapter", True):
        options["pretrain_mm_mlp_adapter"] = Path(made["model_path"]) / "mm_projector.bin"
    options |= given["args"]
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def _compare_training(case: Case, check: Check, output: Path) -> None:
    expect = case.expect
    state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
    history = state["log_history"]
    losses = [record["loss"] for record in history]
    check.close("losses", losses, expect["losses"], atol=LOSS_ATOL)
    rates = [record["learning_rate"] for record in history]
    check.close("learning_rates", rates, expect["learning_rates"], atol=1e-12)
    files = sorted(str(p.relative_to(output)) for p in output.rglob("*") if p.is_file())
    check.equal("files", files, sorted(expect["files"]))
    written = json.loads((output / "config.json").read_text(encoding="utf-8"))
    check.equal("config", {k: written.get(k) for k in expect["config"]}, expect["config"])
    if "adapter_config" in expect:
        adapter = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
        found_keys = {key: adapter.get(key) for key in expect["adapter_config"]}
        check.equal("adapter_config", found_keys, expect["adapter_config"])
    for name, tensors in expect["saved"].items():
        _compare_saved(case, check, name, read_tensors(output / name), tensors)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file that training wrote."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, weights_only=True)


def _compare_saved(
    case: Case,
    check: Check,
    name: str,
    found: dict[str, torch.Tensor],
    expected: dict[str, dict[str, Any]],
) -> None:
    check.equal(f"tensors of {name}", sorted(found), sorted(expected))
    for key in sorted(set(found) & set(expected)):
        value, wanted = found[key], expected[key]
        check.equal(f"shape of {key}", value.shape, wanted["shape"])
        check.equal(f"dtype of {key}", str(value.dtype), wanted["dtype"])
        # Every value may be SAVED_ATOL off, a hundredth of them by more.
        allowed = SAVED_ATOL * max(value.numel(), 1)
        check.close(f"sum {key}", value.double().sum(), wanted["sum"], atol=allowed)
        check.close(f"abs_sum {key}", value.double().abs().sum(), wanted["abs_sum"], atol=allowed)
        stored = case.arrays.get(f"saved/{name}/{key}")
        if stored is not None:
            check.mostly_close(key, value, stored, atol=SAVED_ATOL, outliers=OUTLIERS)
