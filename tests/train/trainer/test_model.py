"""The model in training against the original's gradients, transformers, and itself."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaForConditionalGeneration

from lapilli.checkpoint.keymaps import ORIGINAL, ORIGINAL_MPT
from lapilli.checkpoint.load import load_checkpoint
from lapilli.geometry import ImageSize
from lapilli.modality.image.pixels import PreparedImage
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.recipe import ModelRecipe, NoiseRecipe, OptimRecipe, Recipe, RunRecipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.step import PlainAttention
from lapilli.train.trainer.task import TrainingError, collate, collate_packed
from tests.checkpoint.published import make_llava
from tests.train.golden import VARIANTS, encoded_dataset, with_gradients
from tests.versions import needs

INSTRUCT = Recipe(stage="instruct", optim=OptimRecipe(lr=1.0), run=RunRecipe(batch_size=1))


@needs("pillow", "13", "resamples tall pictures in another order than the golden numbers")
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_originals(conformance, golden, variant, packed):
    _, built, _ = golden(variant)
    loaded = load_checkpoint(built["model_path"], dtype="float32", device="cpu")
    choose_trainable(loaded.model, INSTRUCT)
    model = TrainedModel(loaded.model).train()
    keymap = ORIGINAL_MPT if "mpt" in variant else ORIGINAL
    for case in with_gradients(conformance, variant):
        rows = encoded_dataset(case, loaded, conformance / "images")
        batch = collate_packed([rows]) if packed else collate(rows)
        model.zero_grad()
        loss = model(batch).total / batch.num_valid
        loss.backward()
        torch.testing.assert_close(loss.item(), case["expect"]["loss"], atol=1e-4, rtol=0)
        gradients = {name: p.grad for name, p in model.vlm.named_parameters()}
        expected = case["expect"]["grad_norms"]
        assert len(expected) > 20
        for foreign, norm in expected.items():
            found = gradients[keymap.to_ours(foreign)].norm().item()
            assert found == pytest.approx(norm, rel=1e-3), foreign


@pytest.fixture(scope="module")
def llava(checkpoint):
    """A fresh tiny LLaVA in training, each time it is called."""

    def fresh(recipe=INSTRUCT, **options):
        loaded = load_checkpoint(checkpoint, dtype="float32", device="cpu")
        choose_trainable(loaded.model, recipe)
        return TrainedModel(loaded.model, **options).train()

    return fresh


def draw_row(model, seed, *, length=12, pictures=(3,)):
    """Text with pictures after so many tokens; two thirds of the text count."""
    random = torch.Generator().manual_seed(seed)
    image = model.vlm.modality("image")
    side, patches = image.vision.image_size, image.vision.num_patches
    ids = torch.randint(3, 900, (length,), generator=random).tolist()
    mask = (torch.rand(length, generator=random) < 0.7).tolist()
    spans, media = [], []
    for at in sorted(pictures, reverse=True):
        ids[at:at] = [0] * patches
        mask[at:at] = [False] * patches
    for number, at in enumerate(sorted(pictures)):
        spans.append(Span(0, at + number * patches, patches))
        pixels = torch.randn(1, 3, side, side, generator=random)
        media.append(PreparedImage(pixels, ImageSize(side, side)))
    return EncodedSample(
        EncodedPrompt(ids, [*mask[:-1], True], tuple(spans)), tuple(media), str(seed)
    )


def gradients(model, batch):
    model.zero_grad(set_to_none=True)
    loss = model(batch).total
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


SHAPES = st.lists(
    st.tuples(st.integers(5, 20), st.lists(st.integers(0, 4), max_size=2, unique=True)),
    min_size=1,
    max_size=5,
)


@pytest.mark.slow
@settings(max_examples=10)
@given(SHAPES, st.data())
def test_packed_rows_give_the_loss_and_gradients_of_their_samples(llava, shapes, data):
    model = llava()
    rows = [draw_row(model, i, length=n, pictures=at) for i, (n, at) in enumerate(shapes)]
    loss, expected = gradients(model, collate(rows))
    cuts = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    bins = [[rows[0]]]
    for row, is_cut in zip(rows[1:], cuts, strict=False):
        bins.append([row]) if is_cut else bins[-1].append(row)
    found_loss, found = gradients(model, collate_packed(bins))
    torch.testing.assert_close(found_loss, loss, atol=1e-5, rtol=1e-5)
    for name, gradient in expected.items():
        scale = max(float(gradient.abs().max()), 1.0)  # small sums of large terms differ by theirs
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=1e-4, msg=name)


class Shapes(TorchDispatchMode):
    """Sizes of what enters every product."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if any(part in name for part in ("mm", "linear", "conv", "attention")):
            shapes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]
            self.found.add((name, *shapes))
        return func(*args, **(kwargs or {}))


def products(model, rows, *, packed, precision):
    """Shapes of all products, forwards and backwards, of a batch of these rows."""
    rows = list(rows)
    batch = collate_packed([rows]) if packed else collate(rows)
    how = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with Shapes() as shapes, PlainAttention():
        with how:
            loss = model(batch).total
        loss.backward()
    return shapes.found


def long_row(model, length, count):
    """A row of so many positions with a picture, the last of which count."""
    patches = model.vlm.modality("image").vision.num_patches
    row = draw_row(model, length, length=length - patches)
    mask = [False] * (length - count) + [True] * count
    return replace(row, prompt=replace(row.prompt, loss_mask=mask))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("packed", [False, True])
def test_other_lengths_are_products_of_the_same_shapes(llava, packed, precision):
    """oneDNN keeps a program for every new shape, megabytes a batch: memory grew for ever."""
    model, how = llava(), {"packed": packed, "precision": precision}
    lengths, counts = (208, 80), (20, 20)
    expected = products(model, map(long_row, [model] * 2, lengths, counts), **how)
    assert len(expected) > 10
    for lengths, counts in (((201, 77), (20, 19)), ((205, 80), (19, 20)), ((207, 78), (20, 20))):
        found = products(model, map(long_row, [model] * 2, lengths, counts), **how)
        assert found == expected


def test_a_batch_without_pictures_gives_the_projector_a_zero_gradient(llava):
    recipe = replace(INSTRUCT, model=ModelRecipe(tune_tower=True))
    model = llava(recipe)
    _, found = gradients(model, collate([draw_row(model, 0, pictures=())]))
    assert all(gradient is not None for gradient in found.values())
    assert not any(g.any() for name, g in found.items() if "modalities" in name)
    _, found = gradients(model, collate([draw_row(model, 0)]))
    assert all(g.any() for name, g in found.items() if "weight" in name), "a part learns nothing"


def test_a_frozen_tower_is_not_differentiated_and_stays_in_evaluation(llava):
    model = llava()
    tower = model.vlm.modality("image").vision_tower
    assert model.training
    assert not tower.training
    seen = []
    tower.register_forward_hook(lambda *args: seen.append(args[2].requires_grad))
    gradients(model, collate([draw_row(model, 0)]))
    assert seen == [False]


def test_features_may_stand_for_pictures(llava):
    model = llava()
    row = draw_row(model, 0)
    loss, expected = gradients(model, collate([row]))
    with torch.no_grad():
        features = model.vlm.modality("image").tower_features(row.media[0].pixel_values)[0]
    stored = replace(row, media=(features,))
    found_loss, found = gradients(model, collate([stored]))
    torch.testing.assert_close(found_loss, loss)
    torch.testing.assert_close(found, expected)


def test_recomputed_layers_give_the_same_gradients(llava):
    model = llava(replace(INSTRUCT, model=ModelRecipe(tune_tower=True)))
    batch = collate([draw_row(model, 0), draw_row(model, 1, pictures=(1, 4))])
    _, expected = gradients(model, batch)
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = True
    _, found = gradients(model, batch)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("on", ["image", "all"])
def test_noise_has_the_size_of_the_paper_and_only_while_training(llava, on):
    model = llava(noise=NoiseRecipe(alpha=5.0, on=on))
    row = draw_row(model, 0, pictures=(2,))
    batch = collate([row, draw_row(model, 1, length=4, pictures=())])
    model.eval()
    with torch.no_grad():
        plain = model._embeds(batch)[0]
        torch.testing.assert_close(model._embeds(batch)[0], plain, atol=0, rtol=0)
        model.train()
        moved = (model._embeds(batch)[0] - plain).abs()
    (span,) = row.prompt.spans
    width = plain.shape[2]
    if on == "image":
        noisy = moved[0, span.start : span.start + span.length]
        limit = 5.0 / (span.length * width) ** 0.5
        assert moved[0, : span.start].max() == moved[1].max() == 0
    else:
        noisy = moved[0, : len(row.prompt)]
        limit = 5.0 / (len(row.prompt) * width) ** 0.5
        assert moved[1, :4].max() > limit
        assert moved[1, 4:].max() == 0
    assert 0.95 * limit < noisy.max() <= limit * 1.001
    assert noisy.mean() == pytest.approx(limit / 2, rel=0.1)


def test_noise_is_drawn_from_the_seed_of_the_micro_batch(llava):
    model = llava(noise=NoiseRecipe(alpha=5.0))
    batch = collate([draw_row(model, 0)])
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(model(batch).total.item())
    assert losses[0] == losses[1] != losses[2]


def test_z_loss_is_added_while_training_alone(llava):
    model = llava(z_loss=0.01)
    batch = collate([draw_row(model, 0)])
    loss = model(batch)
    where = torch.zeros_like(batch.loss_mask)
    where[:, :-1] = batch.loss_mask[:, 1:]
    logits = model.vlm.logits(model.hidden(batch)[where])
    z = 0.01 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(loss.parts["z"], z.detach())
    torch.testing.assert_close(loss.total, loss.parts["answers"] + z)
    torch.testing.assert_close(model.eval()(batch).total, loss.parts["answers"])


class FixedRows:
    """The same rows in every step; see lapilli.train.trainer.task.Task."""

    def __init__(self, model, rows, *, packed=False):
        self.model, self.rows, self.packed = model, rows, packed

    def batch(self, step, micro):
        rows = [self.rows[(step + i) % len(self.rows)] for i in range(2)]
        made = collate_packed([rows]) if self.packed else collate(rows)
        return made, made.num_valid

    def loss(self, batch):
        return self.model(batch)

    def evaluate(self):
        return {}


def transformers_losses(path, task, *, steps, lr):
    """The same steps by transformers' own model and torch's own optimizer."""
    oracle = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).train()
    oracle.model.vision_tower.requires_grad_(False)
    optimizer = torch.optim.SGD((p for p in oracle.parameters() if p.requires_grad), lr=lr)
    found = []
    for step in range(steps):
        batch, _ = task.batch(step, 0)
        ids = batch.input_ids.clone()
        for span in batch.spans:
            ids[span.row, span.start : span.start + span.length] = oracle.config.image_token_id
        lengths = torch.tensor([sum(row) for row in batch.segments])
        seen = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        loss = oracle(
            input_ids=ids,
            pixel_values=torch.cat([item.pixel_values for item in batch.media]),
            attention_mask=seen,
            labels=torch.where(batch.loss_mask, ids, -100),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.slow
def test_twenty_steps_have_the_losses_of_transformers(tmp_path):
    path = tmp_path / "llava"
    make_llava(path)
    loaded = load_checkpoint(path, dtype="float32", device="cpu")
    recipe = Recipe(
        stage="instruct",
        optim=OptimRecipe(name="sgd", lr=0.03, schedule="constant", max_grad_norm=1e9),
        run=RunRecipe(batch_size=2, steps=20, log_every=1),
    )
    choose_trainable(loaded.model, recipe)
    model = TrainedModel(loaded.model).train()
    rows = [draw_row(model, i, length=8 + 3 * i) for i in range(3)]
    rows = [
        replace(r, prompt=replace(r.prompt, input_ids=[i % 90 for i in r.prompt.input_ids]))
        for r in rows
    ]
    task = FixedRows(model, rows)
    expected = transformers_losses(path, task, steps=20, lr=0.03)
    train(task, recipe, tmp_path / "run")
    found = [record["loss"] for record in RunLog(tmp_path / "run").records()]
    assert expected[-1] < 0.9 * expected[0]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_bad_batch_of_packed_pictures_is_read_without_our_classes(llava, tmp_path):
    model = llava()
    with torch.no_grad():
        model.vlm.modality("image").projector[0].weight.fill_(torch.nan)
    task = FixedRows(model, [draw_row(model, i, pictures=(1, 4)) for i in range(2)], packed=True)
    with pytest.raises(TrainingError, match=r"is nan \(samples 0, 1\)"):
        train(task, replace(INSTRUCT, run=RunRecipe(batch_size=2, steps=1)), tmp_path)
    (bad,) = torch.load(tmp_path / "bad_batch.pt", weights_only=True)
    expected, _ = task.batch(0, 0)
    assert expected.is_packed
    assert torch.equal(bad["batch"]["input_ids"], expected.input_ids)
    assert bad["batch"]["segments"] == expected.segments
    assert [span["start"] for span in bad["batch"]["spans"]] == [s.start for s in expected.spans]
    for saved, item in zip(bad["batch"]["media"], expected.media, strict=True):
        assert torch.equal(saved["pixel_values"], item.pixel_values)
