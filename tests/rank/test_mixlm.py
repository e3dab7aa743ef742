"""MixLM's losses are their formulas, its prompts those of a Ranker, and a toy rule is learned."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lapilli
from lapilli import Chat
from lapilli.checkpoint.load import load_checkpoint
from lapilli.errors import ConfigError, ContextTooLongError, PromptError, UnsupportedModelError
from lapilli.prompt.message import MediaPart
from lapilli.rank import Ranker, RankTemplate, YesNo
from lapilli.rank.mixlm import (
    Phase,
    RankingExample,
    RankingTask,
    binary_kl,
    with_teacher,
)
from lapilli.rank.score import label_tokens
from lapilli.train.build import add_modalities
from lapilli.train.recipe import ModelRecipe, OptimRecipe, Recipe, RunRecipe
from lapilli.train.stages import choose_trainable
from lapilli.train.trainer.loop import Task, TrainingError, evaluate, train
from tests.modality.declared import DECLARED, tiny_language_model
from tests.train.conftest import steps_of

COLOURS = ("red", "green", "blue", "grey")
THINGS = ("a boat", "a large box", "the old house", "a star", "one circle")
TEMPLATE = RankTemplate(user="{query}?\n{item}")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mixlm")
    plain = tiny_language_model(root / "plain")
    add_modalities(str(plain), root / "ranker", {"item": {**DECLARED["item"], "tokens": 2}})
    return root / "ranker"


@pytest.fixture
def chat(checkpoint) -> Chat:
    return Chat(load_checkpoint(checkpoint, device="cpu", dtype="float32"))


def examples(teacher: bool = True) -> list[RankingExample]:
    """Red things match; the teacher is less sure."""
    return [
        RankingExample(
            query, f"{thing}, {colour}", float(colour == "red"), given if teacher else None
        )
        for query in ("good", "what I like")
        for thing in THINGS
        for colour in COLOURS
        for given in [0.9 if colour == "red" else 0.1]
    ]


def recipe(**run) -> Recipe:
    given = {"steps": 10, "batch_size": 8, "log_every": 1, "save_every": 99, "plot": False, **run}
    return Recipe(
        stage="instruct",
        optim=OptimRecipe(lr=3e-3),
        run=RunRecipe(**given),
        model=ModelRecipe(tune_encoder=("item",)),
    )


def task(chat: Chat, asked: Recipe, **changes) -> RankingTask:
    choose_trainable(chat.model, asked)
    given = {"examples": examples(), "reads": "mixed", "template": TEMPLATE, **changes}
    return RankingTask(chat=chat, run=asked.run, **given)


@given(st.floats(0, 1), st.floats(-30, 30))
def test_the_divergence_is_its_formula(target, logit):
    p = 1 / (1 + math.exp(-logit))
    terms = [(target, math.log(p)), (1 - target, -math.log1p(math.exp(logit)))]
    expected = sum(share * (math.log(share) - log) for share, log in terms if share > 0)
    found = binary_kl(*(torch.tensor([value], dtype=torch.float64) for value in (target, logit)))
    assert float(found) == pytest.approx(expected, abs=1e-9)
    assert float(found) >= -1e-9


@pytest.mark.parametrize("reads", ["text", "mixed"])
@pytest.mark.parametrize("labels", [("yes", "no"), ("1", "2")])
def test_what_is_learned_is_what_a_ranker_asks(chat, reads, labels):
    score = YesNo(yes=labels[0], no=labels[1], difference=True)
    made = task(chat, recipe(), reads=reads, score=score)
    made.model.eval()
    chosen = made.examples[3:9] + made.examples[-2:]
    with torch.no_grad():
        found, hidden = made.model.read(made.prompts(chosen, reads=reads))
    assert hidden.shape == (8, 48)
    ranker = Ranker(chat, score=score, template=TEMPLATE)
    for example, logit in zip(chosen, found, strict=True):
        item = example.item if reads == "text" else MediaPart(example.item, "item")
        expected = ranker.score(example.query, [item])
        torch.testing.assert_close(logit[None], expected, rtol=1e-4, atol=1e-4)


def test_the_lead_of_labels_is_part_of_the_prompt():
    """pebble's tokenizer cuts a digit into a space and the digit."""
    pebble = lapilli.load("pebble", device="cpu", dtype="float32")
    score = YesNo(yes="1", no="2", difference=True)
    made = RankingTask(
        chat=pebble, examples=examples()[:3], run=recipe().run, score=score, template=TEMPLATE
    )
    assert len(label_tokens(score.labels, pebble.tokenizer)[0]) == 1
    with torch.no_grad():
        found, _ = made.model.eval().read(made.prompts(made.examples, reads="text"))
    expected = Ranker(pebble, score=score, template=TEMPLATE).score(
        "good", [example.item for example in made.examples]
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_sum_of_its_parts(chat):
    phase = Phase(distill=0.3, align=0.7, hidden=2.0, text=0.9)
    made = task(chat, recipe(), curriculum=[phase])
    batch, count = made.batch(1, 0)
    found = made.loss(batch)
    with torch.no_grad():
        p, h = made.model.read(batch.read)
        q, g = made.model.read(batch.text)
    p, q = torch.sigmoid(p).double(), torch.sigmoid(q).double()

    def divergence(target, p=p):
        pairs = [(target, p), (1 - target, 1 - p)]
        return sum((torch.special.xlogy(t, t) - t * o.log()).sum() for t, o in pairs)

    cosine = (h * g).sum(-1) / (h.norm(dim=-1) * g.norm(dim=-1))
    expected = {
        "labels": divergence(batch.labels.double()),
        "distill": divergence(batch.teacher.double()),
        "align": divergence(q),
        "hidden": (1 - cosine).sum(),
        "text": divergence(batch.labels.double(), q),
    }
    assert count == 8
    assert {k: float(v) for k, v in found.parts.items()} == pytest.approx(
        {k: float(v) for k, v in expected.items()}, rel=1e-3, abs=1e-4
    )
    weights = {"labels": 1, "distill": 0.3, "align": 0.7, "hidden": 1.4, "text": 0.9}
    total = sum(weights[name] * float(part) for name, part in found.parts.items())
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)


def test_gradients_reach_the_encoder_and_none_flows_through_the_text(chat):
    made = task(chat, recipe(), curriculum=[Phase(align=1.0, distill=0.0)])
    batch, _ = made.batch(0, 0)
    seen = []
    made.model.hidden, real = lambda one: seen.append(real(one)) or seen[-1], made.model.hidden
    made.loss(batch).total.backward()
    assert [hidden.requires_grad for hidden in seen] == [True, False]
    silent = [n for n, p in made.model.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    encoder = chat.model.modality("item").encoder
    assert all(float(p.grad.abs().sum()) > 0 for p in encoder.parameters())


def test_a_text_that_is_learned_too_is_not_led_by_the_vectors(chat):
    found = {}
    for text, align in ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0)):
        made = task(chat, recipe(), curriculum=[Phase(distill=0.0, align=align, text=text)])
        made.model.zero_grad()
        made.loss(made.batch(0, 0)[0]).total.backward()
        weight = chat.model.language_model.lm_head.weight
        found[text, align] = weight.grad.clone()
    made.model.zero_grad()
    made = task(chat, recipe(), curriculum=[Phase(distill=0.0, align=0.0)])
    made.loss(made.batch(0, 0)[0]).total.backward()
    labels = chat.model.language_model.lm_head.weight.grad
    assert not torch.equal(found[1.0, 0.0], labels)
    torch.testing.assert_close(
        found[1.0, 1.0] + labels, found[1.0, 0.0] + found[0.0, 1.0], rtol=1e-4, atol=1e-6
    )


def test_phases_switch_at_their_step(chat):
    phases = (Phase(align=2.0), Phase(start=0.25, distill=0.0), Phase(start=0.5, align=0.0))
    made = task(chat, recipe(steps=8), curriculum=phases)
    assert [phases.index(made.phase(step)) for step in range(8)] == [0, 0, 1, 1, 2, 2, 2, 2]
    first, second, third = (made.batch(step, 0)[0] for step in (1, 2, 4))
    assert first.teacher is not None
    assert first.text is not None
    assert second.teacher is None
    assert second.text is not None
    assert third.teacher is not None
    assert third.text is None
    text = task(chat, recipe(), reads="text").batch(0, 0)[0]
    assert text.teacher is None
    assert text.text is None


@given(st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=10, deadline=None)
def test_micro_batches_go_through_the_examples(checkpoint_chat, micros, size):
    made = task(checkpoint_chat, recipe(gradient_accumulation_steps=micros, batch_size=size))
    places = [(step, micro) for step in range(99) for micro in range(micros)]
    names = [name for place in places[: 80 // size] for name in made.names(*place)]
    assert len(set(names[:40])) == min(40, len(names))
    assert made.batch(1, 0)[0].ids == tuple(made.names(1, 0))


@pytest.fixture(scope="module")
def checkpoint_chat(checkpoint) -> Chat:
    return Chat(load_checkpoint(checkpoint, device="cpu", dtype="float32"))


@pytest.mark.slow
def test_three_stages_teach_a_rule(chat, tmp_path):
    """Text ranker, its probabilities, then encoder and ranker together."""
    asked = recipe(steps=40, gradient_accumulation_steps=2, batch_size=10)
    plain = examples(teacher=False)
    text = task(chat, asked, examples=plain, reads="text", held_out=plain[:8])
    assert isinstance(text, Task)
    before = evaluate(text, asked)["eval_loss"]
    train(text, asked, tmp_path / "text")
    assert evaluate(text, asked)["eval_loss"] < 0.2 * before
    ranker = Ranker(chat, template=TEMPLATE)
    chat.model.eval()
    taught = with_teacher(plain, ranker)
    assert all(abs(one.teacher - one.label) < 0.4 for one in taught)
    expected = ranker.score(taught[5].query, [taught[5].item])[0]
    assert taught[5].teacher == pytest.approx(float(expected), abs=1e-5)

    mixed = task(chat, asked, examples=taught, held_out=plain)
    before = evaluate(mixed, asked)["eval_loss"]
    train(mixed, asked, tmp_path / "mixed")
    assert evaluate(mixed, asked)["eval_loss"] < 0.2 * before
    losses = steps_of(tmp_path / "mixed")
    assert losses[-1]["align"] < losses[0]["align"]
    assert losses[-1]["hidden"] < losses[0]["hidden"]
    chat.model.eval()
    items = [MediaPart(f"a lamp, {colour}", "item") for colour in COLOURS]
    scores = Ranker(chat, template=TEMPLATE).score("good", items)
    assert int(scores.argmax()) == 0


@pytest.mark.slow
def test_a_run_in_two_parts_makes_the_same_bits(checkpoint, tmp_path):
    def new(asked: Recipe) -> RankingTask:
        chat = Chat(load_checkpoint(checkpoint, device="cpu", dtype="float32"))
        return task(chat, asked)

    asked = recipe(steps=4, save_every=1, gradient_accumulation_steps=2, batch_size=3)
    whole, stopped, again = new(asked), new(asked), new(asked)
    train(whole, asked, tmp_path / "whole")
    draw = stopped.batch
    stopped.batch = lambda step, micro: draw(step, micro) if step < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(stopped, asked, tmp_path / "parts")
    train(again, asked, tmp_path / "parts")
    steps = [one["step"] for one in steps_of(tmp_path / "parts")]
    assert all(b == a + 1 for a, b in pairwise(steps))
    assert steps[-1] == 4
    assert all(map(torch.equal, whole.model.parameters(), again.model.parameters()))
    other = new(recipe(steps=5, batch_size=3, gradient_accumulation_steps=2))
    with pytest.raises(TrainingError, match="steps of the curriculum"):
        train(
            other, recipe(steps=5, batch_size=3, gradient_accumulation_steps=2), tmp_path / "parts"
        )


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"examples": []}, ConfigError, "learns from at least one example, found none"),
        ({"encoder": "user"}, UnsupportedModelError, "no modality 'user'; it has: item"),
        ({"examples": examples(teacher=False)}, ConfigError, "40 of 40 examples have no teacher"),
        ({"curriculum": []}, ConfigError, r"start at \[\]: expected 0"),
        ({"curriculum": [Phase(start=0.5)]}, ConfigError, r"start at \[0.5\]: expected 0"),
        ({"curriculum": [Phase(), Phase()]}, ConfigError, r"start at \[0.0, 0.0\]"),
        ({"score": YesNo(yes="absolutely")}, PromptError, "the label 'absolutely' has"),
    ],
)
def test_one_clear_error(checkpoint_chat, changes, error, match):
    with pytest.raises(error, match=match):
        task(checkpoint_chat, recipe(), **changes)


def test_values_that_are_none():
    with pytest.raises(ConfigError, match=r"the label of the item 'a' for the query 'q' is 1.5"):
        RankingExample("q", "a", 1.5)
    with pytest.raises(ConfigError, match=r"the teacher of the item 'a' for the query 'q' is -0.5"):
        RankingExample("q", "a", 1.0, -0.5)
    with pytest.raises(ConfigError, match=r"a phase starts at 1.0"):
        Phase(start=1.0)
    with pytest.raises(ConfigError, match=r"the weight align of a phase is -1.0"):
        Phase(align=-1.0)


def test_an_example_that_does_not_fit(checkpoint_chat):
    long = [RankingExample("q", "a boat " * 600, 1.0)]
    made = task(checkpoint_chat, recipe(), examples=long, reads="text")
    with pytest.raises(ContextTooLongError, match="example 0 has"):
        made.batch(0, 0)
    with pytest.raises(PromptError, match="the query is empty"):
        task(
            checkpoint_chat, recipe(), examples=[RankingExample("", "a", 1.0)], reads="text"
        ).batch(0, 0)


def test_a_ranker_that_gives_no_probabilities(checkpoint_chat):
    ranker = Ranker(checkpoint_chat, score=YesNo(difference=True), template=TEMPLATE)
    with pytest.raises(ConfigError, match="the teacher of the item"):
        with_teacher(examples(), ranker)
