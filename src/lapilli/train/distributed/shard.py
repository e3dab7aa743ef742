"""FSDP2 over a model: which modules are put together and taken apart as one; knows no names.

    each member of an outermost ModuleList    the layers of the tower and of the language model:
                                              whole only while they run
    everything else                           embeddings, projector, norms, head: whole during the
                                              forward and again during the backward pass

Frozen weights are cut too: they need no gradients, but room.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lapilli.errors import ConfigError
from lapilli.train.recipe import Precision


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost ModuleLists: what is large, and run one after the other."""
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
