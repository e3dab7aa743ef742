"""Names of the original LLaVA over our own rooms, for programs that were written against it.

    import lapilli.compat
    lapilli.compat.install()
    from llava.model.builder import load_pretrained_model     # ours

or, without touching the program: `python -m lapilli.compat SCRIPT ARGS...`.

This room knows the names, argument orders and return values of the original and reproduces its
quirks (numbered as in the README of the golden numbers). All else is done by the rooms below. Here
are the import hook, which knows names of modules only, and the stand-in for a GPU that is not
there: "cuda" means the CPU, told once on stderr. The original's programs write it everywhere:
`.cuda()`, `.to("cuda")`, `torch.zeros(1, device="cuda")`. Only calls that would fail are changed,
and only for such a device.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import CodeType, MappingProxyType, ModuleType
from typing import Any

import torch

__all__ = ["install"]

PACKAGE = "lapilli.compat"

PACKAGES: Mapping[str, str] = MappingProxyType(
    {
        "llava": "models",
        "llava.eval": "",
        "llava.model": "models",
        "llava.model.language_model": "",
        "llava.model.multimodal_encoder": "",
        "llava.model.multimodal_projector": "",
        "llava.serve": "",
        "llava.train": "",
        "tinychat": "",
        "tinychat.models": "tinychat",
        "tinychat.utils": "",
    }
)
"""Package of the original -> the module of ours whose public names it has, if any."""

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "llava.conversation": "conversation",
        "llava.mm_utils": "mm_utils",
        "llava.model.apply_delta": "delta",
        "llava.model.builder": "builder",
        "llava.model.consolidate": "delta",
        "llava.model.llava_arch": "llava_arch",
        "llava.model.language_model.llava_llama": "models",
        "llava.model.language_model.llava_mistral": "models",
        "llava.model.language_model.llava_mpt": "models",
        "llava.model.make_delta": "delta",
        "llava.model.multimodal_encoder.builder": "tower",
        "llava.model.multimodal_encoder.clip_encoder": "tower",
        "llava.model.multimodal_projector.builder": "tower",
        "llava.eval.m4c_evaluator": "m4c_evaluator",
        "llava.eval.run_llava": "evaluation",
        "llava.serve.cli": "evaluation",
        "llava.serve.controller": "serving",
        "llava.serve.model_worker": "serving",
        "llava.train.train": "training",
        "llava.train.train_mem": "training",
        "llava.train.train_xformers": "training",
        "llava.train.llava_trainer": "trainer",
        "tinychat.models.llava_llama": "tinychat",
        "tinychat.utils.constants": "tinychat",
    }
)
"""Module of the original -> ours, which is the very same module object under both names."""

PARTS: Mapping[str, str] = MappingProxyType(
    {
        "llava.constants": (
            "CONTROLLER_HEART_BEAT_EXPIRATION WORKER_HEART_BEAT_INTERVAL LOGDIR IGNORE_INDEX "
            "IMAGE_TOKEN_INDEX DEFAULT_IMAGE_TOKEN DEFAULT_IMAGE_PATCH_TOKEN "
            "DEFAULT_IM_START_TOKEN DEFAULT_IM_END_TOKEN IMAGE_PLACEHOLDER"
        ),
        "llava.utils": (
            "LOGDIR server_error_msg moderation_msg build_logger disable_torch_init "
            "violates_moderation pretty_print_semaphore"
        ),
        "llava.model.utils": "auto_upgrade",
        "llava.train.llama_flash_attn_monkey_patch": "replace_llama_attn_with_flash_attn",
        "llava.train.llama_xformers_attn_monkey_patch": "replace_llama_attn_with_xformers_attn",
    }
)
"""Module of the original -> the names that it has of mm_utils: no more, for `import *`."""

PROGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "llava.eval.model_vqa": "evaluation",
        "llava.eval.model_vqa_loader": "evaluation",
        "llava.eval.model_vqa_science": "evaluation",
        "llava.eval.model_vqa_mmbench": "evaluation",
    }
)
"""Program of the original -> the module of ours that has its names and those of others."""

NAMES = ("llava", "tinychat")
"""Packages whose names are taken: the original's, and TinyChat's of llm-awq."""

RUNNABLE = ("delta", "evaluation", "serving", "training")
"""Modules of ours that can be run as programs."""


class LlavaFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder and loader of the modules of the original among ours."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the names of the original, nothing for others.

        Raises:
            ModuleNotFoundError: a name under these that is not there. It has no `name`, for which
                `from llava.eval import x` would say less.
        """
        if fullname.partition(".")[0] not in NAMES:
            return None
        if not any(fullname in table for table in (PACKAGES, MODULES, PARTS, PROGRAMS)):
            raise ModuleNotFoundError(_missing(fullname))
        return importlib.util.spec_from_loader(
            fullname,
            self,
            origin=fullname,  # what runpy gives to a program as its own name
            is_package=fullname in PACKAGES,
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Return None, for the usual empty module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill a package with names; put our module in the place of any other."""
        name = module.__name__
        missing = why_no_names()
        if missing is not None:
            raise ImportError(missing, name=name)
        if name in MODULES:
            # One object: what a program assigns to a name of the module, our functions see.
            sys.modules[name] = _ours(MODULES[name])
        elif name in PARTS:
            ours = _ours("mm_utils")
            module.__dict__.update({part: getattr(ours, part) for part in PARTS[name].split()})
        elif name in PROGRAMS:
            module.__dict__.update(_ours(PROGRAMS[name]).names_of(_kind(name)))
        elif PACKAGES[name]:
            ours = _ours(PACKAGES[name])
            module.__dict__.update({public: getattr(ours, public) for public in ours.__all__})

    def get_code(self, fullname: str) -> CodeType:
        """Return what `python -m lapilli.compat -m llava.eval.run_llava` runs.

        Raises:
            ImportError: there is no such program.
        """
        if fullname not in programs():
            raise ImportError(f"{fullname} cannot be run as a program", name=fullname)
        source = {**MODULES, **PROGRAMS}[fullname]
        program = f"from {PACKAGE}.{source} import run\nrun({_kind(fullname)!r})"
        return compile(program, fullname, "exec")


def why_no_names() -> str | None:
    """Return what the names of the original lack here, in one line; None: nothing."""
    if importlib.util.find_spec("transformers") is not None:
        return None
    return "the names of the original need transformers: pip install 'lapilli[compat]'"


def programs() -> list[str]:
    """Return the modules of the original that can be run."""
    return sorted(name for name, ours in {**MODULES, **PROGRAMS}.items() if ours in RUNNABLE)


def _missing(fullname: str) -> str:
    """Return one line about a name that is not there: what its package has."""
    package = fullname.rpartition(".")[0]
    parts = [name.rpartition(".") for name in (*PACKAGES, *MODULES, *PARTS, *PROGRAMS)]
    inside = sorted(part for parent, _, part in parts if parent == package)
    return (
        f"lapilli has no {fullname}: the modules of its {package} are {', '.join(inside)} "
        "(docs/guide/compat.md says what to use instead)"
    )


def _ours(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _kind(name: str) -> str:
    """Return what our module calls a program: the last part, of a benchmark what is special."""
    return name.rpartition(".")[2].removeprefix("model_vqa").removeprefix("_")


def install() -> None:
    """Make `import llava` and `import tinychat` find lapilli, in this process, from now on.

    Where torch sees no GPU, "cuda" means the CPU, because programs for the original ask for it
    unconditionally. Calling `install` again changes nothing.

    Raises:
        ImportError: another package of such a name has been imported already.
    """
    if not any(isinstance(finder, LlavaFinder) for finder in sys.meta_path):
        for name in NAMES:
            if name in sys.modules:
                raise ImportError(
                    f"a package named {name} is imported already: call lapilli.compat.install() "
                    "first",
                    name=name,
                )
        sys.meta_path.insert(0, LlavaFinder())
    stand_in()


MAKERS = (
    *("arange", "as_tensor", "asarray", "empty", "empty_like", "eye", "full", "full_like"),
    *("linspace", "logspace", "ones", "ones_like", "rand", "rand_like", "randint", "randint_like"),
    *("randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)
METHODS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")
IDLE = ("set_device", "synchronize", "reset_peak_memory_stats", "ipc_collect")


def stand_in() -> None:
    """Let the CPU stand in for a GPU that is not there; a second call changes nothing."""
    if torch.cuda.is_available() or hasattr(torch.Tensor.to, "__wrapped__"):
        return
    with torch.device("cpu"):  # torch remembers which functions make tensors: its own, not ours
        torch.zeros(1)
    for kind in (torch.Tensor, torch.nn.Module):
        _replace(kind, "to")
        setattr(kind, "cuda", _idle(lambda self, *_, **__: self))  # noqa: B010  mypy
    for name in METHODS:
        _replace(torch.Tensor, name)
    for name in (*MAKERS, "set_default_device"):
        _replace(torch, name)
    _replace(torch, "load", keyword="map_location")
    for name in IDLE:
        setattr(torch.cuda, name, _idle(lambda *_, **__: None))
    # Torch's own functions are replaced, which no type allows.
    torch.Tensor.pin_memory = _idle(lambda self, *_, **__: self)  # type: ignore[method-assign]
    torch.cuda.current_device = _idle(lambda: 0)
    torch.cuda.device = _idle(lambda *_: contextlib.nullcontext())  # type: ignore[assignment,misc]


def is_absent(device: object) -> bool:
    """Return whether this names a GPU: "cuda", "cuda:1", a torch.device of it, or a number."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def present(device_map: Any) -> Any:  # noqa: ANN401
    """Return a device, or the devices of modules, with the CPU for every GPU that is absent."""
    if torch.cuda.is_available():
        return device_map
    if isinstance(device_map, Mapping):
        return {name: present(device) for name, device in device_map.items()}
    if not is_absent(device_map):
        return device_map
    _tell()
    return "cpu"


@functools.cache
def _tell() -> None:
    sys.stderr.write('lapilli.compat: there is no GPU here: "cuda" means the CPU\n')


def _replace(owner: Any, name: str, keyword: str = "device") -> None:  # noqa: ANN401
    """Put a function in place of `owner.name` that never sees a device which is not there."""
    original: Callable[..., Any] = getattr(owner, name)
    # A device may come first where nothing else does: after self, or to set_default_device.
    place = {"to": 1, "set_default_device": 0, "load": 1}.get(name)

    @functools.wraps(original)
    def replaced(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        if is_absent(options.get(keyword)):
            _tell()
            options[keyword] = "cpu"
        if place is not None and len(args) > place and is_absent(args[place]):
            _tell()
            args = (*args[:place], "cpu", *args[place + 1 :])
        return original(*args, **options)

    setattr(owner, name, replaced)


def _idle(answer: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of its own for every name: torch.compile tells them apart by identity."""

    def idle(*args: Any, **options: Any) -> Any:  # noqa: ANN401
        _tell()
        return answer(*args, **options)

    return idle
