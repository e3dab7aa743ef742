"""Stage 1 of pebble: a CLIP tower from pictures and captions; knows pools, regions and the tower, no language model.

    pixels -> tower -> hidden state before the last -> words of every patch             (captioning, by region)
                    -> last layer, class token      -> the picture's caption            (contrastive)

The hidden state that LLaVA selects is the one that learns to name what lies under each patch; the last layer only
serves the contrastive term, as in CLIP.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from lapilli.config.model import VisionConfig
from lapilli.modality.image.vision import VisionTransformer
from lapilli.shapes import Float, Int, Tensor, UInt8
from lapilli.train.initialise import initialise
from lapilli.train.loop import Loss
from lapilli.train.loss import contrastive
from lapilli.train.order import draw_indices
from lapilli.train.pebble.palette import COLOURS
from lapilli.train.pebble.regions import LEXICON
from lapilli.train.pebble.scene import SHAPES, SIZES
from lapilli.train.recipe import RunRecipe

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CONTRASTIVE_WEIGHT = 0.2


def normalise(pixels: UInt8[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
    """Pixels 0 to 255 as CLIP's towers read them."""
    mean = torch.tensor(CLIP_MEAN)[:, None, None]
    std = torch.tensor(CLIP_STD)[:, None, None]
    return (pixels.float() / 255.0 - mean) / std


class TowerTrainer(nn.Module):
    """The tower with the two heads that only its training needs."""

    def __init__(self, config: VisionConfig, vocab_size: int, seed: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.vision_tower = VisionTransformer(config)
        self.region_head = nn.Linear(width, len(LEXICON))
        self.text_embedding = nn.Embedding(vocab_size, width)
        self.text_mixer = nn.GRU(width, width, batch_first=True)
        self.image_projection = nn.Linear(width, width, bias=False)
        self.text_projection = nn.Linear(width, width, bias=False)
        initialise(self, seed, depth=config.num_layers)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def images(
        self, pixels: UInt8[Tensor, "N C H W"]
    ) -> tuple[Float[Tensor, "N P E"], Float[Tensor, "N E"]]:
        """The selected hidden state with its class token, and the picture as one vector."""
        features = self.vision_tower(normalise(pixels))
        stack = self.vision_tower.vision_model
        last = stack.post_layernorm(stack.encoder.layers[-1](features)[:, 0])
        return features, self.image_projection(last)

    def texts(self, ids: Int[Tensor, "B T"]) -> Float[Tensor, "B E"]:
        """Captions as one vector each; id 0 is padding at the end."""
        embedded = self.text_embedding(ids)
        mixed, _ = self.text_mixer(embedded)
        kept = (ids != 0).unsqueeze(-1)
        mean = (mixed * kept).sum(1) / kept.sum(1).clamp(min=1)
        out: Tensor = self.text_projection(mean)
        return out


class TowerTask:
    """Pairs of pictures and captions for the loop; see `lapilli.train.loop.Task`.

    Args:
        model: what is trained.
        pixels: uint8 [n, 3, S, S].
        words: packed bits of `region_words` per picture, uint8 [n, P, bytes].
        captions: token ids [n, T], 0 after the end.
        run: batch size and seed.
        held_out: pictures at the end that are only for evaluation.

    """

    def __init__(
        self,
        model: TowerTrainer,
        *,
        pixels: NDArray[np.uint8],
        words: NDArray[np.uint8],
        captions: NDArray[np.int64],
        run: RunRecipe,
        held_out: int = 512,
    ) -> None:
        self.model = model
        self._pixels, self._words, self._captions = pixels, words, captions
        self._run = run
        self._num_trained = len(pixels) - held_out

    def batch(self, step: int, micro: int) -> tuple[dict[str, Tensor], int]:
        """Pictures drawn without repetition within an epoch."""
        run = self._run
        at = draw_indices(
            self._num_trained, run.batch_size, step * run.accumulate + micro, seed=run.seed
        )
        return self._gather(at), len(at)

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
        naming = F.binary_cross_entropy_with_logits(logits, batch["words"].float(), reduction="sum")
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
        return {name: round(float(np.mean(values)), 4) for name, values in hits.items()}


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
    for name, prefixes in (
        ("word", ("word:",)),
        ("number", ("tens:", "units:")),
        ("digit", ("digit:",)),
    ):
        columns = [i for i, word in enumerate(LEXICON) if word.startswith(prefixes)]
        kind = words[:, 0, index["handwritten" if name == "digit" else name]]
        right = ((logits.mean(1)[:, columns] > 0) == words[:, 0][:, columns]).all(-1)
        hits.setdefault(name, []).extend(right[kind].float().tolist())
