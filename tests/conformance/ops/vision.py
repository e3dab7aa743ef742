"""Ops that load a model and look at it once: load, vision, sample."""

from typing import Any, NamedTuple

import numpy as np
import torch

from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check

LOGITS_ATOL = 1e-4
EMBEDS_ATOL = 5e-5
LIMITED_ATOL = 1e-2  # losses and scores where loading adds random rows (logit_limit)
NEIGHBOURS = 2e-4  # two logits nearer than this may change places
ABSOLUTE_SUM_RTOL = 1e-5


class LoadedModel(NamedTuple):
    """What load_pretrained_model of the original returns."""

    tokenizer: Any
    model: Any
    processor: Any
    context_len: int


def loaded(workshop: Workshop) -> LoadedModel:
    """The variant, loaded once through the name of the original."""

    def make() -> LoadedModel:
        from llava.mm_utils import get_model_name_from_path
        from llava.model.builder import load_pretrained_model

        made = workshop.checkpoint()
        name = get_model_name_from_path(made["model_path"])
        with workshop.at_home():
            return LoadedModel(
                *load_pretrained_model(
                    made["model_path"], made["model_base"], name, device_map="cpu", device="cpu"
                )
            )

    return workshop.once("loaded", make)


def load(case: Case, workshop: Workshop, check: Check) -> None:
    expect = case.expect
    made = workshop.checkpoint()
    if not check.equal("hashes of the checkpoint", made["hashes"], expect["hashes"]):
        return
    tokenizer, model, processor, context_len = loaded(workshop)
    check.equal("model_class", type(model).__name__, expect["model_class"])
    check.equal("context_len", context_len, expect["context_len"])
    _load_tokenizer(check, tokenizer, expect)
    check.equal("embed_shape", model.get_input_embeddings().weight.shape, expect["embed_shape"])
    check.equal("head_shape", model.get_output_embeddings().weight.shape, expect["head_shape"])
    config = {key: getattr(model.config, key, None) for key in expect["config"]}
    check.equal("config", config, expect["config"])
    tower = model.get_vision_tower()
    check.equal("num_patches", tower.num_patches, expect["num_patches"])
    check.equal("vision_hidden", tower.hidden_size, expect["vision_hidden"])
    for name in ("crop_size", "size", "image_mean", "image_std", "resample"):
        check.equal(name, getattr(processor, name), expect[name])
    rtol = 1e-5 if workshop.spec["kind"] == "lora" else 1e-6
    limit = workshop.spec.get("logit_limit")
    _load_parameters(check, dict(model.named_parameters()), expect, rtol=rtol, limit=limit)


def _load_tokenizer(check: Check, tokenizer: Any, expect: dict[str, Any]) -> None:
    check.equal("len_tokenizer", len(tokenizer), expect["len_tokenizer"])
    check.equal("tokenizer_class", type(tokenizer).__name__, expect["tokenizer_class"])
    special = {name: getattr(tokenizer, name) for name in expect["tokenizer_special"]}
    check.equal("tokenizer_special", special, expect["tokenizer_special"])
    check.equal("padding_side", tokenizer.padding_side, expect["tokenizer_padding_side"])
    check.equal(
        "model_max_length", tokenizer.model_max_length, expect["tokenizer_model_max_length"]
    )
    check.equal("legacy", getattr(tokenizer, "legacy", None), expect["tokenizer_legacy"])
    check.equal("added_vocab", tokenizer.get_added_vocab(), expect["added_vocab"])


def _load_parameters(
    check: Check,
    found: dict[str, torch.Tensor],
    expect: dict[str, Any],
    *,
    rtol: float,
    limit: int | None,
) -> None:
    check.equal("parameter names", sorted(found), sorted(expect["params"]))
    for name, expected in expect["params"].items():
        if name not in found:
            continue
        value = found[name].detach().double()
        check.equal(f"shape of {name}", value.shape, expected["shape"])
        if limit is not None and expected["shape"][0] > limit:
            continue  # the original drew the new rows at random
        # A sum of both signs is small by chance: the tolerance is relative to what was added up.
        scale = max(float(expected["abs_sum"]), 1e-12)
        check.close(f"sum {name}", value.sum(), expected["sum"], atol=rtol * scale)
        check.close(f"abs_sum {name}", value.abs().sum(), expected["abs_sum"], atol=0, rtol=rtol)


def vision(case: Case, workshop: Workshop, check: Check) -> None:
    from llava.mm_utils import process_images

    model = loaded(workshop)
    images = workshop.pictures(case.given["images"])
    pixels = process_images(images, model.processor, model.model.config)
    tiles = torch.cat([image if image.ndim == 4 else image[None] for image in pixels])
    with torch.inference_mode():
        features = model.model.get_vision_tower()(tiles)
        projected = model.model.encode_images(tiles)
    check.equal("shape", features.shape, case.expect["shape"])
    check.equal("projected_shape", projected.shape, case.expect["projected_shape"])
    projection = load_projection(workshop)
    for name, value in (("features", features), ("projected", projected)):
        check.close(f"{name} row 0", value[0, 0], case.arrays[f"{name}_row0"], atol=EMBEDS_ATOL)
        compare_projection(check, f"{name}_proj", value, case, projection)
        compare_statistics(check, name, value, case.expect[name])


def load_projection(workshop: Workshop) -> np.ndarray:
    """The fixed matrix of cases/projection.npy."""
    return workshop.once(
        "projection", lambda: np.load(workshop.variant.root / "cases" / "projection.npy")
    )


def project(value: torch.Tensor, projection: np.ndarray) -> np.ndarray:
    """value @ P / sqrt(width), in float64."""
    wide = value.detach().double().numpy()
    return wide @ projection[: wide.shape[-1]] / np.sqrt(wide.shape[-1])


def compare_projection(
    check: Check, name: str, value: torch.Tensor, case: Case, projection: np.ndarray
) -> None:
    found = project(value, projection)
    expected = case.arrays[name]
    check.close(name, found.reshape(expected.shape), expected, atol=EMBEDS_ATOL)


def compare_statistics(
    check: Check, name: str, value: torch.Tensor, expected: dict[str, float] | None
) -> None:
    """Mean, deviation, extremes and sum of a tensor that is not stored whole."""
    if expected is None:
        return
    wide = value.detach().double()
    atol = LOGITS_ATOL if name == "logits" else EMBEDS_ATOL
    found = {"mean": wide.mean(), "std": wide.std(unbiased=False)}
    found |= {"min": wide.min(), "max": wide.max()}
    for key, number in found.items():
        check.close(f"{name} {key}", number, expected[key], atol=atol)
    check.close(
        f"{name} abs_sum", wide.abs().sum(), expected["abs_sum"], atol=0, rtol=ABSOLUTE_SUM_RTOL
    )


class Inputs(NamedTuple):
    """The arguments of one call of the original."""

    rows: list[list[int]]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    labels: torch.Tensor | None
    images: Any
    image_sizes: list[tuple[int, int]] | None


def make_inputs(case: Case, workshop: Workshop) -> Inputs:
    """Input ids, mask, labels and pixels as the README describes them."""
    from llava.mm_utils import tokenizer_image_token

    given, model = case.given, loaded(workshop)
    rows = given.get("input_ids")
    if rows is None:
        rows = [tokenizer_image_token(text, model.tokenizer) for text in given["prompts"]]
    width = max(len(row) for row in rows)
    left = given.get("pad_side", "right") == "left"
    ids = torch.full((len(rows), width), given.get("pad_id", 0), dtype=torch.long)
    real = torch.zeros((len(rows), width), dtype=torch.bool)
    labels = torch.full((len(rows), width), -100, dtype=torch.long)
    skip = given.get("labels_from")
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at] = torch.tensor(row)
        real[i, at] = True
        labels[i, at] = torch.tensor(
            [-100 if j < (skip or 0) or t < 0 else t for j, t in enumerate(row)]
        )
    images, sizes = make_images(case, workshop)
    masks = {"none": None, "mask": real.long(), "bool": real}
    return Inputs(
        rows=rows,
        input_ids=ids,
        attention_mask=masks[given.get("attention_mask", "none")],
        position_ids=torch.arange(width)[None] if given.get("position_ids") else None,
        labels=labels if skip is not None else None,
        images=images,
        image_sizes=sizes,
    )


def make_images(case: Case, workshop: Workshop) -> tuple[Any, list[tuple[int, int]] | None]:
    """Pixels in the container that `image_format` asks for, and (width, height) per picture."""
    from llava.mm_utils import process_images

    names = case.given.get("images")
    if names is None:
        return None, None
    model = loaded(workshop)
    pictures = workshop.pictures(names)
    pixels = process_images(pictures, model.processor, model.model.config)
    sizes = None if case.given.get("no_image_sizes") else [image.size for image in pictures]
    form = case.given.get("image_format", "auto")
    if form == "list":
        return list(pixels), sizes
    if form == "wrong_size":
        return torch.zeros(len(pictures), 3, 28, 42), sizes
    if form.startswith("base_only"):
        base = [image[:1] for image in pixels]
        return (torch.cat(base) if form.endswith("stack") else base), sizes
    return pixels, sizes


def sample(case: Case, workshop: Workshop, check: Check) -> None:
    model = loaded(workshop).model
    if case.raises:
        check.raises(case.raises, lambda: _run(make_inputs(case, workshop), model, case))
        return
    inputs = make_inputs(case, workshop)
    check.equal("input_ids", inputs.rows, case.expect["input_ids"])
    prepared, output = _run(inputs, model, case)
    _compare_prepared(check, case, prepared, load_projection(workshop))
    if output is None:
        return
    mask = prepared[2]
    valid = torch.ones(output.logits.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    limit = workshop.spec.get("logit_limit")
    compare_forward(check, case, output.logits, valid, load_projection(workshop), limit=limit)
    if "loss" in case.expect:
        atol = LIMITED_ATOL if limit else LOGITS_ATOL
        check.close("loss", output.loss, case.expect["loss"], atol=atol)
    if "grad_norms" in case.expect:
        rtol = LIMITED_ATOL if limit else 1e-3
        _compare_gradients(check, model, output.loss, case.expect["grad_norms"], rtol=rtol)


def _run(inputs: Inputs, model: Any, case: Case) -> tuple[tuple[Any, ...], Any]:
    """Preparation, then a full forward; gradients only where the case wants them."""
    with torch.set_grad_enabled(bool(case.given.get("grads"))):
        model.requires_grad_(bool(case.given.get("grads")))
        prepared = model.prepare_inputs_labels_for_multimodal(
            inputs.input_ids,
            inputs.position_ids,
            inputs.attention_mask,
            None,
            inputs.labels,
            inputs.images,
            inputs.image_sizes,
        )
        if case.given.get("prepare_only"):
            return prepared, None
        ids, positions, mask, cache, embeds, labels = prepared
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            inputs_embeds=embeds,
            labels=labels,
        )
        return prepared, output


def _compare_prepared(
    check: Check, case: Case, prepared: tuple[Any, ...], projection: np.ndarray
) -> None:
    ids, positions, mask, _, embeds, labels = prepared
    expect = case.expect["prepare"]
    check.equal("input_ids is None", ids is None, expect["input_ids_is_none"])
    check.equal("position_ids is None", positions is None, expect["position_ids_is_none"])
    check.equal("labels is None", labels is None, expect["labels_is_none"])
    dtype = None if mask is None else str(mask.dtype)
    check.equal("attention_mask dtype", dtype, expect["attention_mask_dtype"])
    for name, value in (("position_ids", positions), ("attention_mask", mask), ("labels", labels)):
        if name in case.arrays and check.that(value is not None, f"{name} is None"):
            value = value.expand(case.arrays[name].shape) if name == "position_ids" else value
            check.equal(name, value.long(), case.arrays[name].astype(np.int64))
    shape = None if embeds is None else list(embeds.shape)
    if not check.equal("embeds shape", shape, expect.get("inputs_embeds_shape")) or embeds is None:
        return
    found = project(embeds, projection)
    check.close(
        "embeds_proj",
        found[:, stored_positions(embeds.shape[1])],
        case.arrays["embeds_proj"],
        atol=EMBEDS_ATOL,
    )
    check.close(
        "embeds_proj_mean", found.mean((0, 1)), expect["embeds_proj_mean"], atol=EMBEDS_ATOL
    )
    rows = [embeds[i, at] for i, at in enumerate(expect["embeds_rows_at"])]
    check.close("embeds_rows", torch.cat(rows), case.arrays["embeds_rows"], atol=EMBEDS_ATOL)
    compare_statistics(check, "embeds", embeds, expect.get("embeds"))


def stored_positions(length: int) -> list[int]:
    """Positions of which projections are stored."""
    if length <= 256:
        return list(range(length))
    spread = np.round(np.linspace(0, length - 1, 208)).astype(int).tolist()
    return sorted({*range(16), *spread, *range(length - 32, length)})


def compare_forward(
    check: Check,
    case: Case,
    logits: torch.Tensor,
    valid: torch.Tensor,
    projection: np.ndarray,
    *,
    limit: int | None,
) -> None:
    """All logits of the valid positions against what is stored of them."""
    expect = case.expect
    logits = logits.detach()
    check.equal("logits_shape", logits.shape, expect["logits_shape"])
    check.equal("valid_len", valid.sum(1), expect["valid_len"])
    if limit is None:
        compare_statistics(check, "logits", logits, expect.get("logits"))
    logits = logits[..., :limit]
    at = stored_positions(logits.shape[1])
    seen = valid[:, at].numpy()
    found = project(logits[:, at], projection)
    check.close("logits_proj", found[seen], case.arrays["logits_proj"][seen], atol=LOGITS_ATOL)
    places = [valid[i].nonzero().flatten() for i in range(len(valid))]
    last = [where[-8:] for where in places]
    check.equal("last_positions", last, expect["last_positions"])
    top = torch.cat([logits[i, where] for i, where in enumerate(last)])
    _compare_top20(check, top, case.arrays["top20_ids"], case.arrays["top20_values"])
    if "last_logits" in case.arrays:
        ends = torch.stack([logits[i, where[-1]] for i, where in enumerate(places)])
        check.close("last_logits", ends, case.arrays["last_logits"][..., :limit], atol=LOGITS_ATOL)
    _compare_argmax(check, logits, places, expect["argmax"])


def _compare_top20(check: Check, logits: torch.Tensor, ids: np.ndarray, values: np.ndarray) -> None:
    found = logits.topk(20, dim=-1)
    check.close("top20_values", found.values, values, atol=LOGITS_ATOL)
    at_ids = logits.gather(1, torch.from_numpy(ids.astype(np.int64)))
    check.close("logits of top20_ids", at_ids, values, atol=LOGITS_ATOL)
    gaps = np.abs(np.diff(values, axis=1)) > NEIGHBOURS
    edge = np.ones((len(ids), 1), dtype=bool)
    apart = np.hstack([edge, gaps]) & np.hstack([gaps, ~edge])
    check.equal("top20_ids", found.indices.numpy()[apart], ids[apart])


def _compare_argmax(
    check: Check, logits: torch.Tensor, places: list[torch.Tensor], expected: list[list[int]]
) -> None:
    for i, (where, wanted) in enumerate(zip(places, expected, strict=True)):
        best = logits[i, where[len(where) - len(wanted) :]].topk(2, dim=-1)
        clear = (best.values[:, 0] - best.values[:, 1]) > NEIGHBOURS
        target = torch.tensor(wanted)
        check.equal(f"argmax of row {i}", best.indices[clear, 0], target[clear])


def _compare_gradients(
    check: Check, model: Any, loss: torch.Tensor, expected: dict[str, float], *, rtol: float
) -> None:
    model.zero_grad(set_to_none=True)
    loss.backward()
    norms = {
        name: float(p.grad.double().norm())
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    check.equal("parameters with a gradient", sorted(norms), sorted(expected))
    for name in sorted(set(norms) & set(expected)):
        check.close(f"grad {name}", norms[name], expected[name], atol=1e-9, rtol=rtol)
