from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lapilli.config.model import DecoderConfig
from lapilli.errors import DataError
from lapilli.lm.decoder import Decoder
from lapilli.prompt.template import TEMPLATES
from lapilli.train.recipe import OptimRecipe, RunRecipe
from lapilli.train.trainer.loop import train
from lapilli.train.trainer.metrics import RunLog
from pebble.blind import NEEDS_PICTURE
from pebble.conversation import draw_questions
from pebble.examine import examine, words_of_scene
from pebble.grow import grow_language_model
from pebble.pointing import DEPTH, HEADS
from pebble.reader import FeatureReader
from pebble.recipe import PebbleRecipe, WorldRecipe
from pebble.regions import LEXICON, region_words
from pebble.sample import sample_scene
from pebble.score import exam
from pebble.talk import (
    TalkTask,
    by_length,
    encode_sample,
    stored_features,
    without_long,
    word_features,
)

SIDE = 4


@pytest.fixture(scope="module")
def regions():
    words = [region_words(sample_scene(seed), SIDE).reshape(SIDE**2, -1) for seed in range(8)]
    return np.packbits(np.stack(words), axis=-1)


def new_task(tokenizer, regions, stage, *, num_layers=1, num_heads=1, **data):
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=32,
        num_layers=num_layers, num_heads=num_heads, num_kv_heads=num_heads,
        head_dim=32 // num_heads, norm_eps=1e-5, rope_theta=1e4, max_positions=512,
    )  # fmt: skip
    torch.manual_seed(0)
    recipe = PebbleRecipe(
        stage=stage,
        optim=OptimRecipe(lr=2e-2),
        run=RunRecipe(steps=12, batch_size=2, gradient_accumulation_steps=2, log_every=1),
        data=WorldRecipe(**{"template": "vicuna_v1", "questions": (2, 3), **data}),
    )
    reader = FeatureReader(Decoder(config), nn.Linear(len(LEXICON), 32, bias=False))
    return TalkTask(
        reader,
        recipe,
        tokenizer,
        word_features(regions),
        num_pictures=8,
    )


@pytest.mark.slow
def test_answers_are_supervised_and_pictures_have_their_place(tokenizer, regions):
    batch, count = new_task(tokenizer, regions, "instruct").batch(0, 0)
    batch = batch.rows
    assert count == batch.num_valid == int(batch.loss_mask.sum())
    assert [span.length for span in batch.spans] == [16, 16]
    ends = batch.input_ids[batch.loss_mask] == tokenizer.eos_id
    assert ends.any()
    for span in batch.spans:
        assert not batch.loss_mask[span.row, : span.start + span.length].any()


def test_rows_are_a_function_of_the_step(tokenizer, regions):
    first = new_task(tokenizer, regions, "language")
    second = new_task(tokenizer, regions, "language")
    second.batch(0, 1)
    for micro in (0, 1):
        ours, theirs = first.batch(4, micro)[0], second.batch(4, micro)[0]
        assert torch.equal(ours.rows.input_ids, theirs.rows.input_ids)


@pytest.mark.slow
def test_the_language_stage_reads_sentences_too(tokenizer, regions):
    task = new_task(tokenizer, regions, "language")
    spans = [len(task.batch(step, micro)[0].rows.spans) for step in range(8) for micro in (0, 1)]
    assert min(spans) < 2
    assert max(spans) == 2


def test_attention_is_taught_where_the_recipe_says_so(tokenizer, regions):
    task = new_task(tokenizer, regions, "instruct", pointing=0.5, num_layers=4, num_heads=4)
    batch, count = task.batch(0, 0)
    loss = task.loss(batch)
    assert set(loss.parts) == {*HEADS, "answers"}
    answers = float(task.model.loss(batch.rows).total.detach())
    assert loss.parts["answers"] == pytest.approx(answers, rel=1e-4)
    taught = sum(loss.parts[kind] for kind in HEADS)
    assert float(loss.total.detach()) == pytest.approx(
        loss.parts["answers"] + 0.5 * taught, rel=1e-4
    )
    assert taught > 0 < count


def test_a_grown_model_is_taught_in_the_layers_that_it_grew_from(tokenizer, regions):
    task = new_task(tokenizer, regions, "instruct", pointing=0.5, num_layers=DEPTH, num_heads=4)
    batch, _ = task.batch(0, 0)
    before = task.loss(batch)
    small = task.model.language_model
    larger = replace(small.config, num_layers=2 * DEPTH)
    task.model.language_model = grow_language_model(small, larger, 0)
    assert task.loss(batch).parts == pytest.approx(before.parts, rel=1e-4)


def test_captions_align(tokenizer, regions):
    batch, _ = new_task(tokenizer, regions, "align", template="plain").batch(0, 0)
    batch = batch.rows
    text = tokenizer.decode(batch.input_ids[0][batch.loss_mask[0]].tolist())
    assert text.strip()
    assert "?" not in text


@pytest.mark.slow
def test_the_loss_falls(tokenizer, regions, tmp_path):
    task = new_task(tokenizer, regions, "language")
    train(task, task._recipe, tmp_path)
    losses = [record["loss"] for record in RunLog(tmp_path).records()]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])


@pytest.mark.slow
def test_long_answers_go_with_their_follow_ups():
    rng = np.random.default_rng(0)
    found = 0
    for seed in range(80):
        scene = sample_scene(seed, "objects")
        turns = draw_questions(scene, np.random.default_rng(seed), least=6, most=10)
        kept = without_long(turns, rng, 0.0)
        if all(len(turn.answer) > 24 for turn in turns):
            continue
        assert all(len(turn.answer) <= 24 for turn in kept)
        for turn in kept:
            if turn.needs_previous:
                assert turns[turns.index(turn) - 1] in kept
        found += len(turns) - len(kept)
        assert without_long(turns, rng, 1.0) == turns
    assert found > 10


def test_stored_features_become_float32():
    stored = np.ones((2, 3, 4), dtype=np.float16)
    assert stored_features(stored)(1).dtype == torch.float32


@pytest.mark.slow
def test_the_exam_can_be_taken_while_training(tokenizer, regions):
    model = new_task(tokenizer, regions, "instruct").model.eval()
    items = exam(24)
    figures = examine(model, tokenizer, words_of_scene(SIDE), items)
    assert set(figures) == {item.skill for item in items} | {"all"}
    assert all(0 <= value <= 1 for value in figures.values())


@pytest.mark.slow
def test_some_conversations_of_the_last_stage_begin_without_a_picture(tokenizer, regions):
    task = new_task(tokenizer, regions, "instruct", num_layers=4, num_heads=4, pointing=0.5)
    seen = set()
    for step in range(30):
        for micro in range(2):
            batch, count = task.batch(step, micro)
            assert count > 0
            for row in range(len(batch.rows.input_ids)):
                spans = [span for span in batch.rows.spans if span.row == row]
                answers = batch.rows.input_ids[row][batch.rows.loss_mask[row]].tolist()
                asks = NEEDS_PICTURE in tokenizer.decode(answers)
                seen.add((len(spans), asks))
                if not spans:
                    assert asks
    assert seen == {(0, True), (1, True), (1, False)}


@pytest.mark.slow
def test_other_stages_always_have_their_picture(tokenizer, regions):
    for stage in ("align", "language"):
        task = new_task(tokenizer, regions, stage)
        ids = [task.batch(step, 0)[0].rows.input_ids for step in range(8)]
        assert all(NEEDS_PICTURE not in tokenizer.decode(row.tolist()) for x in ids for row in x)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_groups_hold_every_row_once_by_length(lengths, pieces):
    groups = by_length(lengths, pieces)
    rows = [row for group in groups for row in group]
    assert sorted(rows) == list(range(len(lengths)))
    ordered = [lengths[row] for row in rows]
    assert ordered == sorted(lengths, reverse=True)


def record(*texts, **fields):
    """A record of turns that begin with a person's."""
    who = ("human", "gpt")
    turns = [{"from": who[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "7", "conversations": turns, **fields}


def test_answers_and_their_ends_are_supervised(tokenizer):
    one = record("<image>\nWhat is it?", "a cat", "Sure?", "yes", image="a.png")
    prompt = encode_sample(one, TEMPLATES["vicuna_v1"], tokenizer, [3])
    kept = [i for i, counts in zip(prompt.input_ids, prompt.loss_mask, strict=True) if counts]
    assert tokenizer.decode(kept, skip_special=False).strip() == "a cat</s> yes</s>"
    assert prompt.spans[0].length == 3


def test_a_sample_without_an_answer_is_an_error(tokenizer):
    with pytest.raises(DataError, match="'7' has no supervised token"):
        encode_sample(record("Q"), TEMPLATES["vicuna_v1"], tokenizer, [])
