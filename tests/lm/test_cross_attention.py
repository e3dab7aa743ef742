"""Gated cross-attention against its formula, one position at a time, and with shut gates."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.lm import Memory, Mpt, add_cross_attention
from lapilli.lm.cross_attention import ENDLESS, GatedCrossAttention
from lapilli.lm.decoder import Decoder
from lapilli.nn.attention import attend_plain
from lapilli.nn.layers import RMSNorm
from tests.generate.engine.conftest import MPT
from tests.lm.test_decoder import TINY

WIDTH = TINY.hidden_size
GEMMA = dataclasses.replace(TINY, norm_offset=1.0, activation="gelu_tanh", num_kv_heads=1)


def decoder(*, every: int | None = 2, config=TINY, opened: float = 0.7) -> Decoder:
    torch.manual_seed(3)
    model = Decoder(config).eval()
    if every is not None:
        model.add_cross_attention(every)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith("_gate"):
            torch.nn.init.constant_(parameter, opened)
    return model


def memory_of(places, *, rows: int = 1, seed: int = 0, lengths=None) -> Memory:
    generator = torch.Generator().manual_seed(seed)
    lengths = lengths or [2] * len(places)
    features = [torch.randn(n, WIDTH, generator=generator) for n in lengths]
    return Memory.of_rows(features, places, rows=rows, like=torch.zeros(1, WIDTH))


def vectors(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def steps(rows: int, length: int) -> torch.Tensor:
    return torch.arange(length).expand(rows, length)


@pytest.mark.parametrize("config", [TINY, GEMMA])
def test_a_block_is_its_formula(config):
    torch.manual_seed(0)
    block = GatedCrossAttention(config, 1).eval()
    block.attention_gate.data.fill_(0.4)
    block.mlp_gate.data.fill_(-0.9)
    x, memory = vectors(1, 5), memory_of([(0, 2, ENDLESS), (0, 3, ENDLESS)])
    found = block(x, memory, memory.sight(0, 5))
    expected = x.clone()
    for at, seen in ((2, 2), (3, 4), (4, 4)):
        one, features = x[:, at : at + 1], memory.features[:, :seen]
        q, k, v = (
            layer(y).unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
            for layer, y in (
                (block.q_proj, block.attention_norm(one)),
                (block.k_proj, features),
                (block.v_proj, features),
            )
        )
        all_of_it = torch.ones(1, 1, 1, seen, dtype=torch.bool)
        heads = attend_plain(q, k, v, mask=all_of_it).transpose(1, 2).flatten(2)
        one = one + torch.tanh(block.attention_gate) * block.o_proj(heads)
        one = one + torch.tanh(block.mlp_gate) * block.mlp(block.mlp_norm(one))
        expected[:, at : at + 1] = one
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, :2], x[:, :2])  # these see nothing


@pytest.mark.parametrize("config", [TINY, GEMMA])
def test_shut_gates_change_no_bit(config):
    with_blocks, without = decoder(config=config, opened=0.0), decoder(config=config, every=None)
    without.load_state_dict(
        {n: t for n, t in with_blocks.state_dict().items() if "cross_attention" not in n}
    )
    x, memory = vectors(2, 6), memory_of([(0, 0, ENDLESS), (1, 3, ENDLESS)], rows=2)
    found = with_blocks(x, position_ids=steps(2, 6), memory=memory)
    assert torch.equal(found, without(x, position_ids=steps(2, 6)))


def test_blocks_stand_before_every_nth_layer():
    for every, expected in ((1, ["0", "1", "2"]), (2, ["1"]), (3, ["2"])):
        assert list(decoder(every=every).cross_attention) == expected


def test_position_by_position_as_all_at_once():
    model = decoder(every=1)
    x, memory = vectors(2, 7), memory_of([(0, 0, ENDLESS), (0, 4, ENDLESS), (1, 7, 9)], rows=2)
    expected = model(x, position_ids=steps(2, 7), memory=memory)
    cache, found = model.new_cache(2), []
    with torch.inference_mode():
        for at in range(7):
            one = steps(2, 7)[:, at : at + 1]
            found.append(
                model(x[:, at : at + 1], position_ids=one, cache=cache, memory=memory).clone()
            )
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=2e-5, rtol=1e-4)
    assert sorted(memory.kept) == [0, 1, 2]  # keys and values were made once


def test_what_stands_before_a_medium_does_not_depend_on_it():
    model = decoder()
    x = vectors(1, 8)
    first, other = (
        model(x, position_ids=steps(1, 8), memory=memory_of([(0, 5, ENDLESS)], seed=seed))
        for seed in (1, 2)
    )
    assert torch.equal(first[:, :5], other[:, :5])
    assert (first[:, 5:] - other[:, 5:]).abs().amax(dim=-1).min() > 1e-4


@settings(deadline=None, max_examples=25)
@given(
    items=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=5
    )
)
def test_a_row_is_what_it_is_alone(items):
    model = decoder()
    x = vectors(3, 6)
    places = [(row, start, ENDLESS) for row, start, _ in items]
    memory = memory_of(places, rows=3, lengths=[n for _, _, n in items])
    together = model(x, position_ids=steps(3, 6), memory=memory)
    features: list[list[torch.Tensor]] = [[], [], []]
    for row, _, length in items:
        mine = memory.features[row][sum(map(len, features[row])) :][:length]
        features[row].append(mine)
    for row in range(3):
        own = [(0, start, ENDLESS) for other, start, _ in items if other == row]
        alone = Memory.of_rows(features[row], own, rows=1, like=x) if own else None
        expected = model(x[row : row + 1], position_ids=steps(1, 6), memory=alone)
        torch.testing.assert_close(together[row : row + 1], expected, atol=2e-5, rtol=1e-4)


def test_joined_memories_are_those_of_the_one_row():
    model = decoder(every=1)
    x = vectors(1, 9)
    parts = [memory_of([(0, 0, 0)], seed=seed, lengths=[3]) for seed in (4, 5)]
    joined = Memory.joined(parts, [(1, 4), (6, 9)])
    whole = Memory.of_rows(
        [part.features[0] for part in parts], [(0, 1, 4), (0, 6, 9)], rows=1, like=x
    )
    with torch.no_grad():
        found = model(x, position_ids=steps(1, 9), memory=joined)
        expected = model(x, position_ids=steps(1, 9), memory=whole)
    torch.testing.assert_close(found, expected)
    assert sorted(parts[0].kept) == [0, 1, 2]


def test_gradients_reach_everything_and_nothing_is_kept():
    model, x = decoder().train(), vectors(1, 5)
    features = torch.randn(2, WIDTH, requires_grad=True)
    memory = Memory.of_rows([features], [(0, 1, ENDLESS)], rows=1, like=x)
    plain = model(x, position_ids=steps(1, 5), memory=memory)
    plain.square().sum().backward()
    names = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert names == ["model.embed_tokens.weight", "lm_head.weight"]
    assert features.grad is not None
    assert features.grad.abs().min() > 0
    assert memory.kept == {}
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing = True
    again = Memory.of_rows([features], [(0, 1, ENDLESS)], rows=1, like=x)
    model(x, position_ids=steps(1, 5), memory=again).square().sum().backward()
    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient), name


def test_a_norm_and_a_gate_of_floats_beside_bfloat16():
    block = GatedCrossAttention(TINY, 0)
    assert isinstance(block.attention_norm, RMSNorm)
    memory = Memory.of_rows(
        [torch.randn(2, WIDTH)], [(0, 0, ENDLESS)], rows=1, like=torch.zeros(1, WIDTH)
    )
    x = vectors(1, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert block(x, memory, memory.sight(0, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("every", [0, -1, 4])
def test_every_beyond_the_layers_is_refused(every):
    with pytest.raises(ConfigError, match=rf"every is {every}, and .* 3 layers: .* 1 to 3"):
        Decoder(TINY).add_cross_attention(every)


def test_blocks_are_added_once():
    with pytest.raises(ConfigError, match="has gated cross-attention already"):
        decoder().add_cross_attention(1)


def test_others_refuse_blocks_and_memories():
    with pytest.raises(UnsupportedModelError, match=r'Mpt takes no gated .* fusion = "tokens"'):
        add_cross_attention(Mpt(MPT), 1)
    memory = memory_of([(0, 0, ENDLESS)])
    for model in (Mpt(MPT), decoder(every=None)):
        with pytest.raises(UnsupportedModelError, match="no gated cross-attention, and media"):
            model.forward(vectors(1, 2), position_ids=steps(1, 2), memory=memory)
