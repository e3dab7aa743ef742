"""Every language-model family against transformers, in every way that its layers are run.

A new family needs a line in SAMPLES: the keys of a tiny configuration in which everything that the
family has is at work. Heads are 32 wide, so that the compiled library computes whole layers.
"""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

import lapilli
from lapilli import Chat, Message, SamplingParams
from lapilli.checkpoint.export import export_checkpoint
from lapilli.config.families import text_types
from lapilli.generate.engine import EngineOptions
from lapilli.kernels.library import native
from lapilli.lm.decoder import Decoder
from lapilli.lm.fused_layer import FusedLayer, FusedLayers
from lapilli.nn.paged import BlockStore
from lapilli.quant import QuantConfig, quantize
from tests.integration.oracle import Oracle, make_llava, make_tokenizer, picture
from tests.versions import needs

WINDOW = {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 12}
SAMPLES = {
    "llama": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 12}),
    "qwen2": (Qwen2Config, WINDOW),
    "qwen3": (Qwen3Config, {"head_dim": 32, **WINDOW}),
    "gemma2": (
        Gemma2Config,
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, **GEMMA},
    ),
    "gemma3_text": (
        Gemma3TextConfig,
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
            **GEMMA,
        },
    ),
}
ELSEWHERE = {"mpt"}
"""tests/lm/test_mpt.py: transformers' LLaVA cannot have it."""
SIZES = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PICTURES = [picture(60, 40, 1), picture(28, 90, 2)]
ROWS = [
    ("What is in this picture? What is in this picture?", PICTURES[:1]),
    ("Why?", PICTURES[1:]),
]
PARAMS = SamplingParams(max_new_tokens=12)
ENGINES = {
    "engine": EngineOptions(speculate="off"),
    "guesses": EngineOptions(speculate="on"),
    "kept in bfloat16": EngineOptions(speculate="off", kv_dtype="bfloat16"),
}
pytestmark = pytest.mark.slow


def test_every_family_has_a_sample():
    assert set(SAMPLES) | ELSEWHERE == set(text_types())


def make_oracle(path: Path, family: str) -> Oracle:
    """A LLaVA of the family; norms too have weights that count."""
    config_class, keys = SAMPLES[family]
    torch.manual_seed(len(family))
    oracle = make_llava(path, config_class(**SIZES, **keys))
    with torch.no_grad():
        for parameter in oracle.model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    oracle.model.save_pretrained(path)
    # Its own choice until 5.23, torch's attention, forgets the soft caps of Gemma 2.
    oracle.model.set_attn_implementation({"": "eager", "text_config": "eager"})
    return oracle


SCALED = needs(
    "transformers", "5.20", "scales the embeddings of Gemma 2 after the picture is in them"
)
PAIRS = [pytest.param(name, marks=SCALED if name == "gemma2" else ()) for name in SAMPLES]


@pytest.fixture(scope="module", params=PAIRS)
def pair(request, tmp_path_factory) -> tuple[Oracle, Chat]:
    oracle = make_oracle(tmp_path_factory.mktemp("family"), request.param)
    chat = lapilli.load(str(oracle.path), device="cpu", dtype="float32", strict_config=True)
    assert chat.report.missing == chat.report.unexpected == ()
    return oracle, chat


def conversations() -> list[list[Message]]:
    return [[Message.user(question, *pictures)] for question, pictures in ROWS]


def logits_of(chat: Chat) -> torch.Tensor:
    ready = [chat.encode(one) for one in conversations()]
    batch = chat.model.embed_prompts([r.encoded for r in ready], [r.media for r in ready])
    return chat.model.logits(chat.model(batch))[batch.attention_mask]


def expected_logits(model: torch.nn.Module, oracle: Oracle) -> torch.Tensor:
    inputs = oracle.inputs(ROWS)
    return model(**inputs).logits[inputs["attention_mask"].bool()]


def tokens_of(chat: Chat) -> list[list[int]]:
    return [list(one.token_ids) for one in chat.batch(conversations(), PARAMS)]


def test_logits(pair):
    oracle, chat = pair
    with torch.inference_mode():
        expected, found = expected_logits(oracle.model, oracle), logits_of(chat)
    assert expected.std() > 0.3
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


STEPS, LAYERS, MODULES = "steps in one call", "layers in one call", "modules"


@pytest.mark.parametrize("way", [STEPS, LAYERS, MODULES])
@pytest.mark.parametrize("name", ENGINES)
def test_new_tokens(pair, monkeypatch, name, way):
    oracle, _ = pair
    expected = oracle.answers(oracle.inputs(ROWS), max_new_tokens=12)
    calls = watch_calls(monkeypatch, way)
    engine = ENGINES[name]
    other = lapilli.load(
        str(oracle.path), device="cpu", dtype="float32", strict_config=True, engine=engine
    )
    found = tokens_of(other)
    if name != "kept in bfloat16":  # whose logits may be 1e-2 apart
        assert found == expected
    assert (native() is None) or any(calls) == (way != MODULES)


def test_new_tokens_without_kernels(pair, monkeypatch):
    """Blocks are then gathered and masked, by each layer's own window."""
    oracle, _ = pair
    monkeypatch.setattr(BlockStore, "has_kernel", False)
    chat = lapilli.load(str(oracle.path), device="cpu", dtype="float32", engine=ENGINES["engine"])
    assert tokens_of(chat) == oracle.answers(oracle.inputs(ROWS), max_new_tokens=12)


def watch_calls(monkeypatch, way: str) -> list[bool]:
    """Whether what the way names was one call, each time; with MODULES nothing is."""
    calls: list[bool] = []

    def watch(kind: type, *, is_used: bool, is_watched: bool) -> None:
        run = kind.run

        def watched(self, *args, **options):
            out = run(self, *args, **options) if is_used else None
            if is_watched:
                calls.append(out is not None)
            return out

        monkeypatch.setattr(kind, "run", watched)

    watch(FusedLayers, is_used=way == STEPS, is_watched=way == STEPS)
    watch(FusedLayer, is_used=way != MODULES, is_watched=way != STEPS)
    return calls


def test_a_plain_cache(pair):
    oracle, chat = pair
    expected = oracle.answers(oracle.inputs(ROWS[:1]), max_new_tokens=12)
    ready = chat.encode(conversations()[0])
    model, found = chat.model.language_model, []
    with torch.inference_mode():
        batch = chat.model.embed_prompts([ready.encoded], [ready.media])
        cache = model.new_cache(1, capacity=4)
        hidden = model(batch.inputs_embeds, position_ids=batch.position_ids, cache=cache)
        while len(found) < 12 and (not found or found[-1] != 2):
            found.append(int(model.logits(hidden[:, -1]).argmax()))
            place = torch.tensor([[cache.length]])
            hidden = model(model.embed(torch.tensor([found[-1:]])), position_ids=place, cache=cache)
    assert [found] == expected


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights(pair, monkeypatch, bits):
    oracle, _ = pair
    chat = lapilli.load(str(oracle.path), device="cpu", dtype="float32")
    with torch.inference_mode():
        exact = logits_of(chat)
        quantize(chat.model, QuantConfig(bits=bits, group_size=32))
        near = logits_of(chat)
    assert (near - exact).std() < (0.1 if bits == 8 else 0.7) * exact.std()
    whole = tokens_of(chat)
    calls = watch_calls(monkeypatch, MODULES)
    assert tokens_of(chat) == whole
    assert calls


@pytest.mark.parametrize("layout", ["llava", "huggingface"])
def test_both_layouts_come_back(pair, tmp_path, layout):
    oracle, chat = pair
    export_checkpoint(str(oracle.path), tmp_path / "saved", layout=layout)
    again = lapilli.load(str(tmp_path / "saved"), device="cpu", dtype="float32", strict_config=True)
    assert again.report.missing == again.report.unexpected == ()
    with torch.inference_mode():
        assert torch.equal(logits_of(again), logits_of(chat))
        if layout == "huggingface":
            theirs = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").eval()
            torch.testing.assert_close(
                expected_logits(theirs, oracle), logits_of(chat), atol=1e-4, rtol=0
            )
    assert tokens_of(again) == tokens_of(chat)


def test_gradients(pair):
    oracle, _ = pair
    chat = lapilli.load(str(oracle.path), device="cpu", dtype="float32")
    theirs, ours = oracle.model, chat.model.language_model.requires_grad_(True)
    theirs.requires_grad_(True)
    theirs.zero_grad()
    for logits in (expected_logits(theirs, oracle), logits_of(chat)):
        targets = torch.arange(len(logits)) % 250
        functional.cross_entropy(logits, targets).backward()
    expected = {
        name.removeprefix("model.language_model."): parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    for name, parameter in ours.named_parameters():
        name = name.removeprefix("model.")
        assert parameter.grad is not None, name
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=lambda text, n=name: n + text
        )


@pytest.fixture(params=SAMPLES)
def plain(request, tmp_path) -> tuple[torch.nn.Module, Chat]:
    """The family without pictures, as transformers' ...ForCausalLM saves it."""
    config_class, keys = SAMPLES[request.param]
    torch.manual_seed(1)
    oracle = AutoModelForCausalLM.from_config(config_class(**SIZES, **keys)).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    oracle.save_pretrained(tmp_path)
    oracle.set_attn_implementation("eager")  # see make_oracle
    make_tokenizer().save_pretrained(tmp_path)
    return oracle, lapilli.load(str(tmp_path), device="cpu", dtype="float32", strict_config=True)


def test_a_language_model_without_pictures(plain):
    oracle, chat = plain
    assert isinstance(chat.model.language_model, Decoder)
    ids = torch.arange(4, 44)[None]
    model = chat.model.language_model
    with torch.inference_mode():
        hidden = model(model.embed(ids), position_ids=torch.arange(40)[None])
        torch.testing.assert_close(model.logits(hidden), oracle(ids).logits, atol=1e-4, rtol=0)
    params = SamplingParams(max_new_tokens=6)
    found = chat.answer([Message.user("Why?")], params)
    ready = torch.tensor([list(chat.encode([Message.user("Why?")]).encoded.input_ids)])
    expected = oracle.generate(ready, max_new_tokens=6, do_sample=False, pad_token_id=0)
    expected = expected[0, ready.shape[1] :].tolist()
    assert list(found.token_ids) == expected
