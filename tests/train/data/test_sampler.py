import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.errors import ConfigError
from lapilli.train.data.order import (
    LengthGroupedSampler,
    even_chunks,
    grouped_by_length,
    grouped_by_modality,
)

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)
SIGNED = st.lists(st.integers(-50, 50).filter(bool), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.integers(0, 9))
def test_every_sample_comes_once(
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


def test_lengths_are_needed() -> None:
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
