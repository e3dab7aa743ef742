"""ALBEF at the size of the other forms: encoders apart, aligned before they are fused.

    picture  16 features, mlp ------------------------.--- class vector --.
    text     [begin, words] -> N bidirectional layers -+-- first state ----+- contrastive (ITC)
                                                       v
             M layers: self-attention, cross-attention to the picture, MLP --+- do they match (ITM)
                                                                             +- masked words (MLM)
                                                                             '- answers, after it

Embeddings and distributions of an average of the weights (momentum) are targets beside the true
ones, and fill the queue that the contrastive loss compares with.

Differences from the paper: the tower is pebble's and frozen, as for every form here, with an
attention pool in the place of its class token; norms stand before the blocks, not behind them; an
answer is one of a closed list, read at the end of the question as from the decoders, where the
paper has an answer decoder. All three make training from nothing on few pictures easier.

Source: Junnan Li et al. 2021 (ALBEF, arXiv 2107.07651), section 3.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from comparison.scenes import MASK, Texts, Vocabulary
from lapilli.config.model import ProjectorConfig
from lapilli.modality.projector import build_projector
from lapilli.shapes import Bool, Float, Int, Tensor
from lapilli.train.trainer.task import Loss
from pebble.initialise import initialise

_MAX_PLACES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AlbefConfig:
    """Sizes and objectives.

    Attributes:
        text_layers: of the text encoder.
        fused_layers: with cross-attention, after them.
        inner: of their feed-forward blocks.
        embed: width of the vectors that ITC compares.
        queue: captions and pictures of earlier steps that ITC compares with.
        momentum: share of the average that a step keeps; the paper's 0.995 is for longer runs.
        alpha: weight of the average's distributions beside the true targets.
        ramp: steps in which alpha grows from 0, the paper's first epoch.
        masked: share of the words that are to be found.
    """

    text_layers: int = 2
    fused_layers: int = 2
    width: int = 128
    heads: int = 4
    inner: int = 344
    embed: int = 64
    queue: int = 512
    momentum: float = 0.99
    alpha: float = 0.4
    ramp: int = 300
    masked: float = 0.15


class Attention(nn.Module):
    """Attention of queries to other states, of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        seen: Float[Tensor, "B S D"],
        mask: Bool[Tensor, "B 1 T S"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Return what the states see."""
        q, k, v = (
            one.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for one in (self.q_proj(x), self.k_proj(seen), self.v_proj(seen))
        )
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.o_proj(found.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """A bidirectional layer, with cross-attention to a picture between its halves or without."""

    def __init__(self, config: AlbefConfig, *, fused: bool) -> None:
        super().__init__()
        width = config.width
        self.own_norm, self.own = nn.LayerNorm(width), Attention(width, config.heads)
        self.fused = fused
        if fused:
            self.cross_norm, self.cross = nn.LayerNorm(width), Attention(width, config.heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, config.inner), nn.Linear(config.inner, width)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        mask: Bool[Tensor, "B 1 T T"],
        picture: Float[Tensor, "B P D"] | None,
    ) -> Float[Tensor, "B T D"]:
        """Return the states behind the layer."""
        normed = self.own_norm(x)
        x = x + self.own(normed, normed, mask)
        if self.fused and picture is not None:
            x = x + self.cross(self.cross_norm(x), picture)
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.mlp_norm(x))))
        return out


class Encoders(nn.Module):
    """All that has an average of its weights: both encoders, what fuses them, and their heads."""

    def __init__(self, config: AlbefConfig, vocabulary: int, features: int) -> None:
        super().__init__()
        width = config.width
        joint = ProjectorConfig(kind="mlp", vision_size=features, hidden_size=width, depth=2)
        self.projector = build_projector(joint)
        self.picture_norm = nn.LayerNorm(width)
        self.pool_query = nn.Parameter(torch.randn(width) * 0.02)
        self.pool = Attention(width, config.heads)
        self.words = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(_MAX_PLACES, width)
        self.text = nn.ModuleList(Layer(config, fused=False) for _ in range(config.text_layers))
        self.text_norm = nn.LayerNorm(width)
        self.fused = nn.ModuleList(Layer(config, fused=True) for _ in range(config.fused_layers))
        self.fused_norm = nn.LayerNorm(width)
        self.picture_embed = nn.Linear(width, config.embed)
        self.text_embed = nn.Linear(width, config.embed)

    def see(self, features: Float[Tensor, "B P E"]) -> Float[Tensor, "B P D"]:
        """Return the states of pictures."""
        out: Tensor = self.picture_norm(self.projector(features))
        return out

    def read(self, texts: Texts, ids: Int[Tensor, "B T"] | None = None) -> Float[Tensor, "B T D"]:
        """Return the states of texts before they are fused with a picture."""
        x: Tensor = self.words(texts.ids if ids is None else ids) + self.places(texts.places)
        mask = own_mask(texts)
        for layer in self.text:
            x = layer(x, mask, None)
        return x

    def fuse(
        self, x: Float[Tensor, "B T D"], texts: Texts, pictures: Float[Tensor, "B P D"]
    ) -> Float[Tensor, "B T D"]:
        """Return the states of texts that have seen a picture."""
        mask = own_mask(texts)
        for layer in self.fused:
            x = layer(x, mask, pictures)
        out: Tensor = self.fused_norm(x)
        return out

    def picture_vectors(self, pictures: Float[Tensor, "B P D"]) -> Float[Tensor, "B C"]:
        """Return the unit vectors of pictures."""
        query = self.pool_query.expand(len(pictures), 1, -1)
        return F.normalize(self.picture_embed(self.pool(query, pictures)[:, 0]), dim=-1)

    def text_vectors(self, x: Float[Tensor, "B T D"], texts: Texts) -> Float[Tensor, "n C"]:
        """Return the unit vectors of texts, from their first states."""
        first = self.text_norm(x)[texts.places.eq(0) & texts.known]
        return F.normalize(self.text_embed(first), dim=-1)

    def word_logits(self, states: Float[Tensor, "n D"]) -> Float[Tensor, "n V"]:
        """Return the scores of all words, of the table that texts are read with."""
        out: Tensor = states @ self.words.weight.T
        return out


def own_mask(texts: Texts) -> Bool[Tensor, "B 1 T T"]:
    """Return who sees whom: all of the same text, and padding itself."""
    return (texts.owner[:, :, None] == texts.owner[:, None])[:, None]


class Albef(nn.Module):
    """Encoders in training, their average, the queue and the heads.

    Args:
        config: sizes and objectives.
        vocabulary: words and answers.
        features: width of the pictures' features.
        seed: of the weights.
    """

    pictures_queue: Tensor
    texts_queue: Tensor
    steps: Tensor

    def __init__(
        self, config: AlbefConfig, vocabulary: Vocabulary, features: int, seed: int
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = config
        self.encoders = Encoders(config, len(vocabulary), features)
        self.match_head = nn.Linear(config.width, 2)
        self.answers = vocabulary.answers
        self.temperature = nn.Parameter(torch.tensor(0.07))
        initialise(self, seed, depth=config.text_layers + config.fused_layers)
        self.average = copy.deepcopy(self.encoders).requires_grad_(False)
        for name in ("pictures_queue", "texts_queue"):
            fresh = F.normalize(torch.randn(config.queue, config.embed), dim=-1)
            self.register_buffer(name, fresh)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def answer_logits(self, texts: Texts) -> Float[Tensor, "n answers"]:
        """Return the scores of all answers for every question."""
        encoders = self.encoders
        states = encoders.fuse(encoders.read(texts), texts, encoders.see(texts.features))
        row, place = texts.last
        return states[row, place] @ encoders.words.weight[self.answers].T

    def request_flops(self, words: int, features: int, *, known: bool = False) -> float:
        """Return the operations of a question about a picture, up to the choice of an answer.

        Args:
            words: of the text, what it is for included.
            features: of the picture; the tower that made them is left out.
            known: the picture's keys and values in every layer are kept from a question before.
        """
        config = self.config
        width = config.width
        cross = config.fused_layers * (4 * words * width**2 + 4 * words * features * width)
        layers = config.text_layers + config.fused_layers
        read = layers * self._layer_flops(words) + cross + 2 * len(self.answers) * width
        if known:
            return float(read)
        keys = config.fused_layers * 4 * features * width**2
        return float(read + keys + self.projector_flops(features))

    def vector_flops(self, words: int, features: int) -> tuple[float, float]:
        """Return the operations of the vector of a text and of that of a picture."""
        width, embed = self.config.width, self.config.embed
        text = self.config.text_layers * self._layer_flops(words) + 2 * width * embed
        pool = 4 * (features + 1) * width**2 + 4 * features * width
        return float(text), self.projector_flops(features) + pool + 2 * width * embed

    def projector_flops(self, features: int) -> float:
        """Return the operations between the tower's features and the picture's states."""
        first = self.encoders.projector[0].in_features  # type: ignore[index]  # an mlp
        width = self.config.width
        return float(2 * features * (first * width + width**2))

    def _layer_flops(self, words: int) -> int:
        width, inner = self.config.width, self.config.inner
        return 2 * words * (4 * width**2 + 2 * width * inner) + 4 * words**2 * width

    def caption_loss(self, texts: Texts) -> Loss:
        """Return the summed losses of a step of pretraining: ITC + ITM + MLM.

        Every row has one caption, and pictures of the same one are told from their own by chance
        alone, as there. Moves the average and the queue.
        """
        self.temperature.data.clamp_(0.001, 0.5)
        self._move_average()
        count = len(texts.ids)
        pictures = self.encoders.see(texts.features)
        read = self.encoders.read(texts)
        with torch.no_grad():
            old_pictures = self.average.see(texts.features)
            old = (
                self.average.picture_vectors(old_pictures),
                self.average.text_vectors(self.average.read(texts), texts),
            )
        alpha = self.config.alpha * min(1.0, int(self.steps) / max(1, self.config.ramp))
        itc, similar = self._contrast(texts, pictures, read, old, alpha)
        itm = self._match(texts, pictures, read, similar)
        mlm = self._find_masked(texts, pictures, old_pictures, alpha)
        self._enqueue(*old)
        self.steps += 1
        parts = {"itc": itc.detach(), "itm": itm.detach(), "mlm": mlm.detach()}
        return Loss(count * (itc + itm + mlm), {name: count * part for name, part in parts.items()})

    def _contrast(
        self,
        texts: Texts,
        pictures: Tensor,
        read: Tensor,
        old: tuple[Tensor, Tensor],
        alpha: float,
    ) -> tuple[Tensor, Tensor]:
        """Return the contrastive loss, and how similar pictures [B] and texts [B] are."""
        own = self.encoders.picture_vectors(pictures), self.encoders.text_vectors(read, texts)
        queues = self.pictures_queue.clone(), self.texts_queue.clone()
        truth = torch.eye(len(own[0]), len(own[0]) + self.config.queue)
        losses = []
        for at, other in ((0, 1), (1, 0)):
            candidates = torch.cat([old[other], queues[other]])
            with torch.no_grad():
                soft = (old[at] @ candidates.T / self.temperature).softmax(-1)
                targets = alpha * soft + (1 - alpha) * truth
            scores = own[at] @ candidates.T / self.temperature
            losses.append(-(targets * scores.log_softmax(-1)).sum(-1).mean())
        return sum(losses, start=torch.zeros(())) / 2, (own[0] @ own[1].T / self.temperature)

    def _match(self, texts: Texts, pictures: Tensor, read: Tensor, similar: Tensor) -> Tensor:
        """Return the loss of telling pairs from the hardest others of the batch."""
        count = len(pictures)
        with torch.no_grad():
            apart = similar.masked_fill(torch.eye(count, dtype=torch.bool), float("-inf"))
            texts_of = torch.multinomial(apart.softmax(1), 1)[:, 0]
            pictures_of = torch.multinomial(apart.softmax(0).T, 1)[:, 0]
        everyone = torch.arange(count)
        shown = torch.cat([everyone, everyone, pictures_of])
        said = torch.cat([everyone, texts_of, everyone])
        logits = self._match_logits(texts, said, read[said], pictures[shown])
        return F.cross_entropy(logits, (torch.arange(3 * count) < count).long())

    def _match_logits(
        self, texts: Texts, said: Tensor, read: Tensor, pictures: Tensor
    ) -> Float[Tensor, "n 2"]:
        chosen = texts.take(said)
        states = self.encoders.fuse(read, chosen, pictures)
        logits: Tensor = self.match_head(states[:, 0])
        return logits

    def _find_masked(
        self, texts: Texts, pictures: Tensor, old_pictures: Tensor, alpha: float
    ) -> Tensor:
        """Return the loss of finding masked words, from the true ones and the average's guesses."""
        words = texts.known & (texts.places > 0)
        hidden = words & (torch.rand(texts.ids.shape) < self.config.masked)
        hidden |= words & texts.places.eq(1) & ~hidden.any(1, keepdim=True)  # at least one
        ids = torch.where(hidden, MASK, texts.ids)
        encoders = self.encoders
        states = encoders.fuse(encoders.read(texts, ids), texts, pictures)[hidden]
        logs = encoders.word_logits(states).log_softmax(-1)
        with torch.no_grad():
            average = self.average
            guessed = average.fuse(average.read(texts, ids), texts, old_pictures)[hidden]
            soft = average.word_logits(guessed).softmax(-1)
            truth = F.one_hot(texts.ids[hidden], logs.shape[-1])
            targets = alpha * soft + (1 - alpha) * truth
        return -(targets * logs).sum(-1).mean()

    @torch.no_grad()
    def _move_average(self) -> None:
        pairs: Iterable[tuple[Tensor, Tensor]] = zip(
            self.average.parameters(), self.encoders.parameters(), strict=True
        )
        for kept, own in pairs:
            kept.lerp_(own, 1 - self.config.momentum)

    def _enqueue(self, pictures: Tensor, texts: Tensor) -> None:
        """Put what the average made in the place of the oldest; both queues hold pairs."""
        for queue, new in ((self.pictures_queue, pictures), (self.texts_queue, texts)):
            queue.copy_(torch.cat([new.to(queue.dtype), queue])[: len(queue)])

    def similarities(self, captions: Texts) -> Float[Tensor, "captions pictures"]:
        """Return the cosines of captions and the pictures of all rows, each side encoded alone."""
        pictures = self.encoders.picture_vectors(self.encoders.see(captions.features))
        return self.encoders.text_vectors(self.encoders.read(captions), captions) @ pictures.T

    def match_scores(self, captions: Texts, rows: Tensor, shown: Tensor) -> Float[Tensor, " n"]:
        """Return the log probability that captions of these rows match these pictures."""
        pictures = self.encoders.see(captions.features)[shown]
        read = self.encoders.read(captions)[rows]
        logits = self._match_logits(captions, rows, read, pictures)
        return logits.log_softmax(-1)[:, 1]
