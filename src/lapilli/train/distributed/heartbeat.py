"""Heartbeats of all processes, and the failure that a process reports before it ends.

    alive/R    a number that process R raises every few seconds
    end/R      {"cause": "error" | "lost", "text": ...}, written before process R ends with an error

Knows the store where processes meet; knows no training.
"""

import json
import threading
import time
from collections.abc import Sequence
from typing import Final

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from lapilli.errors import LapilliError

BEAT_S: Final = 2.0
"""Seconds between two signs of life."""

_MISSED: Final = 3  # beats without which a process counts as gone
_STORE_ERRORS: Final = (dist.DistError, RuntimeError, OSError)


class ProcessLostError(LapilliError, RuntimeError):
    """Another process of this run is gone, so that this one cannot go on.

    Attributes:
        ranks: of the processes that failed first, as far as they could be found.
    """

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Heartbeat:
    """The signs of life of this process, from a thread of its own, and those of the others."""

    def __init__(self, store: Store, rank: int, size: int, beat_s: float = BEAT_S) -> None:
        self._store, self._rank, self._size, self._beat_s = store, rank, size, beat_s
        # A store answers one question at a time, and some take long; torch before 2.8 has no clone.
        self._own: Store = getattr(store, "clone", lambda: store)()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        number = 0
        while True:
            try:
                self._own.set(f"alive/{self._rank}", str(number))
            except _STORE_ERRORS:
                return  # nobody can read it any more
            number += 1
            if self._over.wait(self._beat_s):
                return

    def end(self) -> None:
        """No more signs of life."""
        self._over.set()
        self._thread.join(timeout=self._beat_s)

    def report_failure(self, error: BaseException, *, lost: bool) -> None:
        """Say why this process ends, for those that wonder where it is."""
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        word = json.dumps({"cause": "lost" if lost else "error", "text": text})
        try:
            self._store.set(f"end/{self._rank}", word)
        except _STORE_ERRORS:
            return  # the one that held the store is gone as well

    def find_lost(self) -> ProcessLostError:
        """Who failed first, after a collective operation broke; takes a few beats."""
        try:
            before = self._alive()
            time.sleep(self._beat_s * _MISSED)
            words = self._words()
            silent = [r for r, n in self._alive().items() if n == before[r] and r not in words]
        except _STORE_ERRORS as error:
            return ProcessLostError(
                f"process 0 of {self._size}, where all meet, does not answer ({_first(error)}): "
                f"{_GO_ON}",
                [0],
            )
        failed = {r: word["text"] for r, word in words.items() if word["cause"] == "error"}
        if failed:
            told = "; ".join(f"process {r} of {self._size}: {failed[r]}" for r in sorted(failed))
            return ProcessLostError(f"{told}. {_GO_ON}", sorted(failed))
        if silent:
            told = ", ".join(str(rank) for rank in silent)
            return ProcessLostError(
                f"process {told} of {self._size} is gone without a word (killed, out of memory, "
                f"or its machine is down): {_GO_ON}",
                silent,
            )
        return ProcessLostError(
            f"all {self._size} processes are alive but one did not come in time: look whether a "
            f"disk or a data source hangs. {_GO_ON}",
            [],
        )

    def _alive(self) -> dict[int, bytes]:
        """The last sign of everyone else; b"" where there never was one."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        return {rank: self._read(f"alive/{rank}") for rank in others}

    def _words(self) -> dict[int, dict[str, str]]:
        found = {rank: self._read(f"end/{rank}") for rank in range(self._size)}
        return {rank: json.loads(word) for rank, word in found.items() if word}

    def _read(self, key: str) -> bytes:
        """The value; b"" where there is none: `get` would wait for one."""
        return bytes(self._store.get(key)) if self._store.check([key]) else b""


_GO_ON: Final = "start the same command again to go on from the last whole checkpoint"

_NETWORK: Final = ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")


def is_network_error(error: BaseException) -> bool:
    """Whether a collective operation broke, which is the fault of another process."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, dist.DistError):
            return True
        if isinstance(seen, RuntimeError) and any(word in str(seen) for word in _NETWORK):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
