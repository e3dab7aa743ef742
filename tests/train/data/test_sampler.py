"""Which samples a step reads: nothing but the seed, the step and the data decide it."""

import json
import pickle
from collections import Counter
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.train.data.sampler import (
    LengthGroupedSampler,
    Order,
    draw_indices,
    even_chunks,
    grouped_by_length,
    grouped_by_modality,
)

GROUPS = st.sampled_from(["none", "length", "modality"])
WORDS = st.lists(st.integers(-60, 60).filter(bool), min_size=1, max_size=60)
SIZES = st.integers(1, 6)


def read(order, first, last):
    """Samples of steps first to last - 1, micro-batch after micro-batch."""
    return [
        index
        for step in range(first, last)
        for micro in range(order.micro_batches)
        for index in order.indices(step, micro)
    ]


def steps_of(order, epochs):
    return ceil(epochs * order.epoch_size / order.step_size)


def new_order(words, group, batch_size, micro_batches, seed=0, **options):
    return Order(
        [len(words)],
        words=words,
        group=group,
        batch_size=batch_size,
        micro_batches=micro_batches,
        seed=seed,
        **options,
    )


@pytest.mark.slow
@given(WORDS, GROUPS, SIZES, SIZES, st.integers(0, 99))
def test_every_epoch_has_every_sample_once(words, group, batch_size, micro_batches, seed):
    order = new_order(words, group, batch_size, micro_batches, seed)
    seen = read(order, 0, steps_of(order, 3.0))
    for epoch in range(3):
        part = seen[epoch * len(words) : (epoch + 1) * len(words)]
        assert sorted(part) == list(range(len(words)))


@pytest.mark.slow
@given(WORDS, GROUPS, SIZES, SIZES, st.integers(0, 20))
def test_a_run_that_goes_on_reads_what_it_would_have_read(words, group, batch, micro_batches, step):
    whole = read(new_order(words, group, batch, micro_batches), 0, step + 5)
    resumed = read(new_order(words, group, batch, micro_batches), step, step + 5)
    assert whole[step * batch * micro_batches :] == resumed
    again = pickle.loads(pickle.dumps(new_order(words, group, batch, micro_batches)))
    assert read(again, step, step + 5) == resumed


@given(WORDS, SIZES, SIZES)
def test_steps_of_one_kind(words, batch_size, micro_batches):
    """But for the ends of epochs, and what is left over of each kind before them."""
    order = new_order(words, "modality", batch_size, micro_batches)
    steps = steps_of(order, 2.0)
    mixed = 0
    for step in range(steps):
        kinds = {words[index] > 0 for index in read(order, step, step + 1)}
        mixed += len(kinds) > 1
    assert mixed <= 2 * 3
    size = order.step_size
    whole = sum(max(sum((w > 0) is kind for w in words) - 1, 0) // size for kind in (True, False))
    first_epoch = [{words[i] > 0 for i in read(order, s, s + 1)} for s in range(whole)]
    if len({word > 0 for word in words}) == 2:
        assert all(len(kinds) == 1 for kinds in first_epoch)


@pytest.mark.parametrize("seed", range(4))
def test_steps_of_later_epochs_are_of_one_kind_too(seed):
    """The first step of an epoch is full of the one before; groups begin after it."""
    words = [*range(1, 38), *range(-30, 0)]
    order = new_order(words, "modality", 4, 2, seed)
    for epoch in (1, 2):
        first, last = (-(-e * len(words) // 8) for e in (epoch, epoch + 1))
        inside = read(order, first, last)[: (epoch + 1) * len(words) - first * 8]
        kinds = [words[index] > 0 for index in inside]
        whole = sum((kinds.count(kind) - 1) // 8 for kind in (True, False))
        assert whole >= 5
        assert all(len(set(kinds[8 * n : 8 * n + 8])) == 1 for n in range(whole))


@given(st.integers(1, 30), SIZES, st.integers(0, 9), st.integers(0, 30))
def test_without_groups_it_is_a_permutation_per_epoch(count, batch_size, seed, step):
    order = Order([count], batch_size=batch_size, seed=seed)
    assert order.indices(step, 0) == draw_indices(count, batch_size, step, seed=seed).tolist()


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(st.integers(1, 20), st.sampled_from([0.25, 0.5, 1.0, 2.0, 2.5])), min_size=1
    ),
    st.integers(0, 5),
)
def test_weights_say_how_often_a_source_is_drawn(sources, seed):
    counts, weights = [n for n, _ in sources], [w for _, w in sources]
    per_epoch = [round(n * w) for n, w in sources]
    if not sum(per_epoch):
        return
    order = Order(counts, weights=weights, batch_size=1, seed=seed)
    assert order.epoch_size == sum(per_epoch)
    for epoch in range(3):
        seen = Counter(read(order, epoch * order.epoch_size, (epoch + 1) * order.epoch_size))
        start = 0
        for count, drawn in zip(counts, per_epoch, strict=True):
            mine = [seen[i] for i in range(start, start + count)]
            assert sum(mine) == drawn
            if drawn:  # evenly: no sample twice more often than another, over two passes' border
                assert max(mine) - min(mine) <= 2
            start += count


def test_half_a_source_is_another_half_next_time():
    order = Order([10], weights=[0.5], batch_size=5)
    assert sorted(read(order, 0, 2)) == list(range(10))
    assert sorted(read(order, 2, 4)) == list(range(10))


@pytest.mark.slow
@given(WORDS, SIZES, SIZES, st.integers(1, 4))
def test_processes_share_the_micro_batches(words, batch_size, rounds, processes):
    """The micro-batches of a step are the same whoever reads them, in whatever order."""
    micro_batches = rounds * processes
    order = new_order(words, "modality", batch_size, micro_batches)
    alone = [order.indices(1, micro) for micro in range(micro_batches)]
    for rank in range(processes):
        own = new_order(words, "modality", batch_size, micro_batches)
        for micro in reversed(range(rank, micro_batches, processes)):
            assert own.indices(1, micro) == alone[micro]


def test_seeds_and_epochs_differ():
    orders = [Order([100], batch_size=100, seed=seed) for seed in range(3)]
    seen = {tuple(order.indices(step, 0)) for order in orders for step in range(3)}
    assert len(seen) == 9
    words = [i + 1 for i in range(100)]
    grouped = {tuple(new_order(words, "modality", 10, 2, seed).indices(0, 0)) for seed in range(5)}
    assert len(grouped) == 5


def test_the_global_random_state_is_left_alone():
    import torch

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = read(new_order(list(range(-30, 0)) + list(range(1, 40)), "modality", 4, 2), 0, 9)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = read(new_order(list(range(-30, 0)) + list(range(1, 40)), "modality", 4, 2), 0, 9)
    assert first == again


def test_micro_batches_are_of_even_length():
    words = [10 * (i % 20 + 1) for i in range(400)]
    order = new_order(words, "length", 10, 4)
    for step in range(steps_of(order, 1.0)):
        sums = [sum(words[i] for i in order.indices(step, micro)) for micro in range(4)]
        assert max(sums) < 1.2 * min(sums)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"counts": []}, "is empty"),
        ({"counts": [5], "weights": [0.0]}, "is empty: expected samples, and weights above 0"),
        ({"counts": [5, 5], "weights": [-1.0, 1.0]}, "weights above 0"),
        ({"counts": [5], "group": "length"}, "grouping by length needs the words"),
        ({"counts": [5], "group": "modality", "words": [1]}, "needs the words of every sample"),
    ],
)
def test_orders_of_nothing_are_refused(options, expected):
    with pytest.raises(ConfigError, match=expected):
        Order(batch_size=1, **options)


LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)
SIGNED = st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_grouping_by_length_keeps_every_sample(
    lengths: list[int], batch_size: int, world_size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = grouped_by_length(lengths, batch_size, world_size, generator)
    assert sorted(order) == list(range(len(lengths)))


@given(SIGNED, st.integers(1, 4), st.integers(1, 3))
def test_only_the_last_batch_is_mixed(lengths: list[int], batch_size: int, world_size: int) -> None:
    order = grouped_by_modality(lengths, batch_size, world_size)
    assert sorted(order) == list(range(len(lengths)))
    mega = batch_size * world_size
    left_over = [sum(kind) for kind in ([x > 0 for x in lengths], [x < 0 for x in lengths])]
    tails = [(n % mega or mega) if n else 0 for n in left_over]
    if not all(tails):
        return  # one kind only: nothing can be mixed
    whole = order[: len(order) - sum(tails)]
    for start in range(0, len(whole), mega):
        assert len({lengths[i] > 0 for i in whole[start : start + mega]}) == 1


@given(LENGTHS, st.integers(1, 4))
def test_chunks_have_equal_numbers(lengths: list[int], chunks: int) -> None:
    parts = even_chunks(range(len(lengths)), lengths, chunks)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_the_sampler_draws_anew_each_time() -> None:
    sampler = LengthGroupedSampler(2, 1, list(range(1, 30)), torch.Generator().manual_seed(0))
    assert len(sampler) == 29
    assert list(sampler) != list(sampler)


def test_a_sample_without_words_is_named() -> None:
    with pytest.raises(ConfigError, match="sample 1 has length 0"):
        grouped_by_modality([3, 0, -2], 1, 1)


def test_a_sampler_without_lengths_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs the lengths"):
        LengthGroupedSampler(2, 1)


def test_orders_are_those_of_the_original(conformance) -> None:
    """Index by index, with the same seeds."""
    text = (conformance / "cases" / "open" / "_labels" / "cases.json").read_text(encoding="utf-8")
    cases = [case for case in json.loads(text)["cases"] if case["op"] == "sampler"]
    assert len(cases) >= 6
    for case in cases:
        given = case["input"]
        group = grouped_by_modality if given["by_modality"] else grouped_by_length
        generator = torch.Generator().manual_seed(given["seed"])
        torch.manual_seed(given["global_seed"])  # of the samples of a kind
        arguments = (given["lengths"], given["batch_size"], given["world_size"], generator)
        assert group(*arguments) == case["expect"]["indices"], case["id"]
