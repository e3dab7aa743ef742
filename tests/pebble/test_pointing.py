import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from lapilli.nn.attention import FEWEST, LEAST_SHARED, attend
from lapilli.prompt.template import TEMPLATES
from lapilli.train.trainer.step import PlainAttention
from pebble.conversation import as_sample, draw_questions
from pebble.pointing import (
    HEADS,
    Look,
    Pointers,
    QueriesAndKeys,
    collate_looks,
    looks,
    pointing_loss,
)
from pebble.questions import list_objects
from pebble.reference import Question
from pebble.regions import region_words, shown_patches
from pebble.sample import sample_scene
from pebble.talk import encode_sample

SIDE = 8


def encoded(scene, turns, tokenizer):
    sample = as_sample("a", turns, opening="<image>\n", image="a")
    return encode_sample(sample, TEMPLATES["vicuna_v1"], tokenizer, [SIDE**2])


def word_at(prompt, tokenizer, position):
    return tokenizer.id_to_token(prompt.input_ids[position]).strip("\u2581")


def patches_in(look, prompt):
    start = prompt.spans[0].start
    return [[position - start for position in group] for group in look.groups if group != (0,)]


@pytest.fixture(scope="module")
def scene():
    found = (sample_scene(seed, "objects") for seed in range(99))
    return next(one for one in found if len({item.shape for item in one.objects}) == 3)


def expected(scene, item):
    return shown_patches(scene, item, SIDE).flatten().nonzero()[0].tolist()


def test_a_named_object_is_looked_at(tokenizer, scene):
    item = scene.objects[1]
    turn = Question(
        skill="colour",
        text=f"What colour is the {item.shape}?",
        answer=item.colour,
        names=((f"the {item.shape}", (item,)),),
        says=((item.colour, (item,)),),
    )
    prompt = encoded(scene, [turn], tokenizer)
    found = looks(prompt, [turn], tokenizer, scene, SIDE)
    (named,) = found["named"]
    assert item.shape.endswith(word_at(prompt, tokenizer, named.position))
    assert named.groups[0] == (0,)  # a place to look at when there is nothing else
    assert patches_in(named, prompt) == [expected(scene, item)]
    assert {look.position for look in found["asked first"]} == {
        look.position for look in found["said"]
    }
    assert all(look.groups == ((named.position,),) for look in found["asked last"])
    said = found["said"]
    assert prompt.loss_mask[said[0].position + 1]
    assert all(patches_in(look, prompt) == [expected(scene, item)] for look in said)


def test_what_is_not_there_is_looked_for_in_vain(tokenizer, scene):
    turn = Question(
        skill="count", text="How many pink crosses are there?", answer="0",
        names=(("pink crosses", ()),),
    )  # fmt: skip
    prompt = encoded(scene, [turn], tokenizer)
    found = looks(prompt, [turn], tokenizer, scene, SIDE)
    (named,) = found["named"]
    assert named.groups == ((0,),)
    assert found["said"] == []


def test_it_means_what_was_named_before(tokenizer, scene):
    first, other = scene.objects[:2]
    turns = [
        Question(
            skill="size", text=f"How big is the {first.shape}?", answer=first.size, about=first,
            names=((f"the {first.shape}", (first,)),), says=((first.size, (first,)),),
        ),
        Question(
            skill="relation", text="And what is left of it?", answer=f"a red {other.shape}",
            needs_previous=True, names=(("it", (first,)),),
            says=((f"a red {other.shape}", (other,)),),
        ),
    ]  # fmt: skip
    prompt = encoded(scene, turns, tokenizer)
    found = looks(prompt, turns, tokenizer, scene, SIDE)
    about, answer = found["named"]
    assert other.shape.endswith(word_at(prompt, tokenizer, answer.position))
    said = {look.position for look in found["said"]}
    late = [look for look in found["asked last"] if look.position in said]
    assert late[-1].groups == ((about.position,),)


def test_the_end_of_a_phrase_looks_at_what_is_left_over(tokenizer, scene):
    turn = list_objects(scene, np.random.default_rng(0))
    prompt = encoded(scene, [turn], tokenizer)
    left = looks(prompt, [turn], tokenizer, scene, SIDE)["left over"]
    assert [patches_in(look, prompt) for look in left] == [
        [expected(scene, item) for item in scene.objects[number + 1 :]]
        for number in range(len(scene.objects))
    ]
    assert all(look.groups[0] == (0,) for look in left)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_every_conversation_can_be_pointed_out(tokenizer, seed):
    scene = sample_scene(seed)
    turns = draw_questions(scene, np.random.default_rng(seed), least=8, most=14)
    prompt = encoded(scene, turns, tokenizer)
    found = looks(prompt, turns, tokenizer, scene, SIDE)
    assert set(found) == set(HEADS)
    for items in found.values():
        for look in items:
            assert look.groups
            assert all(0 <= at <= look.position for group in look.groups for at in group)
    # A head that says something looks at patches or at nothing, and predicts a supervised token.
    assert all(prompt.loss_mask[look.position + 1] for look in found["said"])
    for look in found["said"]:
        assert look.groups == ((0,),) or len(patches_in(look, prompt)) == len(look.groups)


@given(
    rows=st.integers(1, 3), length=st.integers(2, 9), heads=st.integers(1, 3), seed=st.integers(0)
)
def test_the_loss_is_a_cross_entropy_of_attention(rows, length, heads, seed):
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed % 2**31)
    q, k = (torch.randn(rows, heads, length, 4, generator=generator) for _ in range(2))
    items, total, number = [], 0.0, 0
    head = int(rng.integers(heads))
    for row in range(rows):
        position = int(rng.integers(length))
        groups = tuple(
            tuple(rng.permutation(position + 1)[: int(rng.integers(1, position + 2))].tolist())
            for _ in range(int(rng.integers(1, 3)))
        )
        items.append([Look(position, groups)])
        scores = q[row, head, position] @ k[row, head, : position + 1].T / 2
        shares = functional.softmax(scores, dim=-1)
        masses = [shares[list(group)].sum().log() for group in groups]
        total -= float(torch.stack(masses).mean())
        number += 1
    pointers = collate_looks(items, length)
    loss = pointing_loss(q, k, pointers, head=head)
    assert float(loss) == pytest.approx(total / number, abs=1e-4)


def test_no_looks_no_loss():
    q = torch.randn(1, 1, 3, 4)
    nothing = collate_looks([[]], 3)
    assert isinstance(nothing, Pointers)
    assert float(pointing_loss(q, q, nothing, head=0)) == 0.0


def test_queries_and_keys_are_kept_by_layer():
    q, k, v = torch.randn(3, 1, 2, 5, 4).unbind()
    with QueriesAndKeys() as seen:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        functional.scaled_dot_product_attention(k, q, v)
    assert [pair[0] is one for pair, one in zip(seen.layers, (q, k), strict=True)] == [True, True]
    torch.testing.assert_close(
        out, functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


@pytest.mark.parametrize("length", [FEWEST - 1, FEWEST])
def test_they_are_kept_whatever_way_attention_takes(length):
    q, k, v = torch.randn(3, 1, 2, length, LEAST_SHARED).requires_grad_().unbind()
    with PlainAttention(), QueriesAndKeys() as seen:
        out = attend(q, k, v)
    [(queries, keys)] = seen.layers
    assert queries is q
    assert keys is k
    torch.testing.assert_close(
        out, functional.scaled_dot_product_attention(q, k, v, is_causal=True), atol=1e-5, rtol=1e-4
    )


def test_shown_patches_hold_its_middle_and_no_other_object(scene):
    words = region_words(scene, SIDE)
    for item in scene.objects:
        patches = shown_patches(scene, item, SIDE)
        assert patches.any()
        assert not any(
            (patches & shown_patches(scene, other, SIDE)).any()
            for other in scene.objects
            if other is not item
        )
        assert words[patches].any(-1).all()
