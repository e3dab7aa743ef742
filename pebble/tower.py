"""A CLIP tower from pictures and captions; knows no language model.

    pixels -> tower -> hidden state before the last -> words of every patch    (captioning)
                    -> last layer, class token      -> the picture's caption   (contrastive)

The hidden state that LLaVA selects is the one that learns to name what lies under each patch; the
last layer only
serves the contrastive term, as in CLIP.
"""

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli.config.model import VisionConfig
from lapilli.modality.image.image import VisionLayer, VisionTransformer
from lapilli.shapes import Float, Int, Tensor, UInt8
from lapilli.train.data.sampler import draw_indices
from lapilli.train.recipe import RunRecipe
from lapilli.train.trainer.loop import Loss
from pebble.initialise import initialise
from pebble.palette import COLOURS
from pebble.regions import LEXICON, MARKS
from pebble.scene import SHAPES, SIZES

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CONTRASTIVE_WEIGHT = 0.2
_WHITENED = 512  # pictures that the first filters are computed from
_NOISE_FLOOR = 0.02  # variance: about the grain of the textures
# What an object is counts more than what is said of the whole picture in all of its patches.
_OBJECT_WEIGHT = 4.0
_COUNT_WEIGHT = 0.1
_MARK_WEIGHT = 2.0
_MARKS = (
    ("word", "word:", "word"),
    ("tens", "tens:", "number"),
    ("units", "units:", "number"),
    ("digit", "digit:", "handwritten"),
)
_FITTED_PATCHES = 2048  # of a step that fits the naming head
# Pixels that large writing and digits are moved at random: nothing is said of their place.
_SHIFT = 6
_LARGE_SHARE = 0.18  # of the patches


def normalise(pixels: UInt8[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
    """Pixels 0 to 255 as CLIP's towers read them."""
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    return (pixels.float() / 255.0 - mean) / std


def grid_waves(side: int, width: int) -> Float[Tensor, "P E"]:
    """Sines and cosines of row and column of every patch: where a fresh tower starts from.

    Positions that begin as small noise are drowned by the patches' brightness: after 16,000
    pictures such a tower still
    named places at chance.

    Source: Chen et al. 2021 (MoCo v3), section 5; here the values stay trainable.
    """
    waves = torch.pi / 2 ** torch.linspace(0, 4, width // 4)  # one turn per 2 to 32 patches
    steps = torch.arange(side)[:, None] * waves  # [side, E / 4]
    rows = torch.cat((steps.sin(), steps.cos()), dim=-1)[:, None].expand(-1, side, -1)
    columns = torch.cat((steps.sin(), steps.cos()), dim=-1)[None].expand(side, -1, -1)
    return torch.cat((rows, columns), dim=-1).flatten(0, 1)


def whitening_filters(
    images: Float[Tensor, "N C H W"], side: int, number: int
) -> Float[Tensor, "E C side side"]:
    """Return the principal components of patches, each scaled to unit variance.

    Most of a random patch's variance is its brightness; whitened, edges and corners weigh as much
    from the first step.

    Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds", section 3.1; here the filters stay
        trainable.
    """
    patches = F.unfold(images, side, stride=side).transpose(1, 2).flatten(0, 1)  # [M, C * side^2]
    centred = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    filters = vectors.T.flip(0)[:number] / (values.flip(0)[:number, None] + _NOISE_FLOOR).sqrt()
    shaped: Tensor = filters.unflatten(1, (images.shape[1], side, side))
    return shaped


class TowerTrainer(nn.Module):
    """The tower with the two heads that only its training needs."""

    def __init__(self, config: VisionConfig, vocab_size: int, seed: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.vision_tower = VisionTransformer(config)
        self.region_head = nn.Linear(width, len(LEXICON))
        self.text_embedding = nn.Embedding(vocab_size, width)
        self.text_mixer = nn.Linear(3 * width, width)
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        initialise(self, seed, depth=config.num_layers)
        with torch.no_grad():
            embeddings = self.vision_tower.vision_model.embeddings
            embeddings.position_embedding.weight[1:] = 0.5 * grid_waves(config.grid.rows, width)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def start_from(self, pixels: UInt8[Tensor, "N C H W"]) -> None:
        """Fresh patch filters that whiten the patches of these pictures."""
        weight = self.vision_tower.vision_model.embeddings.patch_embedding.weight
        filters = whitening_filters(normalise(pixels), weight.shape[-1], len(weight))
        with torch.no_grad():
            weight.copy_(filters)

    def images(
        self, pixels: UInt8[Tensor, "N C H W"]
    ) -> tuple[Float[Tensor, "N P E"], Float[Tensor, "N E"]]:
        """Return the selected hidden state with its class token, and the picture as one vector."""
        features = self.vision_tower(normalise(pixels))
        return features, self.image_projection(self._class_token(features))

    def _class_token(self, features: Float[Tensor, "N P E"]) -> Float[Tensor, "N E"]:
        """Return the class token after the last layer, whose patches are not read."""
        stack = self.vision_tower.vision_model
        layer = cast(VisionLayer, stack.encoder.layers[-1])
        attention, heads = layer.self_attn, (layer.self_attn.num_heads, -1)
        normed = layer.layer_norm1(features)
        q = attention.q_proj(normed[:, :1]).unflatten(-1, heads).transpose(1, 2)
        k = attention.k_proj(normed).unflatten(-1, heads).transpose(1, 2)
        v = attention.v_proj(normed).unflatten(-1, heads).transpose(1, 2)
        shares = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        seen = (shares.to(v.dtype) @ v).transpose(1, 2).flatten(2)[:, 0]  # [N, E]
        x = features[:, 0] + attention.out_proj(seen)
        out: Tensor = stack.post_layernorm(x + layer.mlp(layer.layer_norm2(x)))
        return out

    def texts(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B E"]:
        """Captions as one vector each; id 0 is padding at the end."""
        ids = ids[:, : int((ids != 0).sum(1).max())]
        framed = F.pad(self.text_embedding(ids), (0, 0, 1, 1))
        triples = torch.cat((framed[:, :-2], framed[:, 1:-1], framed[:, 2:]), dim=-1)
        mixed = F.gelu(self.text_mixer(triples))
        kept = (ids != 0).unsqueeze(-1)
        mean = (mixed * kept).sum(1) / kept.sum(1).clamp(min=1)
        out: Tensor = self.text_projection(mean)
        return out


def contrastive(
    images: Float[Tensor, "B E"], texts: Float[Tensor, "B E"], log_scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """Mean of both directions of the contrastive loss of B pairs; rows need no normalisation.

    Source: Radford et al. 2021 (CLIP), figure 3; the scale is held below 100 as there.
    """
    scale = log_scale.exp().clamp(max=100.0)
    images = F.normalize(images.float(), dim=-1)
    texts = F.normalize(texts.float(), dim=-1)
    logits = scale * images @ texts.T  # [B, B]
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def shifted(pixels: UInt8[Tensor, "C H W"], rng: np.random.Generator) -> UInt8[Tensor, "C H W"]:
    """Return the picture moved by some pixels; the edge is repeated where it leaves room."""
    height, width = pixels.shape[1:]
    down, right = (int(step) for step in rng.integers(-_SHIFT, _SHIFT + 1, size=2))
    rows = (torch.arange(height) - down).clamp(0, height - 1)
    columns = (torch.arange(width) - right).clamp(0, width - 1)
    return pixels[:, rows][:, :, columns]


def word_weights() -> Float[Tensor, " K"]:
    """How much each word of the lexicon counts."""
    last = LEXICON.index("middle")
    weights = [_OBJECT_WEIGHT if i <= last else _MARK_WEIGHT for i in range(len(LEXICON))]
    counts = [word.startswith("objects:") for word in LEXICON]
    return torch.where(torch.tensor(counts), _COUNT_WEIGHT, torch.tensor(weights))


def fit_naming_head(
    trainer: TowerTrainer,
    pixels: UInt8[Tensor, "n C H W"],
    words: NDArray[np.uint8],
    *,
    steps: int = 600,
    seed: int = 0,
) -> None:
    """Fit the head that names what lies under each patch to a tower that is trained already.

    An exported tower comes without this head; while a fresh one is fitted, the tower would be
    pulled away from what it knows.

    Args:
        trainer: its tower stays as it is.
        pixels: pictures to learn from.
        words: packed bits of `region_words` per picture, [n, P, bytes].
        steps: of Adam over random patches.
        seed: chooses the patches.
    """
    config = trainer.vision_tower.config
    with torch.no_grad():
        parts = (pixels[start : start + 64] for start in range(0, len(pixels), 64))
        seen = [trainer.vision_tower(normalise(part))[:, 1:] for part in parts]
    features = torch.cat(seen).reshape(-1, config.hidden_size)
    names = words.reshape(len(features), -1)
    head, weights = trainer.region_head, word_weights()
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        at = torch.randint(len(features), (_FITTED_PATCHES,), generator=generator)
        bits = np.unpackbits(names[at.numpy()], axis=-1, count=len(LEXICON))
        targets = torch.from_numpy(bits).float()
        loss = F.binary_cross_entropy_with_logits(head(features[at]), targets, weight=weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stub
        optimizer.step()
        schedule.step()


class Joined:
    """Several arrays that are indexed as one; none of them is read before it is asked for."""

    def __init__(self, *parts: NDArray[np.uint8]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, at: NDArray[np.int64]) -> NDArray[np.uint8]:
        out = np.empty((len(at), *self.parts[0].shape[1:]), dtype=np.uint8)
        owner = np.searchsorted(self._ends, at, side="right")
        for number, part in enumerate(self.parts):
            mine = owner == number
            start = self._ends[number] - len(part)
            out[mine] = part[at[mine] - start]
        return out


class TowerTask:
    """Pairs of pictures and captions for the loop; see `lapilli.train.trainer.loop.Task`.

    Args:
        model: what is trained.
        pixels: uint8 [n, 3, S, S]; where there are two parts the first shows crowds. Marks are
            seen twice as often, objects in crowds three times, marks in crowds six times.
        words: packed bits of `region_words` per picture, uint8 [n, P, bytes].
        captions: token ids [n, T], 0 after the end.
        run: batch size and seed.
        held_out: pictures at the end that are only for evaluation.
        fresh: the tower gets filters that whiten these pictures; False: it is trained already.
    """

    def __init__(
        self,
        model: TowerTrainer,
        *,
        pixels: Joined,
        words: NDArray[np.uint8],
        captions: NDArray[np.int64],
        run: RunRecipe,
        held_out: int = 512,
        fresh: bool = True,
    ) -> None:
        self.model = model
        self._pixels, self._words, self._captions = pixels, words, captions
        self._run = run
        self._num_trained = len(pixels) - held_out
        trained = np.arange(self._num_trained)
        marked = self._is_mark(trained)
        crowds = trained[: len(pixels.parts[0])] if len(pixels.parts) > 1 else trained[:0]
        in_crowds = marked[: len(crowds)]
        again = [trained[marked], *[crowds[~in_crowds]] * 2, *[crowds[in_crowds]] * 4]
        self._order = np.concatenate((trained, *again))
        self._num_crowds = len(crowds)
        if fresh:
            model.start_from(torch.from_numpy(pixels[np.arange(_WHITENED)]))

    def batch(self, step: int, micro: int) -> tuple[dict[str, Tensor], int]:
        """Pictures drawn without repetition within an epoch."""
        run = self._run
        number = step * run.gradient_accumulation_steps + micro
        places = draw_indices(len(self._order), run.batch_size, number, seed=run.seed)
        at = self._order[places]
        batch = self._gather(at)
        rng = np.random.default_rng([run.seed, number, 31])
        for row in np.flatnonzero(self._fills_its_picture(at)):
            batch["pixels"][row] = shifted(batch["pixels"][row], rng)
        return batch, len(at)

    def _fills_its_picture(self, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pictures show one large word, number or digit, whose place is not learned.

        What is told of the patches of small type would be wrong for a picture that was moved.
        """
        words = np.unpackbits(self._words[at], axis=-1, count=len(LEXICON))
        columns = [LEXICON.index(name) for name in MARKS]
        covered = words[:, :, columns].any(-1).mean(-1)
        large: NDArray[np.bool_] = (covered >= _LARGE_SHARE) & (at >= self._num_crowds)
        return large

    def _is_mark(self, at: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pictures show writing or a digit, which have no place of their own."""
        packed = np.bitwise_or.reduce(self._words[at], axis=1)
        words = np.unpackbits(packed, axis=-1, count=len(LEXICON))
        columns = [LEXICON.index(name) for name in MARKS]
        marked: NDArray[np.bool_] = words[:, columns].sum(-1) > 0
        return marked

    def _gather(self, at: NDArray[np.int64]) -> dict[str, Tensor]:
        words = np.unpackbits(self._words[at], axis=-1, count=len(LEXICON))
        return {
            "pixels": torch.from_numpy(self._pixels[at]),
            "words": torch.from_numpy(words),
            "captions": torch.from_numpy(self._captions[at]),
        }

    def loss(self, batch: Any) -> Loss:  # noqa: ANN401  the protocol's type
        """Names of what lies under each patch, and which caption belongs to which picture."""
        features, images = self.model.images(batch["pixels"])
        logits = self.model.region_head(features[:, 1:]).float()
        naming = F.binary_cross_entropy_with_logits(
            logits, batch["words"].float(), weight=word_weights(), reduction="sum"
        )
        naming = naming / logits.shape[1]
        texts = self.model.texts(batch["captions"])
        matching = contrastive(images, texts, self.model.log_scale) * len(images)
        parts = {"naming": naming.item(), "matching": matching.item()}
        return Loss(naming + _CONTRASTIVE_WEIGHT * matching, parts)

    def evaluate(self) -> Mapping[str, float]:
        """Shares of objects whose central patch is named rightly, and of marks read rightly."""
        hits: dict[str, list[float]] = {}
        for start in range(self._num_trained, len(self._pixels), 64):
            batch = self._gather(np.arange(start, min(start + 64, len(self._pixels))))
            features, _ = self.model.images(batch["pixels"])
            logits = self.model.region_head(features[:, 1:]).float()
            _count_hits(logits, batch["words"].bool(), hits)
        return {name: round(float(np.mean(v)), 4) for name, v in hits.items() if v}


def _count_hits(
    logits: Float[Tensor, "N P K"], words: Tensor, hits: dict[str, list[float]]
) -> None:
    index = {word: i for i, word in enumerate(LEXICON)}
    middle = words[:, :, index["middle"]]
    groups = {
        "colour": COLOURS,
        "shape": SHAPES,
        "size": SIZES,
        "place": tuple(LEXICON[index[SIZES[-1]] + 1 : index["middle"]]),
    }
    for name, members in groups.items():
        columns = [index[word] for word in members]
        truth, guess = words[middle][:, columns].int(), logits[middle][:, columns]
        single = truth.sum(-1) == 1  # two objects may share a patch
        right = truth[single].argmax(-1) == guess[single].argmax(-1)
        hits.setdefault(name, []).extend(right.float().tolist())
    found = (logits[:, :, index["middle"]] > 0) == middle
    hits.setdefault("all_middles", []).extend(found.all(-1).float().tolist())
    for name, start, kind in _MARKS:
        columns = [i for i, word in enumerate(LEXICON) if word.startswith(start)]
        under = words[:, :, columns].any(-1) & words[:, :, index[kind]]  # [N, P]
        shown = under.any(1)
        share = under[shown].float() / under[shown].sum(1, keepdim=True)
        guess = torch.einsum("np,npk->nk", share, logits[shown][:, :, columns])
        truth = (words[shown][:, :, columns] & under[shown][:, :, None]).any(1)
        right = truth.gather(1, guess.argmax(-1, keepdim=True))
        hits.setdefault(name, []).extend(right.float().flatten().tolist())
