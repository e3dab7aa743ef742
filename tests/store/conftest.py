"""Small stores, and processes that die at a chosen step of writing one."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lapilli.store import StoreWriter


def vectors_of(number: int, tokens: int = 1, width: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, tokens, width, generator=generator).half().float()


def write(path: Path, ids, vectors, texts=None, *, encoder: str = "enc-1", **options) -> None:
    with StoreWriter(path, encoder=encoder, **options) as writer:
        writer.add(ids, vectors, texts)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A store of a, b and c, of one vector of four numbers each."""
    path = tmp_path / "store"
    write(path, ["a", "b", "c"], vectors_of(3), ["text a", "text b", "text c"])
    return path


def die_at(step: int, work: Callable[..., None], *arguments: object) -> None:
    """Run, and be killed before the flush, rename or removal of this number."""
    done = 0

    def counted(function):
        def call(*given, **named):
            nonlocal done
            if done == step:
                os.kill(os.getpid(), signal.SIGKILL)
            done += 1
            return function(*given, **named)

        return call

    os.fsync = counted(os.fsync)
    Path.replace = counted(Path.replace)
    Path.unlink = counted(Path.unlink)
    work(*arguments)
