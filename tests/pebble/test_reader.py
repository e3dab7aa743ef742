"""Projector and language model over features: the loss, and what each stage trains."""

import pytest
import torch
from torch import nn

from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.train.data.encoder import EncodedSample
from lapilli.train.trainer.step import PlainAttention
from lapilli.train.trainer.task import collate
from pebble.reader import FeatureReader, freeze

CONFIG = DecoderConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
    num_kv_heads=2, head_dim=8, norm_eps=1e-5, rope_theta=1e4, max_positions=64,
)  # fmt: skip


def new_reader():
    torch.manual_seed(0)
    return FeatureReader(Decoder(CONFIG), nn.Linear(5, 16))


def new_batch(rows):
    generator = torch.Generator().manual_seed(1)
    made = []
    for length in rows:
        ids = [1, 0, 0, 0, *range(5, 5 + length)]
        mask = [False] * 6 + [True] * (length - 2)
        features = torch.randn(3, 5, generator=generator)
        made.append(EncodedSample(EncodedPrompt(ids, mask, (Span(0, 1, 3),)), (features,)))
    return made


def test_padding_does_not_change_the_loss():
    reader = new_reader()
    rows = new_batch([4, 9, 6])
    together = reader.loss(collate(rows)).total
    alone = sum(reader.loss(collate([row])).total for row in rows)
    torch.testing.assert_close(together, alone)


def test_the_loss_is_that_of_all_logits_with_ignored_labels():
    reader = new_reader()
    batch = collate(new_batch([7]))
    logits = reader.language_model.logits(reader.hidden(batch))
    labels = torch.where(batch.loss_mask, batch.input_ids, -100)
    expected = nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    torch.testing.assert_close(reader.loss(batch).total, expected)


def test_features_reach_the_loss_through_the_projector():
    reader = new_reader()
    reader.loss(collate(new_batch([6]))).total.backward()
    assert reader.projector.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("stage", "trained"),
    [
        ("align", {"projector"}),
        ("instruct", {"projector", "language_model"}),
        ("language", {"projector", "language_model"}),
    ],
)
def test_stages_train_their_parts(stage, trained):
    model = nn.ModuleDict(
        {
            "projector": nn.Linear(2, 2),
            "language_model": nn.Linear(2, 2),
        }
    )
    freeze(model, stage)
    found = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert found == trained


def test_a_stage_that_trains_nothing_is_refused():
    with pytest.raises(ConfigError, match="'align' trains nothing in a Linear"):
        freeze(nn.Linear(2, 2), "align")


def test_plain_attention_gives_the_same_loss():
    reader = new_reader()
    batch = collate(new_batch([5, 8]))
    expected = reader.loss(batch).total
    with PlainAttention():
        torch.testing.assert_close(reader.loss(batch).total, expected)
