"""The contract of prepare_inputs_labels_for_multimodal, for shapes that no golden case has."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Loaded = tuple[Any, Any, Any, int]
PATCHES = 16

ROWS = st.lists(
    st.lists(st.sampled_from([300, 400, 500, -200]), min_size=2, max_size=6),
    min_size=1,
    max_size=3,
)


def pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=ROWS)
def test_lengths_labels_and_positions(loaded: Loaded, rows: list[list[int]]) -> None:
    model = loaded[1]
    ids, mask = pad(rows)
    needed = sum(max(row.count(-200), 1) for row in rows)
    images = torch.zeros(needed, 3, 56, 56)
    with torch.no_grad():
        _, positions, fused_mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            ids, torch.arange(ids.shape[1])[None], mask, None, ids, images
        )
    lengths = [len(row) + row.count(-200) * (PATCHES - 1) for row in rows]
    assert fused_mask.sum(1).tolist() == lengths
    assert embeds.shape == (len(rows), max(lengths), 64)
    for i, row in enumerate(rows):
        text = [token for token in row if token >= 0]
        kept = labels[i][labels[i] != -100].tolist()
        assert kept == text
        assert positions[i, : lengths[i]].tolist() == list(range(lengths[i]))
        assert not embeds[i, lengths[i] :].any()


def test_none_comes_back_as_none(loaded: Loaded) -> None:
    ids = torch.tensor([[1, -200, 5]])
    images = torch.zeros(1, 3, 56, 56)
    out = loaded[1].prepare_inputs_labels_for_multimodal(ids, None, None, "past", None, images)
    assert [value is None for value in out] == [True, True, True, False, False, True]
    assert out[3] == "past"


def test_without_images_everything_comes_back(loaded: Loaded) -> None:
    ids = torch.tensor([[1, 2]])
    out = loaded[1].prepare_inputs_labels_for_multimodal(ids, None, None, None, None, None)
    assert out == (ids, None, None, None, None, None)


def test_a_row_without_a_picture_eats_one(loaded: Loaded) -> None:
    ids = torch.tensor([[1, 5], [1, -200]])
    with pytest.raises(IndexError, match="there are only 1 pictures"):
        loaded[1].prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, torch.zeros(1, 3, 56, 56)
        )


def test_the_side_of_the_padding_is_the_configs(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded[1]
    monkeypatch.setattr(model.config, "tokenizer_padding_side", "left", raising=False)
    ids, mask = pad([[1, 5, -200], [1, -200]])
    prepared = model.prepare_inputs_labels_for_multimodal(
        ids, None, mask.bool(), None, None, torch.zeros(2, 3, 56, 56)
    )
    assert prepared[2].dtype == torch.bool
    assert prepared[2].tolist() == [[True] * 18, [False, *[True] * 17]]


def test_rows_are_cut_to_the_length_of_the_tokenizer(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded[1].config, "tokenizer_model_max_length", 10, raising=False)
    ids = torch.tensor([[1, -200, 5]])
    prepared = loaded[1].prepare_inputs_labels_for_multimodal(
        ids, None, None, None, ids, torch.zeros(1, 3, 56, 56)
    )
    assert prepared[4].shape == (1, 10, 64)


def test_start_and_end_tokens_with_a_tuned_projector_are_refused(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("tune_mm_mlp_adapter", "mm_use_im_start_end"):
        monkeypatch.setattr(loaded[1].config, key, True)
    with pytest.raises(NotImplementedError, match="tune_mm_mlp_adapter"):
        loaded[1].prepare_inputs_labels_for_multimodal(
            torch.tensor([[1, -200]]), None, None, None, None, torch.zeros(1, 3, 56, 56)
        )


def test_an_unknown_merge_is_named(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded[1].config, "mm_patch_merge_type", "braid")
    with pytest.raises(ValueError, match="mm_patch_merge_type is 'braid'"):
        loaded[1].prepare_inputs_labels_for_multimodal(
            torch.tensor([[1, -200]]), None, None, None, None, [torch.zeros(3, 56, 56)]
        )


def test_the_tower_gets_no_gradient(loaded: Loaded) -> None:
    model = loaded[1]
    model.requires_grad_(True)
    try:
        model.encode_images(torch.zeros(1, 3, 56, 56)).sum().backward()
        towers = [p.grad for n, p in model.named_parameters() if ".vision_tower." in n]
        assert all(grad is None for grad in towers)
        assert model.get_model().mm_projector[0].weight.grad is not None
    finally:
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
