"""Several processes that train one model: how they meet, who reads what, what is summed and shared.

    process r of n     reads micro-batches r, r + n, ... of every step, and no others
    ddp                every process has the whole model; gradients are summed once in a step
    fsdp               every process has a part of each tensor: each member of an outermost
                       ModuleList (a layer of the tower or the language model) is whole only while
                       it runs, everything else during the forward and again the backward pass

    torchrun, srun     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    joined(rank_info)  device, process group, heartbeats; on the way out, who failed
    store: alive/R     a number that process R raises every few seconds
           end/R       {"cause": "error" | "lost", "text": ...}, written before process R ends with
                       an error

Either way all processes take the same step, which is the step of one process alone. In fsdp frozen
weights are cut too: they need no gradients, but room. Control (counts, metrics, checkpoints' plans)
goes over gloo on the CPU, tensors over nccl where the device is a GPU. Knows no model by name.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from lapilli.checkpoint.device import choose_device
from lapilli.errors import ConfigError, LapilliError
from lapilli.shapes import Tensor
from lapilli.train.recipe import Precision, Sharding

_BUCKET: Final = 1 << 25  # numbers that are summed in one call: 128 MiB of float32

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class ParallelContext:
    """This process among all: `rank` of `size`; one process alone needs no network.

    Attributes:
        sharding: "ddp": every process has the whole model; "fsdp": a part of every tensor.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    sharding: Sharding = "ddp"
    device: torch.device = _CPU

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"process {self.rank} of {self.size}: ranks are 0 to {self.size - 1}")

    @property
    def is_main_process(self) -> bool:
        """Return whether this process writes logs and checkpoints."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Return whether weights and moments lie in pieces."""
        return self.sharding == "fsdp" and self.size > 1

    def micro_batches(self, number: int) -> range:
        """Return which of the `number` micro-batches of a step this process reads.

        Raises:
            ConfigError: fewer than processes; or in pieces, and not the same number for everyone:
                putting a layer together takes all processes.
        """
        if number < self.size:
            raise ConfigError(
                f"run.gradient_accumulation_steps is {number} and {self.size} processes train: "
                f"each of them needs a micro-batch of every step, so start {number} processes at "
                f"most, or begin a run with run.gradient_accumulation_steps set to {self.size} or "
                "more"
            )
        if self.is_sharded and number % self.size:
            raise ConfigError(
                f"run.gradient_accumulation_steps is {number} in {self.size} processes: with "
                'run.sharding = "fsdp" all of them run the same number of micro-batches; start as '
                "many processes as divide it, or begin a run with run.gradient_accumulation_steps "
                f"set to a multiple of {self.size}"
            )
        return range(self.rank, number, self.size)

    @property
    def loss_scale(self) -> float:
        """Return the factor of a loss before `backward`: FSDP2 averages where we sum."""
        return float(self.size) if self.is_sharded else 1.0

    def wrap(self, model: nn.Module, *, precision: Precision = "float32") -> nn.Module:
        """Move the model to this process's device, with what the main process has drawn.

        It is changed in place, cut into pieces if so, and keeps its parameters' names. Make the
        optimizer after this.
        """
        if not self.is_sharded:
            model.to(self.device)
        if self.size == 1:
            return model
        for parameter in model.parameters():
            if parameter.requires_grad:  # drawn at random: an adapter, a projector
                sent = parameter.detach().to(self.device)
                dist.broadcast(sent, src=0)
                parameter.data.copy_(sent)
        if self.is_sharded:
            shard(model, self.size, self.device, precision)
        return model

    def sum_counts(self, counts: list[int]) -> list[int]:
        """Return the element-wise sum over all processes."""
        if self.size == 1:
            return counts
        total = torch.tensor(counts, dtype=torch.int64)
        dist.all_reduce(total)
        return [int(count) for count in total]

    def sum_floats(self, values: dict[str, float]) -> dict[str, float]:
        """Return the sum over all processes of every value; all have the same names."""
        if self.size == 1:
            return values
        total = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64)
        dist.all_reduce(total)
        return dict(zip(sorted(values), total.tolist(), strict=True))

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes.

        One that is missing counts as zero; where it is missing everywhere, it stays missing, as in
        one process alone.

        Note:
            Once a step, after the last backward pass. torch's DistributedDataParallel sums while
            that pass goes on; but it waits for ever for a parameter that one process did not use
            (a projector, in a batch of text), and for a process that has fewer micro-batches than
            another. What it would hide is little where a model fits whole on a device: see
            docs/guide/cluster.md.
        """
        if self.size == 1 or self.is_sharded:
            return
        owners = list(parameters)
        used = self.sum_counts([int(p.grad is not None) for p in owners])
        owners = [p for p, number in zip(owners, used, strict=True) if number]
        for bucket in _buckets(owners):
            flat = torch.cat(
                [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket]
            )
            dist.all_reduce(flat)
            parts = torch.split(flat, [p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                parameter.grad = part.view_as(parameter)

    def clip(self, parameters: Iterable[nn.Parameter], largest: float) -> float:
        """Scale all gradients down to the norm `largest`, and return the norm they had together."""
        norm = nn.utils.clip_grad_norm_(parameters, largest, foreach=True)
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield neighbours of one dtype, about `_BUCKET` numbers at a time."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        same = not bucket or bucket[0].dtype == parameter.dtype
        if bucket and (not same or _numbers(bucket) + parameter.numel() > _BUCKET):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def _numbers(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


SINGLE_PROCESS = ParallelContext()


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the outermost ModuleLists: large, and run one after the other."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from layers_of(child)


def shard(model: nn.Module, size: int, device: torch.device, precision: Precision) -> None:
    """Cut every parameter into `size` pieces, of which this process keeps its own, in place.

    Parameters become DTensors under the same names. With "bfloat16" layers are sent, put together
    and computed in bfloat16; weights, gradients' sums and moments keep the weights' own dtype.

    Raises:
        ConfigError: trainable weights of several dtypes, which are summed in one piece.

    Source: Zhao et al. 2023 (PyTorch FSDP); torch.distributed.fsdp.fully_shard.
    """
    _check(model)
    mesh = init_device_mesh(device.type, (size,))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # Taken apart after the forward pass as well: evaluation has no backward pass that would do it,
    # and whoever saves, or puts in averages, means the pieces.
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # A batch of text leaves the projector without gradients in one process and not in another.
    if isinstance(model, FSDPModule) and hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)


def _check(model: nn.Module) -> None:
    dtypes = {p.dtype: name for name, p in model.named_parameters() if p.requires_grad}
    if len(dtypes) > 1:
        found = ", ".join(f"{name} is {str(dtype)[6:]}" for dtype, name in dtypes.items())
        raise ConfigError(
            f'run.sharding = "fsdp" sums gradients of one dtype, and {found}: train all of them '
            "in float32"
        )


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
