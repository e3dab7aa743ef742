"""The custom ops keep torch's rules, with and without the compiled library."""

import inspect

import pytest
import torch
from torch.library import opcheck

from lapilli.kernels import attention, layer
from lapilli.kernels.attention import attention_reference, prefill_reference


@pytest.fixture(params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """With the library where there is one, then as where nothing was compiled."""
    if request.param == "plain":
        for module in (attention, layer):
            monkeypatch.setattr(module, "native", lambda: None)


def decode_arguments(*, kind: str, window=None, slopes=False, softcap=None):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 7, 2, 8, 16).unbind()
    scales = [None, None]
    if kind == "int8":
        keys, values = ((10 * x).round().to(torch.int8) for x in (keys, values))
        scales = [torch.rand(7, 2, 8), torch.rand(7, 2, 8)]
    tables = torch.tensor([[1, 2, 0], [3, 4, 5]], dtype=torch.int32)
    lengths = torch.tensor([11, 24], dtype=torch.int32)
    q = torch.randn(2, 4, 16)
    biases = torch.rand(4) if slopes else None
    return (q, keys, values, tables, lengths, 0.3, window, biases, softcap, *scales)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize(
    ("window", "slopes", "softcap"),
    [(None, False, None), (5, False, None), (None, True, None), (None, False, 2.0)],
)
def test_decode_attention(kind, window, slopes, softcap):
    arguments = decode_arguments(kind=kind, window=window, slopes=slopes, softcap=softcap)
    opcheck(attention.decode_attention_op, arguments)
    found = torch.ops.lapilli.decode_attention(*arguments)
    names = ("scale", "window", "slopes", "softcap", "key_scales", "value_scales")
    expected = attention_reference(*arguments[:5], **dict(zip(names, arguments[5:], strict=True)))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("window", "slopes", "causal"),
    [(None, False, True), (5, False, True), (None, True, True), (None, False, False)],
)
def test_prefill_attention(window, slopes, causal):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    biases = torch.rand(4) if slopes else None
    opcheck(attention.prefill_attention_op, (q, k, v, None, window, biases, causal))
    found = torch.ops.lapilli.prefill_attention(q, k, v, None, window, biases, causal)
    expected = prefill_reference(q, k, v, window=window, slopes=biases, causal=causal)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_operations(dtype):
    torch.manual_seed(0)
    x, up = torch.randn(2, 3, 64).to(dtype), torch.randn(2, 3, 64).to(dtype)
    weight = torch.randn(64).to(dtype)
    opcheck(layer.rms_norm_op, (x, weight, 1e-5))
    opcheck(layer.silu_mul_op, (x, up))
    heads = torch.randn(2, 4, 3, 32).to(dtype)
    cos, sin = torch.randn(2, 1, 3, 32).to(dtype), torch.randn(2, 1, 3, 32).to(dtype)
    opcheck(layer.rotate_op, (heads.transpose(1, 2).contiguous().transpose(1, 2), cos, sin))
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.1}
    norm = torch.ops.lapilli.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(norm, layer.rms_norm_reference(x, weight, 1e-5), **near)
    gate = torch.ops.lapilli.silu_mul(x, up)
    torch.testing.assert_close(gate, layer.silu_mul_reference(x, up), **near)
    turned = torch.ops.lapilli.rotate(heads, cos, sin)
    torch.testing.assert_close(turned, layer.rotate_reference(heads, cos, sin), **near)


def test_a_compiler_sees_the_ops_of_attention():
    """Without the shape checks of the tests, which torch cannot compile."""
    seen = []
    decodes, prefills = map(
        inspect.unwrap, (attention.decode_attention, attention.prefill_attention)
    )

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    @torch.compile(backend=backend, fullgraph=True)
    def both(decode, q, k, v):
        return decodes(*decode), prefills(q, k, v)

    decode, (q, k, v) = decode_arguments(kind="float32")[:5], torch.randn(3, 1, 2, 5, 16).unbind()
    with torch.inference_mode():
        found = both(decode, q, k, v)
    torch.testing.assert_close(found[0], attention_reference(*decode), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], prefill_reference(q, k, v), atol=1e-5, rtol=1e-4)
    assert [name for name in seen if "lapilli" in name] == [
        "lapilli.decode_attention",
        "lapilli.prefill_attention",
    ]
