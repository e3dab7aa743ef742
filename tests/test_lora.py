"""Adapters put beside layers by pattern and by name, merged away again, and refused."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError, MissingWeightsError, ShapeMismatchError
from lapilli.lm.decoder import Decoder
from lapilli.lora import (
    LoraConfig,
    LoraLinear,
    QLoraLinear,
    Update,
    adapter_tensors,
    inject,
    lora_product,
    merge,
)
from lapilli.nn.linear import has_onednn
from lapilli.quant.nf4 import Nf4Linear

DECODER = DecoderConfig(
    vocab_size=31,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
    qkv_bias=True,
)


@pytest.fixture
def build():
    def fresh() -> Decoder:
        torch.manual_seed(0)
        return Decoder(DECODER).eval()

    return fresh


@pytest.fixture
def run():
    ids = torch.arange(7)[None]

    def logits(model: Decoder) -> torch.Tensor:
        hidden = model.forward(model.embed(ids), position_ids=ids)
        return model.logits(hidden)

    return logits


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rank": 0}, "rank must be at least 1, found 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank must be at least 1, found 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), found 1.0"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out adapters belong to models"),
    ],
)
def test_refusals(options, match):
    with pytest.raises(ConfigError, match=match):
        LoraConfig(**{"rank": 2, "alpha": 4, **options})


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.*.{q,k}_proj", [True, True, False]),
        ("{a,b}.1.{q,v}_proj", [True, False, True]),
        ("*", [True, True, True]),
        ("q_proj", [False, False, False]),
    ],
)
def test_targets(pattern, expected):
    config = LoraConfig(rank=1, alpha=1, targets=(pattern,))
    paths = ("a.1.q_proj", "a.2.k_proj", "a.1.v_proj")
    assert [config.is_target(path) for path in paths] == expected


def test_scaling():
    assert LoraConfig(rank=4, alpha=8).scaling("x") == 2.0
    assert LoraConfig(rank=4, alpha=8, use_rslora=True).scaling("x") == 4.0


ATTENTION = ("model.layers.*.self_attn.{q,v}_proj",)


def _oracle(model, **options):
    """The model with peft's adapters, and their tensors under our names."""
    import peft  # here: three seconds that only a run of these tests should pay

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(config, model)
    tensors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
            tensors[name.replace(".default", "")] = parameter.detach().clone()
    return model.eval(), tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"r": 3, "lora_alpha": 6}, {"rank": 3, "alpha": 6}),
        (
            {"r": 4, "lora_alpha": 6, "use_rslora": True},
            {"rank": 4, "alpha": 6, "use_rslora": True},
        ),
        (
            {
                "r": 3,
                "lora_alpha": 6,
                "rank_pattern": {"layers.1.self_attn.q_proj": 5},
                "alpha_pattern": {"v_proj": 2},
            },
            {
                "rank": 3,
                "alpha": 6,
                "rank_pattern": {"layers.1.self_attn.q_proj": 5},
                "alpha_pattern": {"v_proj": 2},
            },
        ),
    ],
)
def test_numbers_equal_peft(build, run, theirs, ours):
    oracle, tensors = _oracle(build(), **theirs)
    model = build()
    report = inject(model, LoraConfig(**ours), tensors)
    with torch.no_grad():
        torch.testing.assert_close(run(model), run(oracle), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(run(model), run(build()), atol=1e-2)
    assert report.paths == tuple(
        f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"
    )
    assert report.num_parameters == sum(t.numel() for t in tensors.values())


def test_fresh_adapter_changes_nothing_and_learns(build, run):
    model = build()
    before = run(model)
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    assert torch.equal(run(model), before)
    run(model.train()).square().mean().backward()
    assert all(
        (tensor.grad != 0).any() for name, tensor in adapter_tensors(model).items() if "B" in name
    )


def test_names_of_the_base_stay(build):
    plain, model = build(), build()
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    assert set(plain.state_dict()) < set(model.state_dict())
    model.load_state_dict(plain.state_dict(), strict=False)
    new = set(model.state_dict()) - set(plain.state_dict())
    assert new == set(adapter_tensors(model))
    assert "model.layers.0.self_attn.q_proj.lora_A.weight" in new


def test_tensors_come_back(build, run):
    first, second = build(), build()
    config = LoraConfig(rank=2, alpha=4, targets=("*proj",))
    inject(first, config)
    for tensor in adapter_tensors(first).values():
        torch.nn.init.normal_(tensor)
    inject(second, config, adapter_tensors(first))
    assert torch.equal(run(first), run(second))


def test_dropout_only_while_training(build, run):
    model = build()
    inject(model, LoraConfig(rank=2, alpha=4, dropout=0.5, targets=ATTENTION))
    for tensor in adapter_tensors(model).values():
        torch.nn.init.normal_(tensor)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))


def test_patterns_are_full_paths(build):
    paths = inject(build(), LoraConfig(rank=1, alpha=1, targets=("*.mlp.{gate,up}_proj",))).paths
    assert len(paths) == 4
    with pytest.raises(ConfigError, match="no linear layer matches q_proj, k_proj: patterns are"):
        inject(build(), LoraConfig(rank=1, alpha=1, targets=("q_proj", "k_proj")))


def test_low_precision_base_with_float32_adapter(build, run):
    model = build().bfloat16()
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            module.lora_A.float()
            module.lora_B.float()
    assert run(model).dtype == torch.bfloat16


def test_refuses_a_tensor_without_a_layer(build):
    tensors = {"model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
    with pytest.raises(MissingWeightsError, match=r"1 adapter tensors .*layers\.9.*another base"):
        inject(build(), LoraConfig(rank=2, alpha=4), tensors)


def test_refuses_half_of_a_pair(build):
    tensors = {"lm_head.lora_A.weight": torch.zeros(2, 16)}
    with pytest.raises(MissingWeightsError, match=r"lm_head is incomplete: no lm_head\.lora_B"):
        inject(build(), LoraConfig(rank=2, alpha=4), tensors)


def test_refuses_an_empty_adapter(build):
    with pytest.raises(MissingWeightsError, match="no lora_A and lora_B tensors"):
        inject(build(), LoraConfig(rank=2, alpha=4), {})


@pytest.mark.parametrize("shapes", [((3, 16), (31, 2)), ((2, 16), (30, 2)), ((2, 15), (31, 2))])
def test_refuses_other_shapes_and_changes_nothing(build, shapes):
    model = build()
    tensors = {
        "lm_head.lora_A.weight": torch.zeros(shapes[0]),
        "lm_head.lora_B.weight": torch.zeros(shapes[1]),
    }
    with pytest.raises(ShapeMismatchError, match=r"lm_head.lora_[AB].weight: expected \["):
        inject(model, LoraConfig(rank=2, alpha=4), tensors)
    assert not adapter_tensors(model)


def test_refuses_a_second_adapter(build):
    model = build()
    inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))
    with pytest.raises(ConfigError, match="has an adapter already"):
        inject(model, LoraConfig(rank=2, alpha=4, targets=ATTENTION))


CONFIG = LoraConfig(rank=3, alpha=6, targets=("*_proj", "lm_head"))


def _adapted(model):
    inject(model, CONFIG)
    for tensor in adapter_tensors(model).values():
        torch.nn.init.normal_(tensor, std=0.2)
    return model


def test_merged_equals_unmerged(build, run):
    model = _adapted(build())
    names = set(build().state_dict())
    with torch.no_grad():
        expected = run(model)
        report = merge(model)
        torch.testing.assert_close(run(model), expected, atol=2e-5, rtol=1e-5)
    assert set(model.state_dict()) == names
    assert len(report.paths) == 15
    assert "lm_head" in report.paths
    assert not adapter_tensors(model)


def test_sum_is_taken_in_float32(build):
    model = _adapted(build()).bfloat16()
    layer = model.model.layers[0].mlp.up_proj
    delta = layer.scaling * layer.lora_B.weight.float() @ layer.lora_A.weight.float()
    expected = (layer.weight.float() + delta).bfloat16()
    merge(model)
    torch.testing.assert_close(
        model.model.layers[0].mlp.up_proj.weight.data, expected, atol=0, rtol=0.01
    )
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("trainable", [True, False])
def test_the_old_weight_is_not_written_to(build, trainable):
    model = _adapted(build())
    layer = model.lm_head
    old, copy = layer.weight.requires_grad_(trainable), layer.weight.detach().clone()
    merge(model)
    assert torch.equal(old, copy)
    assert model.lm_head.weight.requires_grad is trainable


def test_model_without_adapter_stays(build):
    model = build()
    assert merge(model).paths == ()


def draw(rows, inputs, outputs, rank):
    random = torch.Generator().manual_seed(rows)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rank, inputs), (outputs, rank))
    return [torch.randn(shape, generator=random).requires_grad_() for shape in shapes]


def formula(x, weight, bias, a, b, scaling):
    return functional.linear(x, weight, bias) + scaling * (x @ a.T) @ b.T


@pytest.mark.slow
@given(*[st.integers(1, 24)] * 3, st.integers(1, 6), st.booleans())
def test_output_and_gradients_are_those_of_the_formula(rows, inputs, outputs, rank, by_onednn):
    tensors = draw(rows, inputs, outputs, rank)
    expected = formula(*tensors, 1.5)
    how = Update(1.5, 0.0, by_onednn and has_onednn())
    found = lora_product(*tensors, how=how)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, tensors, gradient),
        torch.autograd.grad(expected, tensors, gradient),
        atol=1e-3,
        rtol=1e-4,
    )


def test_dropout_is_that_of_the_mask_forwards_and_backwards():
    x, weight, bias, a, b = draw(50, 20, 10, 3)
    torch.manual_seed(3)
    found = lora_product(x, weight, bias, a, b, how=Update(2.0, 0.25, by_onednn=False))
    torch.manual_seed(3)
    keep = torch.rand_like(x) >= 0.25
    assert 0.6 < keep.float().mean() < 0.9
    dropped = x * keep / 0.75
    expected = functional.linear(x, weight, bias) + 2.0 * (dropped @ a.T) @ b.T
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    gradient = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [x, a, b], gradient),
        torch.autograd.grad(expected, [x, a, b], gradient),
        atol=1e-3,
        rtol=1e-4,
    )


def test_autocast_decides_about_the_dtype_and_gradients_keep_that_of_their_weight():
    layer = LoraLinear(nn.Linear(8, 6), rank=2, scaling=1.0)
    nn.init.normal_(layer.lora_B.weight)
    x = torch.randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    found.float().sum().backward()
    assert layer.lora_A.weight.grad.dtype == x.grad.dtype == torch.float32
    expected = formula(x, layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight, 1.0)
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("has_bias", [True, False])
def test_over_a_stored_weight_it_is_that_over_its_floats(has_bias):
    plain = nn.Linear(100, 2100, bias=has_bias)
    stored = Nf4Linear(plain.weight, plain.bias)
    floats = nn.Linear(100, 2100, bias=has_bias)
    floats.weight = nn.Parameter(stored.weight_rows(0, 2100))
    floats.bias = plain.bias
    layers = [
        QLoraLinear(stored, rank=3, scaling=0.5),
        LoraLinear(floats, rank=3, scaling=0.5),
    ]
    for half in ("lora_A", "lora_B"):
        drawn = torch.randn_like(getattr(layers[0], half).weight)
        for layer in layers:
            getattr(layer, half).weight = nn.Parameter(drawn)
    x = torch.randn(4, 100, requires_grad=True)
    results = []
    for layer in layers:
        out = layer(x)
        wanted = [x, layer.lora_A.weight, layer.lora_B.weight]
        results.append((out, *torch.autograd.grad(out.square().sum(), wanted)))
    torch.testing.assert_close(results[0], results[1], atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(layers[0].merged().weight, layers[1].merged().weight)
