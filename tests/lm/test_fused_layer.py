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
from lapilli.generate.engine.feature_cache import WeightWatch
from lapilli.kernels.library import native
from lapilli.lm import decoder as decoder_file
from lapilli.lm.decoder import Decoder, DecoderLayer
from lapilli.lm.fused_layer import FusedLayer, FusedLayers, _Watch
from lapilli.lora import LoraConfig, inject
from lapilli.nn.layers import RMSNorm
from lapilli.nn.paged import BlockStore, PagedBatch, PagedRow, QuantizedBlockStore
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
    "zeros": QuantConfig(bits=4, group_size=32, levels="zeros"),
    "int4": QuantConfig(bits=4),
    "weight only": QuantConfig(bits=4, group_size=32, mode="weight_only"),
}


QWEN = {"qk_norm": True}
GEMMA = {
    "activation": "gelu_tanh",
    "norm_offset": 1.0,
    "post_norms": True,
    "qk_norm": True,
    "query_scalar": 24.0,
    "full_layers": (1,),
    "sliding_window": 3,
    "local_rope_theta": 100.0,
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
                bits = config.value_bits if path.endswith("v_proj") else config.bits
                packed = round_weight(layer.weight, layer.bias, bits, config)
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
    """Whether each layer was one call, without those that a new call is compared by; never all."""
    monkeypatch.setattr(FusedLayers, "run", lambda *_, **__: None)
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
        context.setattr(FusedLayers, "run", lambda *_, **__: None)
        return step(decoder, **options)


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(1,), (1, 1, 1), (1, 1, 3)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True, "mlp_bias": True, "output_bias": True},
        {"sliding_window": 3},
        QWEN,
        GEMMA,
        {**GEMMA, "attention_softcap": 2.0},
    ],
    ids=["plain", "biases", "window", "qwen3", "gemma3", "gemma2"],
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


@pytest.mark.parametrize("kind", ["float", "int4"])
@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.up_proj", "mlp.act"])
def test_hooks_of_parts_that_share_a_call_are_called(kind, part) -> None:
    decoder = build(kind)
    before = step(decoder)
    module = decoder.model.layers[0].get_submodule(part)
    seen = []
    handle = module.register_forward_hook(lambda _m, _i, out: seen.append(1) or out + 1)
    assert not torch.allclose(step(decoder), before, atol=1e-3)
    assert seen == [1]
    handle.remove()
    assert torch.equal(step(decoder), before)


def test_a_watched_model_is_looked_at_once(calls, monkeypatch) -> None:
    decoder = build()
    looks = []
    is_same = _Watch.is_same
    monkeypatch.setattr(_Watch, "is_same", lambda watch: looks.append(1) or is_same(watch))
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


def changed_attention(change):
    """DecoderAttention.forward as a newcomer writes it, with one step more."""

    def forward(self, x, table, mask, cache):
        heads = (*x.shape[:2], -1, self.head_dim)
        projected = decoder_file.project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (y.view(heads).transpose(1, 2) for y in projected)
        q, k = decoder_file.rotate(q, *table), decoder_file.rotate(k, *table)
        window, scale, softcap = self.window, None, None
        if change == "query":
            q = q * 1.05
        elif change == "key":
            k = k * 1.05
        elif change == "value":
            v = v * 1.05
        elif change == "window in a layer":
            window = 5 if self.layer == 1 else None
        elif change == "scale":
            scale = 0.1
        elif change == "soft cap":
            softcap = 50.0
        seen = cache.attend(
            self.layer, q, k, v, mask=mask, window=window, scale=scale, softcap=softcap
        )
        return self.o_proj(seen.transpose(1, 2).flatten(2))

    return forward


STEPS = ["query", "key", "value", "window in a layer", "scale", "soft cap"]


@pytest.mark.parametrize("is_late", [False, True], ids=["before", "after the first token"])
@pytest.mark.parametrize("kind", ["float", "int4"])
@pytest.mark.parametrize("change", STEPS)
def test_a_step_that_is_added_to_attention_is_followed(monkeypatch, caplog, change, kind, is_late):
    """FusedLayer is the layer written a second time: it did not see what somebody added."""
    decoder = build(kind)
    before = step(decoder) if is_late else None
    monkeypatch.setattr(decoder_file.DecoderAttention, "forward", changed_attention(change))
    found = step(decoder)
    # A layer that is not changed may still be one call: its float products differ in a last bit.
    torch.testing.assert_close(found, plain(decoder, monkeypatch), atol=1e-5, rtol=1e-5)
    assert before is None or not torch.equal(found, before) or change == "soft cap"
    assert len([line for line in caplog.messages if "module by module" in line]) == 1


def test_a_step_anywhere_in_the_layer_is_followed(monkeypatch, caplog):
    decoder = build()
    mlp, norm = decoder_file.GatedMLP.forward, decoder_file.RMSNorm.forward
    whole = decoder_file.DecoderLayer.forward
    for owner, changed in (
        (decoder_file.GatedMLP, lambda self, x: mlp(self, x) * 1.01),
        (decoder_file.RMSNorm, lambda self, x: norm(self, x) + 0.01),
        (
            decoder_file.DecoderLayer,
            lambda self, x, table, mask, cache: whole(self, x, table, mask, cache) * 1.01,
        ),
    ):
        step(decoder)
        with monkeypatch.context() as context:
            context.setattr(owner, "forward", changed)
            found = step(decoder)
            torch.testing.assert_close(found, plain(decoder, monkeypatch), atol=0, rtol=0)
    caplog.clear()
    step(decoder)  # the code of before again, and nothing to say about it
    assert caplog.messages == []


def test_the_code_of_the_house_is_not_warned_of(calls, caplog):
    for kind in KINDS:
        for changes in (
            {},
            {"sliding_window": 3},
            QWEN,
            GEMMA,
            {**GEMMA, "attention_softcap": 2.0},
        ):
            decoder = build(kind, **changes)
            step(decoder)
    assert all(calls)
    assert caplog.messages == []


def test_what_the_call_does_not_know_runs_module_by_module(calls):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class NewConfig(DecoderConfig):
        residual_scale: float = 1.0

    sizes = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    step(Decoder(NewConfig(**sizes)).eval().requires_grad_(False))
    assert calls == [True, True]
    calls.clear()
    step(Decoder(NewConfig(**sizes, residual_scale=0.5)).eval().requires_grad_(False))
    decoder = build()
    decoder.model.layers[0].self_attn.gate_norm = nn.LayerNorm(8)
    decoder.model.layers[1].mlp.register_buffer("scale", torch.ones(1))
    step(decoder)
    assert calls == [False] * 4


@pytest.fixture
def steps(monkeypatch) -> list[bool]:
    """Whether each step was one call."""
    seen: list[bool] = []
    run = FusedLayers.run

    def watched(self, *args):
        out = run(self, *args)
        seen.append(out is not None)
        return out

    monkeypatch.setattr(FusedLayers, "run", watched)
    return seen


FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "mistral": {"sliding_window": 3},
    "qwen3": QWEN,
    "gemma3": GEMMA,
    "gemma2": {**GEMMA, "attention_softcap": 2.0},
}


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *[("int4", family) for family in FAMILIES],
        *[pytest.param(kind, "gemma3", marks=pytest.mark.slow) for kind in KINDS],
        *[pytest.param(kind, "llama", marks=pytest.mark.slow) for kind in KINDS],
    ],
)
@pytest.mark.parametrize("counts", [(1,), (1, 1, 3)])
def test_a_step_in_one_call_has_the_bits_of_its_layers(steps, monkeypatch, kind, family, counts):
    decoder = build(kind, **FAMILIES[family])
    watch = object()
    found = step(decoder, counts=counts, unchanged=watch)
    assert torch.equal(found, step(decoder, counts=counts, unchanged=watch))
    assert steps == [True, True]
    with monkeypatch.context() as context:
        context.setattr(FusedLayers, "run", lambda *_: None)
        assert torch.equal(found, step(decoder, counts=counts, unchanged=watch))
    expected = plain(decoder, monkeypatch, counts=counts)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


def test_a_step_with_keys_in_bfloat16(steps, monkeypatch):
    decoder = build("int4")
    found = step(decoder, unchanged=object(), kept_dtype=torch.bfloat16)
    assert steps == [True]
    with monkeypatch.context() as context:
        context.setattr(FusedLayers, "run", lambda *_: None)
        assert torch.equal(found, step(decoder, kept_dtype=torch.bfloat16))


class Doubling(DecoderLayer):
    def forward(self, *args):
        return 2 * super().forward(*args)


def doubles(decoder: Decoder) -> None:
    layer = decoder.model.layers[0]
    layer.__class__ = Doubling


def replaces_forward(decoder: Decoder) -> None:
    layer = decoder.model.layers[0]
    run = layer.forward
    layer.forward = lambda *args: run(*args) + 1


def hooks_a_layer(decoder: Decoder) -> None:
    decoder.model.layers[1].register_forward_hook(lambda _m, _i, out: out + 1)


def hooks_an_inner_module(decoder: Decoder) -> None:
    decoder.model.layers[0].mlp.register_forward_hook(lambda _m, _i, out: out + 1)


def hooks_before(decoder: Decoder) -> None:
    decoder.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _m, args: args[0] + 1)


def adds_an_adapter(decoder: Decoder) -> None:
    inject(decoder, LoraConfig(rank=2, alpha=4, targets=("*.q_proj",)))
    for name, parameter in decoder.named_parameters():
        if "lora" in name:
            parameter.data.normal_()


def changes_activation(decoder: Decoder) -> None:
    decoder.model.layers[1].mlp.act = nn.GELU()


def drops_a_layer(decoder: Decoder) -> None:
    decoder.model.layers = decoder.model.layers[:1]


@pytest.mark.parametrize(
    "change",
    [
        doubles,
        replaces_forward,
        hooks_a_layer,
        hooks_an_inner_module,
        hooks_before,
        adds_an_adapter,
        changes_activation,
        drops_a_layer,
    ],
)
def test_a_step_follows_every_change(steps, monkeypatch, change) -> None:
    """Also one that comes after steps in one call: the watch of the weights says so."""
    decoder = build()
    watch = WeightWatch(decoder)
    assert watch.version == watch.version
    before = step(decoder, unchanged=watch.token)
    version = watch.version
    change(decoder)
    assert watch.version != version
    found = step(decoder, unchanged=watch.token)
    assert steps == [True, change is drops_a_layer]
    torch.testing.assert_close(found, plain(decoder, monkeypatch), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


def test_a_step_follows_a_forward_that_a_class_is_given(steps, monkeypatch) -> None:
    """The watch of the weights does not look at classes."""
    decoder = build()
    watch = object()
    step(decoder, unchanged=watch)
    forward = RMSNorm.forward
    monkeypatch.setattr(RMSNorm, "forward", lambda norm, x: forward(norm, x) + 1)
    found = step(decoder, unchanged=watch)
    torch.testing.assert_close(found, plain(decoder, monkeypatch), atol=1e-5, rtol=1e-5)


def test_hooks_of_all_modules_are_called(steps) -> None:
    decoder = build()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, _i, _o: seen.append(type(m)))
    try:
        step(decoder, unchanged=object())
    finally:
        handle.remove()
    assert seen.count(DecoderLayer) == 2
    assert steps == [False]


def test_a_step_holds_no_weights(steps, monkeypatch) -> None:
    decoder = build("int4")
    step(decoder, unchanged=object())
    packed = decoder.model.layers[0].mlp.up_proj
    gone = weakref.ref(packed)
    assert isinstance(packed, QuantLinear)
    for name in ("gate_proj", "up_proj"):
        plain_layer = nn.Linear(96, 112, bias=False).requires_grad_(False)
        setattr(decoder.model.layers[0].mlp, name, plain_layer)
    del packed
    decoder.model.layers[0].fused = FusedLayer(decoder.model.layers[0])
    gc.collect()
    assert gone() is None
    found = step(decoder, unchanged=object())
    torch.testing.assert_close(found, plain(decoder, monkeypatch), atol=2e-2, rtol=2e-2)
    copied = copy.deepcopy(decoder)
    assert torch.equal(step(copied, unchanged=object()), found)
    assert steps == [True] * 3


@pytest.mark.slow
def test_threads_that_share_a_decoder_do_not_meet_in_it(steps):
    decoder = build("int4")
    counts = [(1, 1, 3), (1, 2)]
    watch = object()
    alone = [step(decoder, each, unchanged=watch) for each in counts]
    wrong = []

    def go(at: int) -> None:
        mine = object()
        for turn in range(60):
            which = (at + turn) % 2
            seen = mine if turn % 7 == 0 else watch
            if not torch.equal(step(decoder, counts[which], unchanged=seen), alone[which]):
                wrong.append(which)

    threads = [threading.Thread(target=go, args=(at,)) for at in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(steps)


def test_a_step_is_the_same_with_any_number_of_threads():
    """Also with more threads than the machine has cores, where helpers come late or never."""
    decoder = build("int4")
    watch = object()
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found += [step(decoder, unchanged=watch) for _ in range(20)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, found[0]) for one in found)
