"""Scenes drawn ahead of time, in parallel, into a folder; knows files and processes, no model.

    pool.json                what was drawn, compared when the pool is opened again
    pixels.npy               uint8 [n, 3, S, S], memory-mapped
    samples-00000.jsonl      per shard: one line per scene with its caption and its conversation

A shard's lines are renamed into place after its pixels: what is there is complete, and an
interrupted run goes on with the shards that are missing. Scene i has the seed first_seed + i,
whatever the number of workers.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lapilli.errors import ConfigError
from pebble.caption import caption
from pebble.conversation import conversation
from pebble.draw import draw, model_pixels
from pebble.scene import Scene
from pebble.typed import wide_scene

SHARD: Final = 1024
WORLD: Final = 3  # raise when the same seed gives another picture or other questions


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSpec:
    """What a pool holds.

    Attributes:
        first_seed: seed of scene 0.
        num_scenes: how many.
        side: pixels of the square that the model sees.
        crowds: many scenes hold more objects than pebble is asked about, see `wide_scene`.
        world: `WORLD` when it was drawn.
        shard: scenes of one file of samples.
    """

    first_seed: int
    num_scenes: int
    side: int
    crowds: bool = False
    world: int = WORLD
    shard: int = SHARD

    def __post_init__(self) -> None:
        if self.num_scenes < 1 or self.side < 16 or self.first_seed < 0:
            raise ConfigError(
                f"a pool needs 1 or more scenes, 16 or more pixels, a seed of 0 or more; got {self}"
            )

    def scene(self, seed: int) -> Scene:
        """Return the scene that a pool of this kind holds for the seed."""
        return wide_scene(seed, crowds=self.crowds)

    @property
    def num_shards(self) -> int:
        """Files of samples."""
        return -(-self.num_scenes // self.shard)


def draw_pool(folder: Path, spec: PoolSpec, *, workers: int = 2) -> "Pool":
    """Return the pool in this folder, drawn as far as it is missing.

    Raises:
        ConfigError: the folder holds another pool.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _claim(folder, spec)
    todo = [shard for shard in range(spec.num_shards) if not _lines(folder, shard).exists()]
    if workers <= 1 or len(todo) <= 1:
        for shard in todo:
            draw_shard(folder, spec, shard)
    else:
        context = get_context("spawn")  # a fork of a process with torch's threads may hang
        with ProcessPoolExecutor(max_workers=workers, mp_context=context) as processes:
            jobs = [processes.submit(draw_shard, folder, spec, shard) for shard in todo]
            for job in jobs:
                job.result()
    return Pool(folder)


def _claim(folder: Path, spec: PoolSpec) -> None:
    note = folder / "pool.json"
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if {"crowds": False, "shard": SHARD, **found} != asdict(spec):
            raise ConfigError(
                f"{folder} holds another pool: {found}, wanted {asdict(spec)}; use an empty folder"
            )
        return
    shape = (spec.num_scenes, 3, spec.side, spec.side)
    np.lib.format.open_memmap(folder / "pixels.npy", mode="w+", dtype=np.uint8, shape=shape).flush()
    note.write_text(json.dumps(asdict(spec)), encoding="utf-8")


def _lines(folder: Path, shard: int) -> Path:
    return folder / f"samples-{shard:05d}.jsonl"


def draw_shard(folder: Path, spec: PoolSpec, shard: int) -> None:
    """Draw one shard's pixels and samples."""
    pixels = np.lib.format.open_memmap(folder / "pixels.npy", mode="r+")
    start = shard * spec.shard
    lines = []
    for i in range(start, min(start + spec.shard, spec.num_scenes)):
        seed = spec.first_seed + i
        scene = spec.scene(seed)
        pixels[i] = model_pixels(draw(scene), spec.side)
        sample = conversation(scene, np.random.default_rng([seed, 17]))
        lines.append(json.dumps({**sample, "caption": caption(scene)}))
    pixels.flush()
    unfinished = _lines(folder, shard).with_suffix(".part")
    unfinished.write_text("\n".join(lines) + "\n", encoding="utf-8")
    unfinished.replace(_lines(folder, shard))


class Pool:
    """A drawn pool; `pixels` is uint8 [n, 3, S, S] and read from disk as needed."""

    def __init__(self, folder: Path) -> None:
        """Open the pool in the folder."""
        self.folder = folder
        self.spec = PoolSpec(**json.loads((folder / "pool.json").read_text(encoding="utf-8")))
        self.pixels: NDArray[np.uint8] = np.load(folder / "pixels.npy", mmap_mode="r")

    def __len__(self) -> int:
        return self.spec.num_scenes

    def seed(self, index: int) -> int:
        """Seed of the scene, from which fresh questions can be drawn at any time."""
        return self.spec.first_seed + index

    def samples(self) -> Iterator[dict[str, Any]]:
        """Every scene's sample with its caption, in order."""
        for shard in range(self.spec.num_shards):
            with _lines(self.folder, shard).open(encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)
