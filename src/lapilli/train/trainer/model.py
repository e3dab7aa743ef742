"""Model in training: a vision language model from a batch to its summed loss; knows no files.

    media --tower, projector--> features --noise--> fuse over the text, or remember beside it
          --noise--> layers
          --> hidden states where something is predicted --> logits --> cross entropy

A module, so that FSDP2 can wrap it. What a stage does not train is computed without gradients and
in evaluation mode. Its loss and the noise on its embeddings (NEFTune) are functions of tensors.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli.errors import UnsupportedModelError
from lapilli.lm import Memory
from lapilli.modality.image.image import ImageModality
from lapilli.model import VisionLanguageModel, fuse, remember
from lapilli.nn.kv_cache import Segments, uncompiled_segments
from lapilli.nn.linear import rounded
from lapilli.shapes import Bool, Float, Int, Tensor
from lapilli.train.recipe import NoiseRecipe
from lapilli.train.trainer.task import Loss, TrainingBatch


def cross_entropy_sum(
    logits: Float[Tensor, "M V"], targets: Int[Tensor, " M"]
) -> Float[Tensor, ""]:
    """Return the sum of the negative log likelihoods of the targets, in float32."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def supervised(
    input_ids: Int[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]
) -> tuple[Bool[Tensor, "B T"], Int[Tensor, " M"]]:
    """Return the positions whose next token counts, and those next tokens.

    A position predicts its successor, so the mask moves one to the left and the last position never
    counts.
    """
    where = torch.zeros_like(loss_mask)
    where[:, :-1] = loss_mask[:, 1:]
    return where, input_ids[:, 1:][loss_mask[:, 1:]]


def scores(
    head: Callable[[Tensor], Float[Tensor, "R V"]], hidden: Float[Tensor, "M D"]
) -> Float[Tensor, "M V"]:
    """Return what a head makes of M states.

    M is another in every batch, so the head sees R, `rounded`, of them: it takes each by itself.
    """
    count = len(hidden)
    return head(F.pad(hidden, (0, 0, 0, rounded(count) - count)))[:count]


def noisy(vectors: Float[Tensor, "n D"], alpha: float) -> Float[Tensor, "n D"]:
    """Add noise of size `alpha` to the vectors of one sample or picture."""
    size: float = alpha / vectors.numel() ** 0.5
    return vectors + (torch.rand_like(vectors) * 2 - 1) * size


def noisy_samples(
    vectors: Float[Tensor, "B T D"], segments: Sequence[Sequence[int]], alpha: float
) -> Float[Tensor, "B T D"]:
    """Add noise to every sample, and none to the padding after the last.

    `segments` has the lengths of the samples of every sequence.
    """
    size = torch.zeros(vectors.shape[:2])
    for row, lengths in enumerate(segments):
        start = 0
        for length in lengths:
            size[row, start : start + length] = alpha / (length * vectors.shape[2]) ** 0.5
            start += length
    size = size.to(vectors.device, vectors.dtype)
    return vectors + (torch.rand_like(vectors) * 2 - 1) * size[..., None]


class TrainedModel(nn.Module):
    """A `VisionLanguageModel` in training; its parameters carry `vlm.` before their names.

    Args:
        vlm: what is trained; `stages.choose_trainable` has marked which parts of it.
        noise: noise on embeddings while training.
        z_loss: weight of the squared log of the softmax's denominator.
        compiles: whether its layers are compiled.

    Source: LLaVA (arXiv 2304.08485) section 4.2; the loss of the answers alone.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        *,
        noise: NoiseRecipe | None = None,
        z_loss: float = 0.0,
        compiles: bool = False,
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.noise = noise or NoiseRecipe()
        self.z_loss = z_loss
        self._segments = uncompiled_segments() if compiles else Segments
        self.train(self.training)

    def train(self, mode: bool = True) -> "TrainedModel":
        """Set the mode of what is trained; frozen encoders stay in evaluation mode."""
        super().train(mode)
        for modality in self.vlm.modalities.values():
            for name in ("vision_tower", "encoder"):
                part = getattr(modality, name, None)
                if isinstance(part, nn.Module) and not _learns(part):
                    part.eval()
        return self

    def forward(self, batch: TrainingBatch) -> Loss:
        """Return the summed loss of the batch's supervised tokens.

        What is random in it (noise, dropout) comes from torch's own generators, which the loop
        seeds for every micro-batch.
        """
        hidden = self.hidden(batch)
        where, targets = supervised(
            batch.input_ids.to(hidden.device), batch.loss_mask.to(hidden.device)
        )
        return self.loss_of(hidden[where], targets, batch)

    def loss_of(
        self, hidden: Float[Tensor, "M D"], targets: Int[Tensor, " M"], batch: TrainingBatch
    ) -> Loss:
        """Return the summed loss of M positions of the batch that predict M tokens."""
        logits = self.logits(hidden)
        return self.with_z_loss(Loss(cross_entropy_sum(logits, targets)), logits)

    def logits(self, hidden: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        """Return the scores of every vocabulary entry."""
        return scores(self.vlm.logits, hidden)

    def with_z_loss(self, loss: Loss, logits: Float[Tensor, "M V"]) -> Loss:
        """Add, while training, what holds the softmax's denominator near 1."""
        if not (self.z_loss and self.training):
            return loss
        z = self.z_loss * torch.logsumexp(logits.float(), dim=-1).square().sum()
        parts = {"answers": loss.total.detach(), **loss.parts, "z": z.detach()}
        return Loss(loss.total + z, parts)

    def hidden(self, batch: TrainingBatch) -> Float[Tensor, "B T D"]:
        """Return the hidden states of every position after the final norm.

        Raises:
            UnsupportedModelError: packed sequences for a language model of another library.
        """
        language_model = self.vlm.language_model
        packed = batch.is_packed
        if packed and not language_model.supports_varlen:
            raise UnsupportedModelError(
                "a language model of transformers cannot read packed rows: set data.pack = false"
            )
        embeds, memory = self._embeds(batch)
        return language_model.forward(
            embeds,
            position_ids=batch.position_ids.to(embeds.device),
            cache=self._segments(batch.segments) if packed else None,
            memory=memory,
        )

    def _embeds(self, batch: TrainingBatch) -> tuple[Float[Tensor, "B T D"], Memory | None]:
        """Return text and media as vectors, in the autocast's width where there is one.

        And the features beside the rows, if only one that nobody sees where blocks have to be
        called: see `_seen`.
        """
        device = self.vlm.device
        text = self.vlm.language_model.embed(batch.input_ids.to(device))
        if torch.is_autocast_enabled(device.type):
            # A residual stream of half the width: a fifth faster on a CPU.
            text = text.to(torch.get_autocast_dtype(device.type))
        # Before the language model, and modality after modality: in pieces all processes put the
        # same layer together at the same time, forwards and backwards.
        features, idle = self._seen(batch)
        alpha = self.noise.alpha if self.training else 0.0
        if alpha and self.noise.on == "image":
            features = [noisy(item, alpha) for item in features]
        fused = fuse(text, features, batch.spans) + idle
        memory = remember(text, features, batch.spans, batch.ends)
        if memory is None and self.vlm.attended and (self.training or self._is_sharded):
            memory = Memory.of_rows([], [], rows=len(text), like=text)
        if alpha and self.noise.on == "all":
            fused = noisy_samples(fused, batch.segments, alpha)
        return fused, memory

    def _seen(self, batch: TrainingBatch) -> tuple[list[Float[Tensor, "_ D"]], Tensor | float]:
        """Return the features of every item, and zero.

        The zero has a zero gradient for every trained part that the batch does not reach. Processes
        that train together exchange the gradients of all parameters in every step; one without a
        picture would be waited for for ever.
        """
        names = [span.modality for span in batch.spans]
        for name in names:
            self.vlm.modality(name)  # refuses one that the model does not have
        found: dict[int, Tensor] = {}
        idle: Tensor | float = 0.0
        for name, modality in self.vlm.modalities.items():
            places = [i for i, other in enumerate(names) if other == name]
            items = [batch.media[i] for i in places]
            if places:
                found.update(zip(places, self._features(modality, items), strict=True))
            if self.training or self._is_sharded:
                is_image = isinstance(modality, ImageModality)
                reached = any(is_image or not isinstance(item, Tensor) for item in items)
                idle = idle + self._touch(modality, reached=reached)
        return [found[i] for i in range(len(names))], idle

    def _features(self, modality: nn.Module, items: Sequence[object]) -> list[Float[Tensor, "_ D"]]:
        """Return the projected features of a modality's items, which it sees at once.

        Tensors stand for what a tower made earlier and go through the projector alone; for other
        modalities they are features, such as the entries of a store, and stand as they are.
        """
        is_image = isinstance(modality, ImageModality)
        ready = [item for item in items if not isinstance(item, Tensor)]
        made: Iterator[Tensor] = iter(())
        if ready:
            made = iter(self._pictures(modality, ready) if is_image else modality.embed(ready))  # type: ignore[arg-type,operator]  # see Modality
        given = modality.projector if is_image else nn.Identity()
        return [
            given(item.to(self.vlm.device))  # type: ignore[operator]  # a module
            if isinstance(item, Tensor)
            else next(made)
            for item in items
        ]

    def _pictures(self, image: ImageModality, items: Sequence[object]) -> list[Tensor]:
        """Embed pictures, with the tower outside of the graph where it is frozen."""
        pixels = torch.cat([item.pixel_values for item in items])  # type: ignore[attr-defined]  # PreparedImage
        with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(image.vision_tower)):
            # In pieces all processes put each layer together at once, so all call it equally often.
            seen = (
                image.vision_tower(pixels.to(self.vlm.device))
                if self._is_sharded
                else image.tower_features(pixels)
            )
        projected = image.projector(seen)
        tiles = projected.split([len(item.pixel_values) for item in items])  # type: ignore[attr-defined]  # see above
        return [image.merge(part, item) for part, item in zip(tiles, items, strict=True)]  # type: ignore[arg-type]  # see above

    @property
    def _is_sharded(self) -> bool:
        return isinstance(self, FSDPModule)

    def _touch(self, modality: nn.Module, *, reached: bool) -> Tensor | float:
        """Return zero, with a zero gradient for what a batch does not reach of a modality."""
        total: Tensor | float = 0.0
        newline = getattr(modality, "image_newline", None)
        if newline is not None and newline.requires_grad:
            total = newline.sum() * 0.0
        if not reached and (_learns(modality) or self._is_sharded):
            total = total + self._of_nothing(modality).float().sum() * 0.0
        return total

    def _of_nothing(self, modality: nn.Module) -> Tensor:
        """Return what a modality makes of nothing: its `blank` item, else of its parameters.

        Of pictures it is what the projector, and a tower that learns or is sharded, make of zeros.
        """
        device = self.vlm.device
        if not isinstance(modality, ImageModality):
            blank = getattr(modality, "blank", None)
            if blank is None:
                sums = [p.float().sum() for p in modality.parameters() if p.requires_grad]
                return torch.stack(sums) if sums else torch.zeros(1, device=device)
            found: Tensor = modality.embed([blank()])[0]  # type: ignore[operator]  # every modality embeds
            return found
        vision, tower = modality.vision, modality.vision_tower
        seen = torch.zeros(1, vision.num_patches, vision.hidden_size, device=device)
        if _learns(tower) or self._is_sharded:
            side = vision.image_size
            pixels = torch.zeros(1, vision.num_channels, side, side, device=device)
            with torch.set_grad_enabled(torch.is_grad_enabled() and _learns(tower)):
                seen = tower(pixels)
        weight = next(modality.projector.parameters(), None)
        projected: Tensor = modality.projector(seen if weight is None else seen.to(weight.dtype))
        return projected


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
