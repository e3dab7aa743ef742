"""A tiny model that reads pictures and vectors, and requests for it."""

from collections.abc import Sequence

import pytest
import torch

from lapilli.config.generation import SamplingParams
from lapilli.config.model import DecoderConfig, MptConfig, ProjectorConfig
from lapilli.generate.engine import Engine, EngineOptions, Request
from lapilli.generate.output import Generation
from lapilli.generate.reference import generate
from lapilli.lm.decoder import Decoder
from lapilli.lm.mpt import Mpt
from lapilli.modality.vector import PreparedVectors, VectorModality
from lapilli.model import VisionLanguageModel
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span
from tests.generate.conftest import WordTokenizer

VOCABULARY = 61
WIDTH = 32
CONFIG = DecoderConfig(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10000.0,
    max_positions=128,
)
MPT = MptConfig(
    vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=4, max_positions=128
)
SMALL = EngineOptions(max_rows=4, block_size=4, chunk=6, kv_bytes=1 << 20)


class CountingVectors(VectorModality):
    """Vectors that tell how often somebody looked at them."""

    def __init__(self) -> None:
        super().__init__(ProjectorConfig(kind="linear", vision_size=3, hidden_size=WIDTH))
        self._seen: list[PreparedVectors] = []  # not a number: that would be another setting

    @property
    def items_seen(self) -> int:
        return len(self._seen)

    def embed(self, items: Sequence[PreparedVectors]) -> list[torch.Tensor]:
        self._seen += items
        return super().embed(items)


def build(config: DecoderConfig | MptConfig = CONFIG, seed: int = 5) -> VisionLanguageModel:
    torch.manual_seed(seed)
    language_model = Mpt(config) if isinstance(config, MptConfig) else Decoder(config)
    model = VisionLanguageModel(language_model, {"vector": CountingVectors()})
    # Wide weights: a random model with the usual small ones says nearly the same at every step.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


@pytest.fixture(scope="session")
def model() -> VisionLanguageModel:
    return build()


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


def picture(number: int, length: int = 3) -> PreparedVectors:
    """A medium of so many positions, another one for every number."""
    source = torch.Generator().manual_seed(number)
    return PreparedVectors(torch.randn(length, 3, generator=source))


def prompt_of(parts: Sequence[int | PreparedVectors]) -> tuple[EncodedPrompt, tuple]:
    """Ids and media in their order as a prompt."""
    ids: list[int] = []
    spans, media = [], []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            spans.append(Span(0, len(ids), len(part.values), "vector"))
            ids += [PLACEHOLDER] * len(part.values)
            media.append(part)
    return EncodedPrompt(ids, [False] * len(ids), tuple(spans)), tuple(media)


def request_of(
    parts: Sequence[int | PreparedVectors], *, priority: int = 0, seen=None, **options: object
) -> Request:
    encoded, media = prompt_of(parts)
    params = SamplingParams.from_options(**{"max_new_tokens": 8, **options})
    return Request(encoded, media, params, seen_ids=seen, priority=priority)


def alone(model: VisionLanguageModel, request: Request, eos_ids=()) -> Generation:
    """The answer of the plain path, without any cache that was there before."""
    with torch.inference_mode():
        batch = model.embed_prompts([request.prompt], [request.media])
    [answer] = generate(
        model,
        batch,
        request.params,
        tokenizer=WordTokenizer(),
        prompt_ids=None if request.seen_ids is None else [request.seen_ids],
        eos_ids=eos_ids,
    )
    return answer


@pytest.fixture
def engine(model, tokenizer) -> Engine:
    return Engine(model, tokenizer, options=SMALL)
