"""Process group: how processes meet, their heartbeats, and which of them failed; no training.

    torchrun, srun      RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    joined(rank_info)   device, process group, heartbeats; on the way out, who failed
    store: alive/R      a number that process R raises every few seconds
           end/R        {"cause": "error" | "lost", "text": ...}, written before process R ends with
                        an error

Control (counts, metrics, checkpoints' plans) goes over gloo on the CPU, tensors over nccl where the
device is a GPU.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lapilli.checkpoint.load import choose_device
from lapilli.errors import ConfigError, LapilliError
from lapilli.train.distributed.context import ParallelContext
from lapilli.train.recipe import Sharding

BEAT_S: Final = 2.0
"""Seconds between two signs of life."""

_MISSED: Final = 3  # beats without which a process counts as gone
_GO_ON: Final = "start the same command again to go on from the last whole checkpoint"
_NETWORK: Final = ("gloo", "NCCL", "Connection closed", "Connection reset", "ProcessGroup")
_STORE_ERRORS: Final = (dist.DistError, RuntimeError, OSError)


class ProcessLostError(LapilliError, RuntimeError):
    """Another process of this run is gone; `ranks` failed first, as far as they could be found."""

    def __init__(self, message: str, ranks: Sequence[int]) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class Heartbeat:
    """The heartbeat of this process, from a thread of its own, and those of the others."""

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
        """Stop the heartbeat."""
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
        """Return who failed first, after a collective operation broke; takes a few beats."""
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
        """Return the last sign of everyone else; b"" where there never was one."""
        others = [rank for rank in range(self._size) if rank != self._rank]
        return {rank: self._read(f"alive/{rank}") for rank in others}

    def _words(self) -> dict[int, dict[str, str]]:
        found = {rank: self._read(f"end/{rank}") for rank in range(self._size)}
        return {rank: json.loads(word) for rank, word in found.items() if word}

    def _read(self, key: str) -> bytes:
        """Return the value; b"" where there is none: `get` would wait for one."""
        return bytes(self._store.get(key)) if self._store.check([key]) else b""


def is_network_error(error: BaseException) -> bool:
    """Return whether a collective operation broke, which is the fault of another process."""
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


_NAMES: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """The rank of this process, and where all of them meet.

    Attributes:
        local_rank: among the processes of this machine: the number of its GPU.
        meeting: "env://" (the variables that torchrun sets), "file:///a/new/file", or
            "tcp://host:port".
    """

    rank: int
    size: int
    local_rank: int = 0
    meeting: str = "env://"


def rank_info_of(environment: Mapping[str, str]) -> RankInfo | None:
    """Return what torchrun (or a Slurm script) has put into the environment; None for a run alone.

    Raises:
        ConfigError: some of the variables are there, others are not, or are no numbers.
    """
    if "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in _NAMES if name not in environment]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']} but {', '.join(missing)} is not set: start "
            "with torchrun, which sets all of them"
        )
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    try:
        rank, size, local = (int(environment.get(name, 0)) for name in names)
    except ValueError as error:
        told = ", ".join(f"{name}={environment.get(name)}" for name in names)
        raise ConfigError(f"{told}: expected whole numbers") from error
    return RankInfo(rank, size, local)


@contextmanager
def joined(
    rank_info: RankInfo | None,
    *,
    sharding: Sharding = "ddp",
    device: str = "auto",
    timeout_s: float = 1800.0,
    beat_s: float = BEAT_S,
) -> Iterator[ParallelContext]:
    """Join the process group while the block runs.

    Args:
        rank_info: None, or of one process: nobody is met, and there is no network.
        sharding: what the processes share: "ddp" nothing, "fsdp" weights and moments.
        device: "cpu", "cuda", or "auto": a GPU where there is one. One process alone may name any
            other, such as "cuda:1".
        timeout_s: how long an operation waits for the others: longer than the main process writes a
            whole model. A process that was killed is noticed at once, a machine that was switched
            off after this time.
        beat_s: seconds between two heartbeats.

    Raises:
        ProcessLostError: another process failed; it names it, and its error where it left one.
        ConfigError: no such device, fewer GPUs than processes on this machine, or one named for
            all of them.
    """
    if rank_info is None or rank_info.size == 1:
        found = choose_device(device)
        yield ParallelContext(device=_device("cuda", 0) if found == torch.device("cuda") else found)
        return
    place = _device(device, rank_info.local_rank)
    wait = timedelta(seconds=timeout_s)
    store, _, _ = next(rendezvous(rank_info.meeting, rank_info.rank, rank_info.size, timeout=wait))
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=rank_info.rank,
        world_size=rank_info.size,
        timeout=wait,
    )
    heartbeat = Heartbeat(PrefixStore("heartbeat", store), rank_info.rank, rank_info.size, beat_s)
    try:
        yield ParallelContext(rank_info.rank, rank_info.size, sharding, place)
        dist.barrier()  # the one that holds the store leaves last
    except BaseException as error:  # the others have to hear of it, an interrupt included
        lost = is_network_error(error)
        heartbeat.report_failure(error, lost=lost)
        if lost:
            raise heartbeat.find_lost() from error
        raise
    finally:
        heartbeat.end()
        dist.destroy_process_group()


def _device(wanted: str, local_rank: int) -> torch.device:
    if wanted not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"device {wanted} for several processes: say cuda, and each takes a GPU of its own; "
            "CUDA_VISIBLE_DEVICES chooses among them"
        )
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number = torch.cuda.device_count()
    if local_rank >= number:
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are {number}; start as many "
            "processes as GPUs (torchrun --nproc_per_node)"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
