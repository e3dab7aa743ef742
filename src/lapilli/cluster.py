"""Cluster: the processes and machines that Ray has, and a part of them for each worker.

Knows Ray; must not know what workers do. Needs the extra "ray".
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from lapilli.errors import ConfigError

_SHOWN: Final = 300  # letters of a message of Ray's


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one worker takes of a cluster.

    Attributes:
        cpus: cores.
        gpus: GPUs, or a part of one.
    """

    cpus: int = 1
    gpus: float = 0.0


def connect(needs: str = "several workers need Ray", otherwise: str = "ask for one worker") -> Any:  # noqa: ANN401 - a module
    """Return Ray, connected.

    Where `ray.init` was not called, it is: the environment variable RAY_ADDRESS names a cluster
    that runs; without it one begins on this machine and ends with this process.

    Args:
        needs: what is said where it is not installed.
        otherwise: what can be done without it.

    Raises:
        ConfigError: Ray is not installed, or does not start.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        message = f'{needs}: pip install "lapilli[ray]", or {otherwise}'
        raise ConfigError(message) from error
    module: Any = ray  # half of it has no types
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if not module.is_initialized():
        try:
            with _own_signals():
                module.init(
                    log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False
                )
        except Exception as error:  # Ray has no class of its own for a start that fails
            where = os.environ.get("RAY_ADDRESS", "this machine")
            raise ConfigError(
                f"Ray does not start on {where}: {' '.join(str(error).split())[:_SHOWN]}; look at "
                f"`ray status`, or {otherwise}"
            ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return module


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does at SIGTERM: Ray would end it with another exit code."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def check_room(ray: Any, share: Share, workers: int) -> None:  # noqa: ANN401 - a module
    """Refuse more workers than the cluster has room for.

    Raises:
        ConfigError: it has fewer cores or GPUs than they need.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}: expected 1 or more")
    found = ray.cluster_resources()
    for name, needed in (("CPU", float(share.cpus * workers)), ("GPU", share.gpus * workers)):
        if found.get(name, 0) < needed:
            raise ConfigError(
                f"{workers} workers need {needed:g} {name}s, and Ray has {found.get(name, 0):g}: "
                "ask for fewer workers, or add machines to the cluster"
            )


def share_of(ray: Any, *, cores: int, device: str) -> Share:  # noqa: ANN401 - a module
    """Return what an engine takes: a GPU and a core, or cores alone.

    Args:
        ray: what `connect` returned.
        cores: of an engine without a GPU.
        device: of the engine: "auto" takes a GPU where the cluster has any.
    """
    kind = device.partition(":")[0]
    if kind == "cuda" or (kind == "auto" and ray.cluster_resources().get("GPU", 0) >= 1):
        return Share(cpus=1, gpus=1.0)
    return Share(cpus=cores)


def room(ray: Any, share: Share) -> int:  # noqa: ANN401 - a module
    """Return how many workers fit, and at least one."""
    found = ray.cluster_resources()
    fitting = found.get("CPU", 0) // share.cpus
    if share.gpus:
        fitting = min(fitting, found.get("GPU", 0) // share.gpus)
    return max(int(fitting), 1)
