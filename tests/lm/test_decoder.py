"""The decoder gives the numbers of transformers for llama, mistral and qwen2."""

import dataclasses

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lapilli.config.model import DecoderConfig, RopeScaling
from lapilli.errors import ConfigError
from lapilli.lm import LanguageModel, build_language_model
from lapilli.lm.decoder import Decoder

TINY = DecoderConfig(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}


def _rope(**options):
    return {"rope_theta": 10000.0, **options}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

PAIRS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}, {}),
    "llama-mha-biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"num_kv_heads": 4, "qkv_bias": True, "output_bias": True, "mlp_bias": True},
    ),
    "llama-wide-heads-tied": (
        LlamaForCausalLM,
        LlamaConfig,
        {"head_dim": 16, "tie_word_embeddings": True},
        {"head_dim": 16, "tie_embeddings": True},
    ),
    "llama-linear": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": _rope(rope_type="linear", factor=2.5)},
        {"rope_scaling": RopeScaling(kind="linear", factor=2.5)},
    ),
    "llama-dynamic": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": _rope(rope_type="dynamic", factor=2.0),
            "max_position_embeddings": 16,
        },
        {"rope_scaling": RopeScaling(kind="dynamic", factor=2.0), "max_positions": 16},
    ),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig,
        {"rope_parameters": _rope(**LLAMA3)},
        {"rope_scaling": RopeScaling(kind="llama3", factor=4.0, original_max_positions=16)},
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}, {}),
    "mistral-window": (
        MistralForCausalLM,
        MistralConfig,
        {"sliding_window": 7},
        {"sliding_window": 7},
    ),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"qkv_bias": True, "rope_theta": 1e6},
    ),
}


def _tiny(**changes) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(dataclasses.replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _pair(name: str):
    oracle_class, config_class, theirs, ours = PAIRS[name]
    options = {**SIZES, "rope_parameters": _rope(rope_type="default"), **theirs}
    torch.manual_seed(1)
    oracle = oracle_class(config_class(**options)).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = Decoder(dataclasses.replace(TINY, **ours)).eval()
    state = dict(oracle.state_dict())
    if model.config.tie_embeddings:
        state.pop("lm_head.weight")
    model.load_state_dict(state)
    return oracle, model


def _positions(rows: int, length: int) -> torch.Tensor:
    return torch.arange(length).expand(rows, -1)


def _run(model, ids, **kwargs):
    kwargs.setdefault("position_ids", _positions(*ids.shape))
    return model.logits(model.forward(model.embed(ids), **kwargs))


def _solo(model, ids):
    return _run(model, ids[None])[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_logits_equal_transformers(name):
    oracle, model = _pair(name)
    ids = torch.randint(0, 101, (2, 29))
    with torch.no_grad():
        torch.testing.assert_close(_run(model, ids), oracle(ids).logits, atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_greedy_tokens_equal_transformers(name):
    oracle, model = _pair(name)
    ids = torch.randint(0, 101, (1, 9))
    with torch.inference_mode():
        expected = oracle.generate(
            ids, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        cache = model.new_cache(1, capacity=4)
        logits = _run(model, ids, cache=cache)[:, -1]
        found = ids
        for _ in range(12):
            token = logits.argmax(-1, keepdim=True)
            found = torch.cat((found, token), dim=1)
            place = torch.tensor([[cache.length]])
            logits = _run(model, token, position_ids=place, cache=cache)[:, -1]
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cache_equals_no_cache_in_any_chunks(window, kv_heads):
    model = _tiny(sliding_window=window, num_kv_heads=kv_heads)
    ids = torch.randint(0, 101, (2, 17))
    with torch.no_grad():
        whole = _run(model, ids)
        cache = model.new_cache(2, capacity=2)
        parts, start = [], 0
        for size in (6, 1, 4, 1, 5):
            chunk = slice(start, start + size)
            places = _positions(2, 17)[:, chunk]
            parts.append(_run(model, ids[:, chunk], position_ids=places, cache=cache))
            start += size
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama-dynamic", "mistral-window"])
def test_left_padded_rows_equal_their_solo_runs(name):
    _, model = _pair(name)
    rows = [torch.randint(0, 101, (n,)) for n in (21, 5, 13)]
    longest = 21
    ids = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros(3, longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, longest - len(row) :] = row
        mask[i, longest - len(row) :] = True
    position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model.new_cache(3)
        together = _run(model, ids, position_ids=position_ids, attention_mask=mask, cache=cache)
        assert together.isfinite().all()
        for i, row in enumerate(rows):
            solo = _solo(model, row)
            torch.testing.assert_close(
                together[i, longest - len(row) :], solo, atol=2e-5, rtol=1e-5
            )
        if model.config.rope_scaling is not None:
            return  # cached keys of "dynamic" keep the frequencies of their own step
        token = torch.tensor([[3], [4], [5]])
        stepped = _run(
            model,
            token,
            position_ids=position_ids[:, -1:] + 1,
            attention_mask=torch.cat((mask, torch.ones(3, 1, dtype=torch.bool)), dim=1),
            cache=cache,
        )
        for i, row in enumerate(rows):
            solo = _solo(model, torch.cat((row, token[i])))[-1]
            torch.testing.assert_close(stepped[i, 0], solo, atol=2e-5, rtol=1e-5)


def test_padding_gets_no_gradient_and_makes_no_nan():
    model = _tiny().train()
    ids = torch.randint(1, 101, (2, 6))
    mask = torch.tensor([[False] * 4 + [True] * 2, [True] * 6])
    embeds = model.embed(ids).detach().requires_grad_()
    hidden = model.forward(embeds, position_ids=_positions(2, 6), attention_mask=mask)
    model.logits(hidden)[mask].square().sum().backward()
    assert embeds.grad.isfinite().all()
    assert (embeds.grad[~mask] == 0).all()
    assert (embeds.grad[mask] != 0).any(dim=-1).all()
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    unused = {name for name, _ in model.named_parameters()} - used
    assert unused == {"model.embed_tokens.weight"}


def test_gradient_checkpointing_changes_no_gradient():
    model = _tiny().train()
    ids = torch.randint(0, 101, (2, 8))
    gradients = []
    for switched in (False, True):
        model.gradient_checkpointing = switched
        model.zero_grad()
        _run(model, ids).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


def test_built_on_meta_and_filled_by_assignment():
    real = _tiny(rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_max_positions=16))
    with torch.device("meta"):
        empty = Decoder(real.config).eval()
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    assert not list(empty.buffers())
    empty.load_state_dict(real.state_dict(), assign=True)
    ids = torch.randint(0, 101, (1, 5))
    with torch.no_grad():
        assert torch.equal(_run(empty, ids), _run(real, ids))


@pytest.mark.parametrize("tie", [False, True])
def test_runs_under_bfloat16_autocast_and_in_bfloat16(tie):
    model = _tiny(tie_embeddings=tie)
    ids = torch.randint(0, 101, (2, 6))
    exact = _run(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = _run(model.train(), ids)
    mixed.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    low = _run(model.bfloat16(), ids, cache=model.new_cache(2))
    assert low.dtype == torch.bfloat16
    scale = exact.abs().max().item()
    torch.testing.assert_close(mixed.float(), exact, atol=0.05 * scale, rtol=0)
    torch.testing.assert_close(low.float(), exact, atol=0.05 * scale, rtol=0)


def test_tied_model_has_no_head():
    assert not hasattr(_tiny(tie_embeddings=True), "lm_head")
    assert "lm_head.weight" in _tiny().state_dict()


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"logit_softcap": 3.0}])
def test_scores_of_some_tokens_are_those_of_all(changes):
    model, ids = _tiny(**changes), torch.tensor([7, 0, 100])
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        expected = model.logits(hidden)[..., ids]
        torch.testing.assert_close(model.token_logits(hidden, ids), expected, atol=1e-5, rtol=0)


def test_follows_the_protocol():
    assert isinstance(build_language_model(TINY), LanguageModel)


def test_heads_must_be_grouped_evenly():
    with pytest.raises(
        ConfigError, match="num_attention_heads 4 is not a multiple of num_key_value_heads 3"
    ):
        dataclasses.replace(TINY, num_kv_heads=3)
