"""A checkpoint with another projector, as a student that leaves its teacher's picture shorter.

    pebble --mlp2x_gelu: 64 positions--> --pool2x2_mlp2x_gelu: 16 positions, the same weights-->

Knows checkpoints; trains nothing.
"""

from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.placement import STORED
from lapilli.checkpoint.read.assemble import build_model
from lapilli.config.projector import parse_projector
from lapilli.errors import ConfigError
from lapilli.modality.image.image import ImageModality
from lapilli.modality.projector import build_projector


def reproject(source: str, out: Path, *, projector: str, seed: int = 0) -> tuple[str, ...]:
    """Write the checkpoint with this projector.

    Weights of the old projector are kept where all of them fit (an mlp and the pooled one have the
    same); otherwise the projector is fresh and wants an `align` stage.

    Args:
        source: a LLaVA checkpoint.
        out: the new directory; its name should contain "llava".
        projector: a name such as "pool2x2_mlp2x_gelu" or "resampler144".
        seed: of fresh weights.

    Returns:
        Names of the fresh parameters; none where the old ones were kept.

    Raises:
        ConfigError: a text model, or a projector that this tower cannot have.
        CheckpointError: the directory is there already.
    """
    loaded = load_checkpoint(source, device="cpu", dtype=STORED)
    config = loaded.config
    if config.vision is None or config.image is None or config.projector is None:
        raise ConfigError(f"{source} reads text only: it has no projector to replace")
    if config.layout != "llava":
        raise ConfigError(
            f"{source} has Hugging Face's layout, which cannot say {projector!r}: save it in the "
            "original's first (lapilli export)"
        )
    wanted = parse_projector(
        projector,
        vision_size=config.vision.hidden_size,
        hidden_size=config.text.hidden_size,
    )
    config = replace(config, projector=wanted)
    build_model(config)  # refuses what this tower or this merge cannot have
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = build_projector(wanted, config.vision)
    image = cast("ImageModality", loaded.model.modality("image"))
    old = image.projector.state_dict()
    new = fresh.state_dict()
    fits = {n: t.shape for n, t in old.items()} == {n: t.shape for n, t in new.items()}
    if fits:
        fresh.load_state_dict(old)
    image.projector = fresh.to(
        next(iter((*image.projector.parameters(), *loaded.model.parameters()))).dtype
    )
    save_loaded(out, loaded, config=config)
    return () if fits else tuple(new)
