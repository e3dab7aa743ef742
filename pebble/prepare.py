"""Everything that pebble's stages read, made once into a folder.

    work/tokenizer.model
    work/{scenes,crowds}/pool/            see pool.py
    work/{scenes,crowds}/regions.npy      uint8 [n, P, bytes]     packed bits of region_words
    work/{scenes,crowds}/captions.npy     int64 [n, T]            token ids, 0 after the end

Every file is written aside and renamed, so an interrupted run goes on where it stopped.
"""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from lapilli.prompt.template import TEMPLATES
from pebble.caption import caption
from pebble.pool import PoolSpec, draw_pool
from pebble.regions import region_words
from pebble.words import corpus, train_tokenizer

_CORPUS_SEED: Final = 2_000_000_000
_CORPUS_LINES: Final = 6_000
_SYSTEM_LINES: Final = 1_500  # the system sentence stands before every prompt: few pieces
_CHUNK: Final = 2048
_CAPTION_LENGTH: Final = 64


def prepare_tokenizer(path: Path) -> None:
    """Write the tokenizer.model, if it is not there yet."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".part")
    system = repeat(f"{TEMPLATES['vicuna_v1'].system} USER: ASSISTANT:", _SYSTEM_LINES)
    train_tokenizer(chain(corpus(_CORPUS_SEED, _CORPUS_LINES), system), staged)
    staged.replace(path)


def prepare_pool(
    folder: Path, spec: PoolSpec, patches: int, *, tokenizer: Path, workers: int
) -> None:
    """Pictures, region words and caption ids of a pool, as far as they are missing.

    Args:
        folder: where they go.
        spec: the pool.
        patches: patches of one row of a picture.
        tokenizer: a tokenizer.model.
        workers: processes.
    """
    draw_pool(folder / "pool", spec, workers=workers)
    starts = range(spec.first_seed, spec.first_seed + spec.num_scenes, _CHUNK)
    if not (folder / "captions.npy").exists():
        context = get_context("spawn")
        with ProcessPoolExecutor(max_workers=workers, mp_context=context) as processes:
            jobs = [processes.submit(_chunk, seed, spec, patches, tokenizer) for seed in starts]
            parts = [job.result() for job in jobs]
        _write(folder / "regions.npy", np.concatenate([words for words, _ in parts]))
        _write(folder / "captions.npy", np.concatenate([ids for _, ids in parts]))


def _write(path: Path, array: NDArray[np.generic]) -> None:
    staged = path.with_suffix(".part")
    with staged.open("wb") as file:
        np.save(file, array)
    staged.replace(path)


def _chunk(
    first_seed: int, spec: PoolSpec, patches: int, tokenizer: Path
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Region words and caption ids of up to _CHUNK scenes."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    words, captions = [], []
    for seed in _seeds(first_seed, spec):
        scene = spec.scene(seed)
        words.append(np.packbits(region_words(scene, patches).reshape(patches**2, -1), axis=-1))
        ids = pieces.encode(caption(scene))[:_CAPTION_LENGTH]
        captions.append(ids + [0] * (_CAPTION_LENGTH - len(ids)))
    return np.stack(words), np.array(captions, dtype=np.int64)


def _seeds(first_seed: int, spec: PoolSpec) -> Iterator[int]:
    yield from range(first_seed, min(first_seed + _CHUNK, spec.first_seed + spec.num_scenes))
