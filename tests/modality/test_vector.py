"""Vectors as a modality."""

import numpy as np
import pytest
import torch

from lapilli.config.modalities import VectorConfig
from lapilli.config.model import ProjectorConfig
from lapilli.errors import ConfigError, MediaError
from lapilli.modality import Modality, build_modality
from lapilli.modality.vector import VectorModality


def _modality(**changes) -> VectorModality:
    torch.manual_seed(0)
    options = {"kind": "mlp", "vision_size": 4, "hidden_size": 6, "depth": 2, **changes}
    return VectorModality(ProjectorConfig(**options), name="user")


@pytest.mark.parametrize(
    "raw", [[1, 2, 3, 4], np.ones((1, 4)), torch.ones(1, 4, dtype=torch.float64)]
)
def test_one_vector_is_one_position(raw):
    modality = _modality()
    item = modality.prepare(raw)
    assert item.values.shape == (1, 4)
    assert item.values.dtype == torch.float32
    assert modality.num_tokens(item) == 1


def test_items_together_equal_items_alone():
    modality = _modality()
    items = [modality.prepare(torch.randn(n, 4)) for n in (3, 1, 5)]
    together = modality.embed(items)
    assert [f.shape for f in together] == [(3, 6), (1, 6), (5, 6)]
    for item, features in zip(items, together, strict=True):
        torch.testing.assert_close(features, modality.embed([item])[0])
    assert modality.embed([]) == []


def test_identity_keeps_the_vectors():
    modality = _modality(kind="identity", hidden_size=4)
    item = modality.prepare([1.0, 2.0, 3.0, 4.0])
    assert modality.embed([item])[0].tolist() == [[1.0, 2.0, 3.0, 4.0]]


def test_gradients_reach_the_projector():
    modality = _modality()
    modality.embed([modality.prepare(torch.randn(2, 4))])[0].sum().backward()
    assert all(p.grad is not None for p in modality.parameters())


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        ("abc", "user: not a vector of numbers"),
        ([1.0, 2.0], r"user: expected \[n, 4\] or \[4\] numbers, n at least 1, found \[1, 2\]"),
        (torch.zeros(0, 4), r"found \[0, 4\]"),
        (torch.zeros(1, 1, 4), r"found \[1, 1, 4\]"),
        (torch.zeros(4, dtype=torch.complex64), "user: not a vector of numbers .torch.complex64"),
        (np.zeros(4, complex), "user: not a vector of numbers .torch.complex128"),
        (torch.zeros(4, device="meta"), "user: not a vector of numbers .torch.float32 on meta"),
        (torch.eye(4).to_sparse(), "user: not a vector of numbers .* torch.sparse_coo"),
        ([1.0, 2.0, float("nan"), 0.0], "user: the vectors contain NaN or infinity"),
    ],
)
def test_refusals(raw, match):
    with pytest.raises(MediaError, match=match):
        _modality().prepare(raw)


def test_follows_the_protocol():
    assert isinstance(_modality(), Modality)


@pytest.mark.parametrize("projector", ["linear", "mlp2x_gelu"])
def test_one_vector_becomes_several_tokens(projector):
    config = VectorConfig(width=4, projector=projector, tokens=3)
    modality = build_modality("user", config, hidden_size=6)
    items = [modality.prepare(torch.randn(n, 4)) for n in (1, 2)]
    together = modality.embed(items)
    assert [f.shape for f in together] == [(3, 6), (6, 6)]
    assert [modality.num_tokens(item) for item in items] == [3, 6]
    assert len(together[1].unique(dim=0)) == 6  # every token is another one
    torch.testing.assert_close(
        together[1][3:], modality.embed([modality.prepare(items[1].values[1])])[0]
    )
    assert modality.output_layers() == []  # a rotation is of one token


def test_a_blank_is_an_item():
    modality = build_modality("user", VectorConfig(width=4, projector="resampler2"), hidden_size=8)
    assert modality.embed([modality.blank()])[0].shape == (2, 8)


def test_an_identity_between_different_widths_is_refused():
    config = VectorConfig(width=4, projector="none")
    assert build_modality("user", config, hidden_size=4).embed([]) == []
    with pytest.raises(ConfigError, match="modality 'user': projector 'identity' hands on vectors"):
        build_modality("user", config, hidden_size=6)
