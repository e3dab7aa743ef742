"""Families that lapilli does not have, through transformers."""

import builtins
import inspect

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lapilli.errors import UnsupportedModelError
from lapilli.lm import LanguageModel
from lapilli.lm.foreign import ForeignLanguageModel, cache_argument, load_foreign

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def _qwen3() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)).eval()


def _neox() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)).eval()


def _run(model, ids, **kwargs):
    kwargs.setdefault("position_ids", torch.arange(ids.shape[1]).expand(len(ids), -1))
    return model.logits(model.forward(model.embed(ids), **kwargs))


@pytest.mark.parametrize("build", [_qwen3, _neox])
def test_logits_and_cache_equal_the_wrapped_model(build):
    inner = build()
    model = ForeignLanguageModel(inner)
    ids = torch.randint(0, 61, (2, 9))
    with torch.no_grad():
        expected = inner(ids).logits
        torch.testing.assert_close(_run(model, ids), expected, atol=1e-5, rtol=1e-5)
        cache = model.new_cache(2, capacity=2)
        parts = []
        for a, b in ((0, 4), (4, 5), (5, 9)):
            places = torch.arange(a, b).expand(2, -1)
            parts.append(_run(model, ids[:, a:b], position_ids=places, cache=cache))
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)
    assert cache.length == 9


class _OlderStack(torch.nn.Module):
    """A stack whose forward names its cache as transformers did up to 5.23."""

    def __init__(self, stack):
        super().__init__()
        self.stack = stack
        self.newer = "cache" in inspect.signature(stack.forward).parameters

    def forward(self, inputs_embeds, attention_mask=None, past_key_values=None, **kwargs):
        name = "cache" if self.newer else "past_key_values"
        kwargs |= {name: past_key_values, "attention_mask": attention_mask}
        return self.stack(inputs_embeds=inputs_embeds, **kwargs)


class _NewerStack(_OlderStack):
    """The same as transformers 5.24 and later name it."""

    def forward(self, inputs_embeds, attention_mask=None, cache=None, **kwargs):
        return super().forward(inputs_embeds, attention_mask, cache, **kwargs)


@pytest.mark.slow
@pytest.mark.parametrize("stack", [_OlderStack, _NewerStack])
def test_the_cache_goes_under_the_name_that_the_family_takes(stack):
    model = ForeignLanguageModel(_qwen3())
    ids = torch.randint(0, 61, (1, 5))
    with torch.no_grad():
        expected = _run(model, ids)
        other = ForeignLanguageModel(model.inner)
        other._stack = stack(model._stack)
        other._cache_argument = cache_argument(other._stack)
        cache = other.new_cache(1)
        parts = [
            _run(other, ids[:, i : i + 1], position_ids=torch.tensor([[i]]), cache=cache)
            for i in range(5)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("build", [_qwen3, _neox])
def test_left_padded_rows_equal_their_solo_runs(build):
    model = ForeignLanguageModel(build())
    ids = torch.randint(0, 61, (2, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    position_ids = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = _run(model, ids, attention_mask=mask, position_ids=position_ids)
        alone = _run(model, ids[1:, 3:])
    torch.testing.assert_close(together[1, 3:], alone[0], atol=1e-5, rtol=1e-5)


def test_follows_the_protocol():
    model = ForeignLanguageModel(_qwen3())
    assert isinstance(model, LanguageModel)
    assert model.config.vocab_size == 61
    assert model.config.num_kv_heads == 2


def test_loads_a_directory(tmp_path):
    inner = _qwen3()
    inner.save_pretrained(tmp_path)
    ids = torch.randint(0, 61, (1, 5))
    with torch.no_grad():
        found = _run(load_foreign(tmp_path), ids)
    torch.testing.assert_close(found, inner(ids).logits)


def test_a_family_with_scaled_logits_is_refused():
    config = CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.1, pad_token_id=0)
    inner = CohereForCausalLM(config)
    torch.nn.init.normal_(inner.model.embed_tokens.weight)
    with pytest.raises(UnsupportedModelError, match=r"CohereForCausalLM: logits .* differ"):
        ForeignLanguageModel(inner)


def test_a_family_without_keys_and_values_is_refused():
    inner = MambaForCausalLM(
        MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM has no attention heads"):
        ForeignLanguageModel(inner)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="transformers cannot load"):
        load_foreign(tmp_path)


def test_without_transformers_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'lapilli\[hf\]'"):
        load_foreign("anything")


def test_trains():
    model = ForeignLanguageModel(_qwen3()).train()
    _run(model, torch.randint(0, 61, (1, 4))).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "embed" not in n)
