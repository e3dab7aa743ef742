"""A layer in one call gives the bits of the layer module by module, and knows when not to."""

import copy
import dataclasses
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from lapilli.config.model import DecoderConfig
from lapilli.kernels.library import native
from lapilli.lm.decoder import Decoder, DecoderLayer
from lapilli.lm.fused_layer import FusedLayer, _Part
from lapilli.lora import LoraConfig, inject
from lapilli.nn.block_store import BlockStore, QuantizedBlockStore
from lapilli.nn.paged import PagedBatch, PagedRow
from lapilli.quant import QuantConfig
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import round_weight

pytestmark = pytest.mark.skipif(native() is None, reason="nothing was compiled")

CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=112,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)
KINDS = {
    "float": None,
    "int8": QuantConfig(bits=8, group_size=32),
    "int4": QuantConfig(bits=4, group_size=32, symmetric=False),
    "weight only": QuantConfig(bits=4, group_size=32, mode="weight_only"),
}


def build(kind: str = "float", **changes) -> Decoder:
    """A decoder with random weights, its layers packed."""
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes)).eval().requires_grad_(False)
    for name, parameter in decoder.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.1)
        assert name
    config = KINDS[kind]
    if config is not None:
        for path, layer in list(decoder.model.named_modules()):
            if type(layer) is nn.Linear:
                packed = round_weight(layer.weight, layer.bias, config.bits, config)
                weight_only = config.mode == "weight_only"
                decoder.model.set_submodule(path, QuantLinear(packed, weight_only=weight_only))
    return decoder


def step(
    decoder: Decoder,
    counts=(1, 1, 3),
    *,
    kind=BlockStore,
    unchanged: object = None,
    kept_dtype=torch.float32,
) -> torch.Tensor:
    """Hidden states of a few rows over a cache whose memory is the same in every call."""
    config = decoder.config
    where = {"dtype": torch.float32, "device": torch.device("cpu")}
    if kind is BlockStore:
        where["kept_dtype"] = kept_dtype
    store = kind(config, 20, block_size=4, **where)
    generator = torch.Generator().manual_seed(1)
    if kind is BlockStore:
        for memory in store.tensors():
            memory.normal_(generator=generator)
    rows = [PagedRow([1 + 5 * i + j for j in range(5)], 3 + i, n) for i, n in enumerate(counts)]
    positions = torch.tensor([[at for row in rows for at in range(row.past, row.length)]])
    x = torch.randn(1, positions.shape[1], config.hidden_size, generator=generator)
    with torch.inference_mode():
        return decoder(
            x, position_ids=positions, cache=PagedBatch(store, rows, unchanged=unchanged)
        )


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Whether each layer was one call, without those that a new call is compared by."""
    seen: list[bool] = []
    run = FusedLayer.run
    depth = 0

    def watched(self, *args, **options):
        nonlocal depth
        depth += 1
        out = run(self, *args, **options)
        depth -= 1
        if depth == 0:
            seen.append(out is not None)
        return out

    monkeypatch.setattr(FusedLayer, "run", watched)
    return seen


def plain(decoder: Decoder, monkeypatch, **options) -> torch.Tensor:
    """The same step, module by module."""
    with monkeypatch.context() as context:
        context.setattr(FusedLayer, "run", lambda *_, **__: None)
        return step(decoder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (1, 1, 3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [{}, {"qkv_bias": True, "mlp_bias": True, "output_bias": True}, {"sliding_window": 3}],
    ids=["plain", "biases", "window"],
)
def test_one_call_equals_the_modules(calls, monkeypatch, kind, counts, changes) -> None:
    decoder = build(kind, **changes)
    found = step(decoder, counts=counts)
    assert calls == [True, True]
    expected = plain(decoder, monkeypatch, counts=counts)
    # Plain products of one row are torch's in the modules, the library's in the call.
    near = {"atol": 1e-5, "rtol": 1e-5} if kind == "float" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(found, expected, **near)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1,), (1, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_call_keeps_bfloat16(calls, monkeypatch, kind, counts) -> None:
    decoder = build(kind)
    options = {"counts": counts, "kept_dtype": torch.bfloat16}
    found = step(decoder, **options)
    assert calls == [True, True]
    expected = plain(decoder, monkeypatch, **options)
    # Where products differ in their last bit, a key may be rounded to its other neighbour.
    near = {"atol": 1e-2, "rtol": 1e-2} if kind == "float" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(found, expected, **near)
    assert not torch.equal(found, step(decoder, counts=counts))


def test_what_is_special_runs_module_by_module(calls) -> None:
    decoder = build()
    step(decoder, counts=(1, 12))  # a prompt
    step(decoder, kind=QuantizedBlockStore)
    assert calls == [False] * 4
    calls.clear()
    first, second = decoder.model.layers
    hook = first.mlp.register_forward_hook(lambda *_: None)
    second.mlp.act = nn.GELU()
    step(decoder)
    hook.remove()
    step(decoder)
    assert calls == [False, False, True, False]


def test_changes_are_noticed(calls, monkeypatch) -> None:
    decoder = build()
    before = step(decoder)
    layer = decoder.model.layers[0]
    layer.mlp.up_proj.weight.mul_(2)  # in place: the call reads the new values
    changed = step(decoder)
    assert not torch.allclose(before, changed)
    layer.mlp.down_proj.weight.data = torch.randn_like(layer.mlp.down_proj.weight)
    layer.self_attn.o_proj = nn.Linear(128, 96, bias=False).requires_grad_(False)
    torch.testing.assert_close(step(decoder), plain(decoder, monkeypatch), atol=1e-5, rtol=1e-5)
    assert all(calls)
    inject(decoder, LoraConfig(rank=2, alpha=4, targets=("*.q_proj",)))
    calls.clear()
    torch.testing.assert_close(step(decoder), plain(decoder, monkeypatch), atol=1e-5, rtol=1e-5)
    assert calls == [False, False]


def test_a_watched_model_is_looked_at_once(calls, monkeypatch) -> None:
    decoder = build()
    looks = []
    is_same = _Part.is_same
    monkeypatch.setattr(_Part, "is_same", lambda part: looks.append(1) or is_same(part))
    first, second = object(), object()
    step(decoder, unchanged=first)
    step(decoder, unchanged=first)
    after_first = len(looks)
    step(decoder, unchanged=first)
    assert len(looks) == after_first
    decoder.model.layers[0].mlp.up_proj = nn.Linear(96, 112, bias=False).requires_grad_(False)
    found = step(decoder, unchanged=second)
    torch.testing.assert_close(found, plain(decoder, monkeypatch), atol=1e-5, rtol=1e-5)
    assert all(calls)


@pytest.mark.slow
def test_copies_and_replaced_weights(monkeypatch) -> None:
    decoder = build("int4")
    first = step(decoder)
    copied = copy.deepcopy(decoder)
    assert torch.equal(step(copied), first)
    decoder = build()
    step(decoder)
    gone = weakref.ref(decoder.model.layers[0].mlp.up_proj.weight)
    decoder.model.layers[0].mlp.up_proj = nn.Linear(96, 112, bias=False).requires_grad_(False)
    gc.collect()
    assert gone() is None
    torch.testing.assert_close(step(decoder), plain(decoder, monkeypatch), atol=1e-5, rtol=1e-5)


def test_gradients_run_module_by_module() -> None:
    layer = DecoderLayer(CONFIG, 0)
    fused = FusedLayer(layer)
    x, table = torch.randn(1, 1, 96), torch.zeros(1, 1, 1, 32)
    assert fused.run(x, (table, table), None, index=0) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_threads_that_share_a_layer_do_not_meet_in_it(kind):
    """The description of a call was kept in the layer: a thread filled in another one's."""
    decoder = build(kind)
    counts = [(1, 1, 3), (1, 2)]
    alone = [step(decoder, each) for each in counts]
    wrong = []

    def go(at: int) -> None:
        for turn in range(60):
            which = (at + turn) % 2
            if not torch.equal(step(decoder, counts[which]), alone[which]):
                wrong.append(which)

    threads = [threading.Thread(target=go, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
