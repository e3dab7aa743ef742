"""How processes meet and part: torchrun's variables, or a file; knows no training.

    torchrun, srun     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    joined(rank_info)       device, process group, signs of life; on the way out, who failed

Control (counts, metrics, checkpoints' plans) goes over gloo on the CPU, tensors over nccl where the
device is a GPU.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from lapilli.checkpoint.placement import choose_device
from lapilli.errors import ConfigError
from lapilli.train.distributed.context import ParallelContext
from lapilli.train.distributed.heartbeat import BEAT_S, Heartbeat, is_network_error
from lapilli.train.recipe import Sharding

_NAMES: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Which process this is, and where all of them meet.

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
    """The rank_info that torchrun (or a Slurm script) has put into the environment; None: alone.

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
    """The parallel, while the block runs.

    Args:
        rank_info: None, or of one process: nobody is met, and there is no network.
        sharding: what the processes share: "ddp" nothing, "fsdp" weights and moments.
        device: "cpu", "cuda", or "auto": a GPU where there is one. One process alone may name any
            other, such as "cuda:1".
        timeout_s: how long an operation waits for the others: longer than the lead writes a
            whole model. A process that was killed is noticed at once, a machine that was switched
            off after this time.
        beat_s: seconds between two signs of life.

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


def join_processes(rank: int, size: int, meeting: Path) -> ParallelContext:
    """Meet the other processes at a file that does not exist before the first comes."""
    if size > 1:
        dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=size)
    return ParallelContext(rank, size)
