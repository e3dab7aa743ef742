"""Parallel context: this process among all, which micro-batches it runs, and sums over all.

    process r of n     reads micro-batches r, r + n, ... of every step, and no others
    ddp                every process has the whole model; gradients are summed once in a step
    fsdp               every process has a part of each tensor: each member of an outermost
                       ModuleList (a layer of the tower or the language model) is whole only while
                       it runs, everything else during the forward and again the backward pass

Either way all processes take the same step, which is the step of one process alone. In fsdp frozen
weights are cut too: they need no gradients, but room. Knows no model by name.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lapilli.errors import ConfigError
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
        self._share_weights(model)
        if self.is_sharded:
            shard(model, self.size, self.device, precision)
        return model

    def _share_weights(self, model: nn.Module) -> None:
        """Give everyone what the main process has drawn at random: an adapter, a projector."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                sent = parameter.detach().to(self.device)
                dist.broadcast(sent, src=0)
                parameter.data.copy_(sent)

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
        """Every gradient replaced by its sum over all processes.

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
