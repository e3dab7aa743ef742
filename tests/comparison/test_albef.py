"""ALBEF: encoders that see their own side alone, targets of the average, and what it costs."""

from dataclasses import replace

import pytest
import torch

from comparison.albef import Albef, AlbefConfig
from comparison.forms import operations
from comparison.scenes import (
    Scenes,
    Vocabulary,
    captions_of,
    few_objects,
    join_texts,
    questions_about,
    questions_of,
    words_of,
)
from pebble.caption import caption

TINY = AlbefConfig(width=32, heads=2, inner=48, embed=16, queue=6, ramp=2)


@pytest.fixture(scope="module")
def scenes():
    drawn = few_objects(7, 4)
    return Scenes(
        features=torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(1)),
        captions=tuple(words_of(caption(one)) for one in drawn),
        questions=tuple(tuple(questions_about(one, 4)) for one in drawn),
    )


@pytest.fixture
def model(scenes):
    return Albef(TINY, Vocabulary(scenes), 8, seed=3)


@torch.no_grad()
def test_a_question_has_the_answer_that_it_has_alone(model, scenes):
    vocabulary = Vocabulary(scenes)
    together = model.answer_logits(questions_of(scenes, [0, 1], vocabulary))
    alone = model.answer_logits(questions_of(scenes, [1], vocabulary))
    torch.testing.assert_close(together[4:], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vectors_come_from_one_side_and_scores_of_pairs_from_both(model, scenes):
    captions = captions_of(scenes, [0, 1, 2], Vocabulary(scenes))
    other = replace(captions, features=captions.features + 1)
    read = model.encoders.read(captions)
    torch.testing.assert_close(read, model.encoders.read(other))
    pairs = torch.tensor([0, 1]), torch.tensor([2, 1])
    assert not torch.allclose(
        model.match_scores(captions, *pairs), model.match_scores(other, *pairs)
    )
    assert model.similarities(captions).abs().max() <= 1 + 1e-5


def test_a_step_moves_the_average_a_little_and_fills_the_queues(model, scenes):
    torch.manual_seed(0)
    captions = captions_of(scenes, [0, 1, 2, 3], Vocabulary(scenes))
    before = model.average.words.weight.clone()
    queue = model.pictures_queue.clone()
    model.encoders.words.weight.data += 1
    loss = model.caption_loss(captions)
    loss.total.backward()
    torch.testing.assert_close(model.average.words.weight, before + 0.01)
    assert model.average.words.weight.grad is None
    torch.testing.assert_close(model.pictures_queue[4:], queue[:2])
    torch.testing.assert_close(model.pictures_queue[0].norm(), torch.tensor(1.0))
    assert float(loss.total.detach()) == pytest.approx(float(sum(loss.parts.values())), rel=1e-5)
    assert model.encoders.picture_embed.weight.grad.abs().sum() > 0
    assert model.match_head.weight.grad.abs().sum() > 0


def test_it_learns_which_caption_belongs_to_a_picture(scenes):
    # A longer queue would hold the four pictures again, as what they are to be told from.
    model = Albef(replace(TINY, queue=1), Vocabulary(scenes), 8, seed=3)
    torch.manual_seed(0)
    captions = captions_of(scenes, [0, 1, 2, 3], Vocabulary(scenes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimizer.zero_grad()
        (model.caption_loss(captions).total / 4).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert model.similarities(captions).argmax(1).tolist() == [0, 1, 2, 3]


def test_operations_are_what_torch_counts_and_attention(model, scenes):
    vocabulary = Vocabulary(scenes)
    words = [4, *vocabulary.ids(scenes.questions[0][0].words), 4]
    count = len(words)
    texts = join_texts(scenes.features[:1], [[words]], [0])
    own, cross = 4 * 4 * count**2 * 32, 2 * 4 * count * 4 * 32
    counted = operations(lambda: model.answer_logits(texts))
    flops = model.request_flops(count, 4)
    assert counted in (flops, flops - own - cross)  # by the kernel that torch chose
    assert model.request_flops(count, 4, known=True) < flops
    text, picture = model.vector_flops(count, 4)
    assert text < flops
    assert picture < flops
