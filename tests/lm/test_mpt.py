"""MPT gives the numbers of transformers; padding on the left moves nothing."""

import dataclasses
import warnings

import pytest
import torch
from transformers import MptConfig as OracleConfig
from transformers import MptForCausalLM

from lapilli.config.model import MptConfig
from lapilli.lm import LanguageModel, build_language_model
from lapilli.lm.mpt import Mpt, alibi_slopes

TINY = MptConfig(vocab_size=97, hidden_size=32, num_layers=3, num_heads=4, max_positions=64)


def _model(**changes) -> Mpt:
    torch.manual_seed(0)
    model = Mpt(dataclasses.replace(TINY, **changes)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def _oracle(model: Mpt, **attention) -> MptForCausalLM:
    config = OracleConfig(
        vocab_size=97,
        d_model=model.config.hidden_size,
        n_layers=3,
        n_heads=model.config.num_heads,
        max_seq_len=64,
        attn_config=attention,
    )
    oracle = MptForCausalLM(config).eval()
    missing = oracle.load_state_dict(model.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == ["lm_head.weight"]
    oracle.tie_weights()
    return oracle


def _run(model, ids, **kwargs):
    kwargs.setdefault("position_ids", torch.arange(ids.shape[1]).expand(len(ids), -1))
    return model.logits(model.forward(model.embed(ids), **kwargs))


@pytest.mark.parametrize(
    ("ours", "attention"),
    [
        ({}, {}),
        ({"clip_qkv": 0.5}, {"clip_qkv": 0.5}),
        ({"softmax_scale": 0.2}, {"softmax_scale": 0.2}),
        ({"num_heads": 6, "hidden_size": 48}, {}),
    ],
)
def test_logits_equal_transformers(ours, attention):
    model = _model(**ours)
    oracle = _oracle(model, **attention)
    ids = torch.randint(0, 97, (2, 23))
    with torch.no_grad():
        torch.testing.assert_close(_run(model, ids), oracle(ids).logits, atol=2e-5, rtol=1e-5)


def test_slopes_of_six_heads_take_every_second_first():
    expected = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    assert alibi_slopes(6, 8).tolist() == expected


def test_cache_equals_no_cache_in_any_chunks():
    model = _model()
    ids = torch.randint(0, 97, (2, 12))
    with torch.no_grad():
        whole = _run(model, ids)
        cache = model.new_cache(2, capacity=1)
        parts = [_run(model, ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=2e-5, rtol=1e-5)


def test_left_padded_rows_equal_their_solo_runs():
    model = _model()
    rows = [torch.randint(0, 97, (n,)) for n in (11, 4)]
    ids = torch.zeros(2, 11, dtype=torch.long)
    mask = torch.zeros(2, 11, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, 11 - len(row) :] = row
        mask[i, 11 - len(row) :] = True
    with torch.no_grad():
        together = _run(model, ids, attention_mask=mask)
        assert together.isfinite().all()
        for i, row in enumerate(rows):
            solo = _run(model, row[None])[0]
            torch.testing.assert_close(together[i, 11 - len(row) :], solo, atol=2e-5, rtol=1e-5)


def test_gradients_flow_with_and_without_checkpointing():
    model = _model().train()
    ids = torch.randint(0, 97, (2, 6))
    gradients = []
    for switched in (False, True):
        model.gradient_checkpointing = switched
        model.zero_grad()
        _run(model, ids).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("tie", [True, False])
def test_built_on_meta_and_filled_by_assignment(tie):
    real = _model(tie_embeddings=tie)
    with torch.device("meta"):
        empty = Mpt(real.config).eval()
    empty.load_state_dict(real.state_dict(), assign=True)
    ids = torch.randint(0, 97, (1, 5))
    with torch.no_grad():
        assert torch.equal(_run(empty, ids), _run(real, ids))
    assert ("lm_head.weight" in real.state_dict()) is not tie


def test_bfloat16_stays_close():
    model = _model()
    ids = torch.randint(0, 97, (1, 6))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        exact = _run(model, ids)
        low = _run(model.bfloat16(), ids, cache=model.new_cache(1))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, atol=0.05 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("tie", [True, False])
def test_scores_of_some_tokens_are_those_of_all(tie):
    model, ids = _model(tie_embeddings=tie), torch.tensor([7, 0, 96])
    hidden = torch.randn(2, 3, 32)
    with torch.no_grad():
        expected = model.logits(hidden)[..., ids]
        torch.testing.assert_close(model.token_logits(hidden, ids), expected, atol=1e-5, rtol=0)


def test_follows_the_protocol():
    assert isinstance(build_language_model(TINY), LanguageModel)
