"""Ops of training: labels, dataset, sampler, train."""

import contextlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check
from tests.conformance.ops.pictures import compare_pixels, picture_processor
from tests.conformance.ops.text import open_tokenizer

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
    from llava.train.train import Trained
    from llava.train.train import train as original_train

    for record in case.given["records"]:
        if "image" in record:
            workshop.picture(record["image"])
    output = workshop.folder(f"train-{case.id}")
    arguments = _train_arguments(case, workshop, output)
    initial = {
        name.removeprefix("initial/"): torch.from_numpy(value)
        for name, value in case.arrays.items()
        if name.startswith("initial/")
    }

    def run() -> Trained:
        # The program assigns the template of its version; the next case must not see that.
        with conversation("vicuna_v1"), contextlib.redirect_stdout(io.StringIO()):
            return original_train(arguments=arguments, initial=initial)

    if case.raises:
        check.raises(case.raises, run)
        return
    _compare_training(case, check, run(), output)
    shutil.rmtree(output)


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


def _compare_training(case: Case, check: Check, found: Any, output: Path) -> None:
    expect = case.expect
    check.close("losses", found.losses, expect["losses"], atol=LOSS_ATOL)
    check.close("learning_rates", found.learning_rates, expect["learning_rates"], atol=1e-12)
    if "batch_shapes" in expect:
        check.equal("batch_shapes", found.batch_shapes, expect["batch_shapes"])
    check.equal("optimizer_groups", found.optimizer_groups, expect["optimizer_groups"])
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
