"""Three forms in which a language model of lapilli reads pictures, and what it learns of texts.

    tokens           64 features through an mlp stand before the text      (LLaVA)
    soft prompt      a resampler makes few of them first                   (User-LLM, BLIP-2)
    cross-attention  gated blocks between the layers look at all of them   (Flamingo)

    [ features | text of 8 positions | another text | ... ]    one pass, no text sees another one

The rows of training hold all texts about a picture, which is read once for all of them, as a server
does that keeps keys and values. Every text stands at the positions that it would have alone, so a
row is the same as so many prompts (tests/comparison/test_forms.py compares). Knows features and
ids; must not know scenes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit
from torch.utils.flop_counter import FlopCounterMode

from comparison.scenes import Texts, Vocabulary
from lapilli.config.modalities import VectorConfig
from lapilli.config.model import DecoderConfig
from lapilli.lm.cross_attention import ENDLESS, Memory
from lapilli.lm.decoder import Decoder
from lapilli.modality.vector import PreparedVectors, build
from lapilli.model import VisionLanguageModel
from lapilli.nn.attention import attend
from lapilli.nn.kv_cache import Segments
from lapilli.plan.flops import request_flops
from lapilli.shapes import Bool, Float, Int, Tensor
from lapilli.train.trainer.task import Loss
from pebble.initialise import initialise

NAME: Final = "picture"
WIDTH: Final = 128
HEADS: Final = 4
_PICTURE: Final = -2  # owner of a picture's positions


@dataclass(frozen=True, slots=True, kw_only=True)
class FormConfig:
    """Sizes of a language model and the way that pictures come into it."""

    layers: int
    inner: int = 344
    projector: str = "mlp2x_gelu"
    every: int | None = None
    width: int = WIDTH
    heads: int = HEADS

    def decoder(self, vocabulary: int) -> DecoderConfig:
        """Return the language model's sizes."""
        return DecoderConfig(
            vocab_size=vocabulary,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_layers=self.layers,
            num_heads=self.heads,
            num_kv_heads=self.heads,
            head_dim=self.width // self.heads,
            norm_eps=1e-6,
            rope_theta=10000.0,
            max_positions=512,
            tie_embeddings=True,
        )

    def modality(self, features: int) -> VectorConfig:
        """Return the settings of pictures, as vectors of this width."""
        fusion = "tokens" if self.every is None else "cross_attention"
        return VectorConfig(
            width=features, projector=self.projector, fusion=fusion, every=self.every
        )


def operations(run: Callable[[], object]) -> float:
    """Return the floating point operations of the matrix products of a pass, as torch counts them.

    With gradients, since torch does not see into the native kernels of passes without.
    """
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


class SharedRows(Segments):
    """Segments that share what stands before them in their row.

    Args:
        mask: which positions every position sees.
    """

    def __init__(self, mask: Bool[Tensor, "B 1 T T"]) -> None:
        super().__init__(())
        self._mask = mask

    def attend(
        self,
        q: Float[Tensor, "B Q T A"],
        k: Float[Tensor, "B K T A"],
        v: Float[Tensor, "B K T A"],
        *,
        scale: float | None = None,
        window: int | None = None,
        slopes: Float[Tensor, " Q"] | None = None,
        softcap: float | None = None,
    ) -> Float[Tensor, "B Q T A"]:
        """Compute attention under the mask."""
        return attend(q, k, v, mask=self._mask, scale=scale, softcap=softcap)


def row_mask(pictures: int, owner: Int[Tensor, "B T"]) -> Bool[Tensor, "B 1 S S"]:
    """Return who sees whom: all what is before them, but no text another one."""
    whose = F.pad(owner, (pictures, 0), value=_PICTURE)
    seen = (whose[:, :, None] == whose[:, None]) | (whose == _PICTURE)[:, None]
    return seen.tril()[:, None]


class LanguageReader(nn.Module):
    """A decoder from scratch that reads a picture in one of the forms.

    Args:
        config: the form.
        vocabulary: words and answers.
        features: width of the pictures' features.
        seed: of the weights.
    """

    def __init__(
        self, config: FormConfig, vocabulary: Vocabulary, features: int, seed: int
    ) -> None:
        super().__init__()
        decoder = Decoder(config.decoder(len(vocabulary)))
        modality = config.modality(features)
        if modality.every is not None:
            decoder.add_cross_attention(modality.every)
        torch.manual_seed(seed)
        pictures = build(modality, name=NAME, hidden_size=config.width)
        attended = [NAME] if modality.is_attended else []
        self.vlm = VisionLanguageModel(decoder, {NAME: pictures}, attended=attended)
        initialise(self.vlm, seed, depth=config.layers)
        self.decoder, self.every = decoder, modality.every
        self.answers = vocabulary.answers

    def num_positions(self, features: int) -> int:
        """Return the positions that a picture of so many features takes."""
        if NAME in self.vlm.attended:
            return 0
        queries: int = self.vlm.modality(NAME).config.num_queries  # type: ignore[attr-defined]  # VectorModality
        return queries or features

    def request_flops(self, words: int, features: int, *, known: bool = False) -> float:
        """Return the operations of reading a text about a picture, up to one choice behind it.

        Args:
            words: of the text, what it is for included.
            features: of the picture; the tower that made them is left out.
            known: the picture's keys and values are kept from a text before.
        """
        config, pictures = self.decoder.config, self.num_positions(features)
        attended = NAME in self.vlm.attended
        every = self.every if attended else None
        memory = features if attended else 0

        def reading(positions: int) -> float:
            return request_flops(config, positions=positions, memory=memory, every=every)

        if known:  # a pass over nothing has the one choice too
            choice = 2 * config.vocab_size * config.hidden_size
            return reading(pictures + words) - reading(pictures) + choice
        return reading(pictures + words) + self.projector_flops(features)

    def projector_flops(self, features: int) -> float:
        """Return the operations between the tower's features and the language model."""
        modality = self.vlm.modality(NAME)
        blank = torch.zeros(features, modality.config.vision_size)  # type: ignore[attr-defined]  # VectorModality
        return operations(lambda: modality.projector(blank))  # type: ignore[attr-defined]  # see above

    def caption_loss(self, texts: Texts) -> Loss:
        """Return the summed cross entropy of the words of captions and of the end behind them."""
        logits = self.decoder.logits(self.states(texts)[texts.known])
        return Loss(F.cross_entropy(logits, texts.following[texts.known], reduction="sum"))

    def log_likelihood(self, texts: Texts) -> Float[Tensor, " n"]:
        """Return the log probability of every text as the caption of its picture."""
        known = texts.known
        scores = self.decoder.logits(self.states(texts)[known]).log_softmax(-1)
        found = scores.gather(-1, texts.following[known][:, None])[:, 0]
        starts = (texts.places[known] == 0).cumsum(0) - 1
        return found.new_zeros(texts.last.shape[1]).index_add(0, starts, found)

    def answer_logits(self, texts: Texts) -> Float[Tensor, "n answers"]:
        """Return the scores of all answers for every question."""
        row, place = texts.last
        return self.decoder.token_logits(self.states(texts)[row, place], self.answers)

    def states(self, texts: Texts) -> Float[Tensor, "B T D"]:
        """Return the state behind every position of the texts."""
        pictures, memory = self._seen(texts.features)
        vectors = self.decoder.embed(texts.ids)
        before = 0
        if pictures is not None:
            before = pictures.shape[1]
            vectors = torch.cat([pictures, vectors], dim=1)
        steps = torch.arange(before).expand(len(vectors), -1)
        positions = torch.cat([steps, texts.places + before], dim=1)
        rows = SharedRows(row_mask(before, texts.owner))
        states = self.decoder.forward(vectors, position_ids=positions, cache=rows, memory=memory)
        return states[:, before:]

    def _seen(self, features: Float[Tensor, "B P E"]) -> tuple[Tensor | None, Memory | None]:
        """Return what stands before the texts, or beside them."""
        items = [PreparedVectors(one) for one in features]
        seen = self.vlm.modality(NAME).embed(items)
        if NAME not in self.vlm.attended:
            return torch.stack(seen), None
        places = [(row, 0, ENDLESS) for row in range(len(seen))]
        return None, Memory.of_rows(seen, places, rows=len(seen), like=seen[0])
