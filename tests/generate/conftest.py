"""A small random language model and a tokenizer of one word per id."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from lapilli.config.model import DecoderConfig
from lapilli.lm.decoder import Decoder
from lapilli.model import FusedBatch, VisionLanguageModel

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCABULARY = 61
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=64,
)


@dataclass
class WordTokenizer:
    """Every id is its own word."""

    eos_id: int | None = None
    special_ids: frozenset[int] = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return f" w{token_id}".encode()

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    torch.manual_seed(5)
    decoder = Decoder(CONFIG)
    # Wide weights: a random model with the usual small ones says nearly the same at every step.
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return VisionLanguageModel(decoder.eval())


@pytest.fixture(scope="session")
def oracle(model: VisionLanguageModel) -> "LlamaForCausalLM":
    """The same model in transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=CONFIG.hidden_size,
            intermediate_size=CONFIG.intermediate_size,
            num_hidden_layers=CONFIG.num_layers,
            num_attention_heads=CONFIG.num_heads,
            num_key_value_heads=CONFIG.num_kv_heads,
            rms_norm_eps=CONFIG.norm_eps,
            max_position_embeddings=CONFIG.max_positions,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    llama.load_state_dict(model.language_model.state_dict())
    return llama.eval()


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


def fuse_rows(model: VisionLanguageModel, *rows: Sequence[int]) -> FusedBatch:
    """A batch from rows of ids, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    positions = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, tokens in enumerate(rows):
        start = longest - len(tokens)
        ids[row, start:] = torch.tensor(tokens)
        mask[row, start:] = True
        positions[row, start:] = torch.arange(len(tokens))
    with torch.inference_mode():
        return FusedBatch(model.language_model.embed(ids), mask, positions)


@pytest.fixture
def fused(model: VisionLanguageModel) -> Callable[..., FusedBatch]:
    """fused(*rows of ids) -> a batch of the model's embeddings."""
    return partial(fuse_rows, model)
