"""Fusion writes every item over its span; the model takes each row as if it were alone."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lapilli.errors import (
    FusionError,
    MediaCountMismatchError,
    PromptError,
    UnsupportedModelError,
)
from lapilli.model import VisionLanguageModel, fuse
from lapilli.prompt.encode import EncodedPrompt, Span
from tests.model.conftest import build_tiny


def _prompt(*parts) -> EncodedPrompt:
    """Numbers are token ids; (modality, length) is the place of a medium."""
    ids, spans = [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            name, length = part
            spans.append(Span(0, len(ids), length, name))
            ids += [0] * length
    return EncodedPrompt(input_ids=ids, loss_mask=[True] * len(ids), spans=tuple(spans))


def _pictures(model: VisionLanguageModel):
    image = model.modality("image")
    gradient = Image.linear_gradient("L").convert("RGB")
    items = [image.prepare(gradient.resize(size)) for size in ((50, 20), (20, 45))]
    return [(item, ("image", image.num_tokens(item))) for item in items]


def _rows(model: VisionLanguageModel):
    """Four rows: two pictures, text only, features with a user, one picture."""
    (first, first_place), (second, second_place) = _pictures(model)
    user = model.modality("user").prepare(torch.ones(2, 5))
    prompts = [
        _prompt(1, 7, first_place, 9, 9, second_place, 11),
        _prompt(1, 4, 5),
        _prompt(("image", 3), 1, ("user", 2), 8, 20),
        _prompt(1, second_place),
    ]
    media = [[first, second], [], [torch.randn(3, 24), user], [second]]
    return prompts, media


def test_ragged_batch_equals_solo_runs(model):
    prompts, media = _rows(model)
    with torch.no_grad():
        together = model.embed_prompts(prompts, media)
        logits = model.logits(model(together))
        assert logits.isfinite().all()
        longest = logits.shape[1]
        for row, (prompt, items) in enumerate(zip(prompts, media, strict=True)):
            solo = model.embed_prompts([prompt], [items])
            length = len(prompt.input_ids)
            assert solo.attention_mask.all()
            assert (
                together.attention_mask[row].tolist()
                == [False] * (longest - length) + [True] * length
            )
            assert together.position_ids[row, -length:].tolist() == list(range(length))
            torch.testing.assert_close(
                logits[row, -length:], model.logits(model(solo))[0], atol=2e-5, rtol=1e-5
            )


def test_cache_and_one_step_equal_the_whole_row(model):
    prompts, media = _rows(model)
    with torch.no_grad():
        batch = model.embed_prompts(prompts, media)
        cache = model.language_model.new_cache(len(prompts), capacity=3)
        model(batch, cache)
        token = torch.full((len(prompts), 1), 6)
        hidden = model.language_model.forward(
            model.language_model.embed(token),
            position_ids=batch.position_ids[:, -1:] + 1,
            attention_mask=torch.cat((batch.attention_mask, token > 0), dim=1),
            cache=cache,
        )
        longer = [EncodedPrompt([*p.input_ids, 6], [*p.loss_mask, True], p.spans) for p in prompts]
        whole = model(model.embed_prompts(longer, media))
    torch.testing.assert_close(hidden[:, 0], whole[:, -1], atol=2e-5, rtol=1e-5)


def test_all_pictures_of_all_rows_go_through_the_tower_together(model, monkeypatch):
    prompts, media = _rows(model)
    image, calls = model.modality("image"), []
    embed = image.embed
    monkeypatch.setattr(image, "embed", lambda items: calls.append(len(items)) or embed(items))
    model.embed_prompts(prompts, media)
    assert calls == [3]


def test_features_stand_for_a_picture(model):
    (item, place), _ = _pictures(model)
    with torch.no_grad():
        features = model.modality("image").embed([item])[0]
        seen = model.embed_prompts([_prompt(1, place, 2)], [[item]])
        given = model.embed_prompts([_prompt(1, place, 2)], [[features]])
    torch.testing.assert_close(given.inputs_embeds, seen.inputs_embeds)


def test_gradients_reach_every_part(model):
    prompts, media = _rows(model)
    batch = model.train().embed_prompts(prompts, media)
    model.logits(model(batch))[batch.attention_mask].square().mean().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    unused = {
        name
        for name, _ in model.named_parameters()
        if "encoder.layers.1" in name or "post_layernorm" in name
    }
    assert without == unused


def test_trains_under_bfloat16_autocast(model):
    prompts, media = _rows(model)
    with torch.autocast("cpu", torch.bfloat16):
        batch = model.train().embed_prompts(prompts, media)
        loss = model.logits(model(batch)).float()[batch.attention_mask].square().mean()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_text_needs_no_media_argument(model):
    batch = model.embed_prompts([_prompt(1, 2, 3)])
    assert torch.equal(batch.inputs_embeds, model.language_model.embed(torch.tensor([[1, 2, 3]])))


def test_parameter_names():
    tops = {".".join(name.split(".")[:3]) for name in build_tiny().state_dict()}
    assert {
        "language_model.model.layers",
        "language_model.lm_head.weight",
        "modalities.image.vision_tower",
        "modalities.image.projector",
        "modalities.image.image_newline",
        "modalities.user.projector",
    } <= tops


def test_built_on_meta_and_filled_by_assignment(model):
    with torch.device("meta"):
        empty = build_tiny()
    empty.load_state_dict(model.state_dict(), assign=True)
    prompts, media = _rows(model)
    with torch.no_grad():
        expected = model(model.embed_prompts(prompts, media))
        torch.testing.assert_close(empty.eval()(empty.embed_prompts(prompts, media)), expected)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_media_names_the_row(model, count):
    (item, place), _ = _pictures(model)
    prompts = [_prompt(1, 2), _prompt(1, place, 2, place)]
    with pytest.raises(
        MediaCountMismatchError, match=f"row 1: the prompt has 2 places for media but {count}"
    ):
        model.embed_prompts(prompts, [[], [item] * count])


def test_media_of_another_number_of_rows_are_refused(model):
    with pytest.raises(MediaCountMismatchError, match="2 prompts but media for 1 rows"):
        model.embed_prompts([_prompt(1), _prompt(2)], [[]])


def test_batches_and_rows_of_nothing_are_refused(model):
    with pytest.raises(PromptError, match="no prompts: a batch has at least one row"):
        model.embed_prompts([])
    with pytest.raises(PromptError, match="row 1: the prompt has no tokens"):
        model.embed_prompts([_prompt(1), _prompt()])


def test_features_that_do_not_fit_their_span_are_refused(model):
    with pytest.raises(FusionError, match=r"2 positions of width 24, the features are \[3, 24\]"):
        model.embed_prompts([_prompt(1, ("image", 2))], [[torch.zeros(3, 24)]])


def test_a_modality_that_the_model_does_not_have_is_named(model):
    with pytest.raises(UnsupportedModelError, match="no modality 'sound'; it has: image, user"):
        model.embed_prompts([_prompt(1, ("sound", 2))], [["beep"]])
    with pytest.raises(UnsupportedModelError, match="it has: none, it reads text only"):
        VisionLanguageModel(model.language_model).modality("image")


@st.composite
def situations(draw):
    """Text [B, T, D] and spans that do not overlap, in any order."""
    batch, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    spans, longest = [], 1
    for row in range(batch):
        place = 0
        for _ in range(draw(st.integers(0, 3))):
            place += draw(st.integers(0, 3))
            length = draw(st.integers(1, 4))
            spans.append(Span(row, place, length))
            place += length
        longest = max(longest, place)
    spans = draw(st.permutations(spans))
    text = torch.randn(batch, longest + draw(st.integers(0, 2)), width)
    features = [torch.randn(span.length, width) for span in spans]
    return text, features, spans


@given(situations())
def test_features_stand_in_their_spans_and_text_everywhere_else(situation):
    text, features, spans = situation
    before = text.clone()
    expected = text.clone()
    for item, span in zip(features, spans, strict=True):
        for i in range(span.length):
            expected[span.row, span.start + i] = item[i]
    assert torch.equal(fuse(text, features, spans), expected)
    assert torch.equal(text, before)


@given(situations(), st.data())
def test_one_feature_more_or_less_is_refused(situation, data):
    text, features, spans = situation
    if not spans:
        return
    i = data.draw(st.integers(0, len(spans) - 1))
    more = torch.cat((features[i], features[i][:1]))
    features[i] = more if data.draw(st.booleans()) else features[i][:-1]
    with pytest.raises(FusionError, match=rf"item {i} \(row {spans[i].row}, position"):
        fuse(text, features, spans)


@given(situations())
def test_another_number_of_items_is_refused(situation):
    text, features, spans = situation
    extra = [*features, torch.randn(1, text.shape[2])]
    with pytest.raises(
        FusionError, match=f"{len(spans)} spans in the prompt but {len(extra)} media"
    ):
        fuse(text, extra, spans)


@given(situations())
def test_gradients_go_where_the_values_went(situation):
    text, features, spans = situation
    text.requires_grad_()
    for item in features:
        item.requires_grad_()
    fuse(text, features, spans).sum().backward()
    covered = torch.zeros(text.shape[:2], dtype=torch.bool)
    for span in spans:
        covered[span.row, span.start : span.start + span.length] = True
    assert torch.equal(text.grad, (~covered)[..., None].expand(text.shape).float())
    assert all(torch.equal(item.grad, torch.ones_like(item)) for item in features)


def test_another_width_is_refused():
    text = torch.zeros(1, 4, 3)
    with pytest.raises(FusionError, match=r"2 positions of width 3, the features are \[2, 5\]"):
        fuse(text, [torch.zeros(2, 5)], [Span(0, 1, 2)])


@pytest.mark.parametrize(
    "span", [Span(0, 3, 2), Span(1, 0, 2), Span(0, -1, 2), Span(-1, 0, 2)], ids=str
)
def test_a_span_outside_of_its_row_is_refused(span):
    with pytest.raises(FusionError, match="does not lie inside 1 rows of 4 positions"):
        fuse(torch.zeros(1, 4, 3), [torch.zeros(2, 3)], [span])


def test_overlapping_spans_are_refused():
    items = [torch.zeros(2, 3), torch.zeros(2, 3)]
    with pytest.raises(FusionError, match="position 2 begins inside the span of 2 positions at 1"):
        fuse(torch.zeros(1, 4, 3), items, [Span(0, 2, 2), Span(0, 1, 2)])


def test_features_are_cast_to_the_dtype_of_the_text():
    fused = fuse(torch.zeros(1, 3, 2).bfloat16(), [torch.ones(1, 2)], [Span(0, 1, 1)])
    assert fused.dtype == torch.bfloat16
    assert fused[0, 1].tolist() == [1, 1]


def test_spans_know_their_modality_by_name_only():
    span = dataclasses.replace(Span(0, 1, 1), modality="anything")
    assert fuse(torch.zeros(1, 3, 2), [torch.ones(1, 2)], [span]).sum() == 2
