"""What a store of embeddings costs: build, open, one id, 250 ids, bytes; beside it, LMDB.

    python -m benchmarks.store                          100,000 x 1,024 and 10,000,000 x 64, float16
    PYTHONPATH=PLACE python -m benchmarks.store         with LMDB: pip install --target PLACE lmdb

Ids are texts, drawn at random before every lookup; files are warm in the page cache. Lookups are
counted in the time of the thread, which other programs do not lengthen. LMDB gives the
same vectors in float32 too: its rows are joined, and converted by torch.
"""

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import RESULTS, machine
from lapilli.store import Store, StoreWriter

ASKED = 250
DRAWS = 200
PIECE = 50_000
LARGEST_OF_LMDB = 1_000_000


def pieces(entries: int, width: int) -> Iterator[tuple[list[str], torch.Tensor]]:
    """Ids and vectors, a piece at a time."""
    vectors = torch.randn(PIECE, width, generator=torch.Generator().manual_seed(0)).half()
    for start in range(0, entries, PIECE):
        count = min(PIECE, entries - start)
        yield [f"item-{number}" for number in range(start, start + count)], vectors[:count]


def draws(entries: int, count: int) -> list[list[str]]:
    """Ids of many lookups."""
    source = random.Random(1)
    return [[f"item-{source.randrange(entries)}" for _ in range(count)] for _ in range(DRAWS)]


def median_us(look: Callable[[Any], Any], asked: list[Any]) -> float:
    """Microseconds of a lookup, of which every one asks for something else."""
    seconds = []
    for _ in range(3):  # the first round warms what is looked at
        seconds = []
        for one in asked:
            begin = time.thread_time()
            look(one)
            seconds.append(time.thread_time() - begin)
    return 1e6 * statistics.median(seconds)


def lookups(store: Store, entries: int) -> dict[str, float]:
    """Microseconds of one id, and of each of 250, by ids and by keys made before."""
    several, one = draws(entries, ASKED), [ids[0] for ids in draws(entries, 1)]
    keys = [store.keys(ids) for ids in several]
    return {
        "one_id_us": median_us(lambda name: store[name], one),
        "of_250_us": median_us(store.get, several) / ASKED,
        "of_250_by_keys_us": median_us(store.read, keys) / ASKED,
    }


def measure_store(folder: Path, entries: int, width: int, dtype: str) -> dict[str, float]:
    """Figures of our store."""
    begin = time.perf_counter()
    with StoreWriter(folder, encoder="benchmark", dtype=dtype) as writer:
        for ids, vectors in pieces(entries, width):
            writer.add(ids, vectors)
    built = time.perf_counter() - begin
    opening = []
    for _ in range(5):
        begin = time.perf_counter()
        store = Store.open(folder, encoder="benchmark")
        opening.append(time.perf_counter() - begin)
    sizes = {"bytes": store.info().bytes, "shards": store.info().shards}
    return {
        "build_s": built,
        "open_s": statistics.median(opening),
        **lookups(store, entries),
        **sizes,
        "bytes_of_vectors": entries * width * {"int8": 1, "float32": 4}.get(dtype, 2),
    }


def measure_lmdb(folder: Path, entries: int, width: int) -> dict[str, float]:
    """Figures of LMDB, by key.

    Raises:
        ImportError: it is not installed.
    """
    import lmdb

    begin = time.perf_counter()
    with (
        lmdb.open(str(folder), map_size=8 * entries * width + (1 << 30)) as base,
        base.begin(write=True) as change,
    ):
        for ids, vectors in pieces(entries, width):
            for name, row in zip(ids, vectors.numpy(), strict=True):
                change.put(name.encode(), row.tobytes())
    built = time.perf_counter() - begin
    begin = time.perf_counter()
    base = lmdb.open(str(folder), readonly=True)
    opened = time.perf_counter() - begin

    def get(ids: list[str]) -> torch.Tensor:
        with base.begin(buffers=True) as reading:
            rows = [np.frombuffer(reading.get(name.encode()), "<f2") for name in ids]
            return torch.from_numpy(np.stack(rows)).float()

    several, one = draws(entries, ASKED), draws(entries, 1)
    return {
        "build_s": built,
        "open_s": opened,
        "one_id_us": median_us(get, one),
        "of_250_us": median_us(get, several) / ASKED,
        "bytes": sum(file.stat().st_blocks * 512 for file in folder.iterdir()),
        "bytes_of_vectors": entries * width * 2,
    }


def measure(entries: int, width: int, dtypes: list[str], folder: Path) -> dict[str, Any]:
    """Figures of one size, in every number format, and of LMDB where it is installed."""
    found: dict[str, Any] = {}
    for dtype in dtypes:
        found[dtype] = measure_store(folder / dtype, entries, width, dtype)
        shutil.rmtree(folder / dtype)
    if entries <= LARGEST_OF_LMDB:
        try:
            found["LMDB, float16"] = measure_lmdb(folder / "lmdb", entries, width)
        except ImportError:
            found["LMDB, float16"] = "not measured: it is not installed"
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="100000x1024,10000000x64", help="entries x width, ...")
    parser.add_argument("--dtypes", default="float16")
    parser.add_argument("--folder", type=Path, help="of the stores, which are removed")
    parser.add_argument("--out", type=Path, default=RESULTS / "store.json")
    wanted = parser.parse_args(arguments)
    report: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads()}
    for size in wanted.sizes.split(","):
        entries, width = map(int, size.split("x"))
        with tempfile.TemporaryDirectory(dir=wanted.folder) as folder:
            report[size] = measure(entries, width, wanted.dtypes.split(","), Path(folder))
        wanted.out.write_text(json.dumps(report, indent=2) + "\n")
        print(json.dumps({size: report[size]}, indent=2))


if __name__ == "__main__":
    main()
