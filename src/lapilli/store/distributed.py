"""Encoding on several processes or machines: Ray Data hands out texts, one process writes.

    items --those that have to be encoded--> Arrow tables --workers, an encoder each--> the writer

A worker that dies is started again and its batch is encoded once more; where the writing process
dies, what it had committed stays, and another run goes on. Texts and vectors lie in Ray's object
store meanwhile, which spills to disk. Needs the extra "ray".

Knows texts and encoders; must not know how a checkpoint is loaded, which is the caller's function.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lapilli.cluster import Share, check_room, connect
from lapilli.config.reader import shown
from lapilli.errors import LapilliError, PromptError, StoreError
from lapilli.store.encode import Encoded, TextEncoder, fill, needed_items
from lapilli.store.writer import StoreWriter

BATCH = 256
"""Texts that a worker gets at once."""
_TABLE = 1 << 14  # items that become one table, and one entry of Ray's object store
MakeEncoder = Callable[[], TextEncoder]
Columns = dict[str, Any]


def build_store_distributed(
    path: str | Path,
    items: Iterable[tuple[str | int, str]],
    encoder: TextEncoder,
    make_encoder: MakeEncoder,
    *,
    workers: int,
    gpus: float = 0.0,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Encode items into a store on several processes; see `lapilli.store.encode.build_store`.

    Where `ray.init` was not called, it is: the environment variable RAY_ADDRESS names a cluster
    that runs; without it one begins on this machine and ends with this process.

    Args:
        path: of the store; made where there is none.
        items: ids and texts.
        encoder: what reads the texts; here for its sizes and fingerprint alone.
        make_encoder: makes the same in every worker, on one thread.
        workers: processes that encode, one core each.
        gpus: of each worker.
        dtype: number format; None: that of the store, or float16.
        progress: called with how many items are done.

    Raises:
        ConfigError: Ray is not installed, or it has fewer cores or GPUs than the workers need.
        StoreError: see StoreWriter; or a worker made another encoder, such as of older files.
        PromptError: see `TextEncoder.encode`.
    """
    ray = connect()
    check_room(ray, Share(gpus=gpus), workers)

    def encoded(writer: StoreWriter) -> Iterator[Encoded]:
        refs, done, total = [], 0, 0
        for ids, texts, total in needed_items(writer, items, chunk_size=_TABLE):  # noqa: B007
            if ids:
                refs.append(ray.put(_table(ids, texts)))
                done -= len(ids)
        done += total
        if not refs:
            yield Encoded([], [], torch.empty(0, encoder.tokens, encoder.width), done)
            return
        batches = ray.data.from_arrow_refs(refs).map_batches(
            _Worker,
            fn_constructor_args=(make_encoder, encoder.fingerprint),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=BATCH,
            num_cpus=1,
            num_gpus=gpus,
        )
        for batch in batches.iter_batches(batch_size=None, batch_format="numpy"):
            _check(batch)
            done += len(batch["id"])
            vectors = torch.from_numpy(np.array(batch["vectors"]))
            yield Encoded(batch["id"].tolist(), batch["text"].tolist(), vectors, done)

    return fill(path, encoder, encoded, dtype=dtype, progress=progress)


class _Worker:
    """An encoder in a process of Ray's."""

    def __init__(self, make_encoder: MakeEncoder, fingerprint: str) -> None:
        torch.set_num_threads(1)
        self._encoder = make_encoder()
        found = self._encoder.fingerprint
        self._other = "" if found == fingerprint else f"expected {fingerprint}, found {found}"

    def __call__(self, batch: Columns) -> Columns:
        """Add the vectors of a batch, or what is wrong with it.

        What is wrong is handed over as text: Ray would wrap an exception in its own, with the
        worker's traceback.
        """
        ids, texts = batch["id"].tolist(), batch["text"].tolist()
        shape = (len(ids), self._encoder.tokens, self._encoder.width)
        wrong, other, vectors = "", self._other, np.zeros(shape, np.float32)
        if not other:
            try:
                names = [f"item {shown(one)}" for one in ids]
                vectors = self._encoder.encode(texts, names=names).numpy()
            except LapilliError as error:
                wrong = str(error)
        said = {"wrong": np.array([wrong] * len(ids)), "other": np.array([other] * len(ids))}
        return {**batch, "vectors": vectors, **said}


def _check(batch: Columns) -> None:
    """Raise what a worker found wrong."""
    for other in filter(None, batch["other"]):
        raise StoreError(
            f"a worker of Ray has another encoder: {other}; give every machine the same files"
        )
    for wrong in filter(None, batch["wrong"]):
        raise PromptError(wrong)


def _table(ids: list[str | int], texts: list[str]) -> Any:  # noqa: ANN401 - pyarrow has no types
    import pyarrow

    return pyarrow.table({"id": [str(one) for one in ids], "text": texts})
