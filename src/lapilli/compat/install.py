"""Makes `import llava` find lapilli; knows module names only."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from types import CodeType, MappingProxyType, ModuleType
from typing import TypeVar

import torch

PACKAGE = "lapilli.compat"

PACKAGES: Mapping[str, str | None] = MappingProxyType(
    {
        "llava": f"{PACKAGE}.models",
        "llava.eval": None,
        "llava.model": f"{PACKAGE}.models",
        "llava.model.language_model": None,
        "llava.serve": None,
        "llava.train": None,
    }
)
"""Package of the original -> the module whose public names it has, if any."""

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "llava.constants": f"{PACKAGE}.constants",
        "llava.conversation": f"{PACKAGE}.conversation",
        "llava.mm_utils": f"{PACKAGE}.mm_utils",
        "llava.utils": f"{PACKAGE}.utils",
        "llava.model.builder": f"{PACKAGE}.builder",
        "llava.model.llava_arch": f"{PACKAGE}.llava_arch",
        "llava.model.language_model.llava_llama": f"{PACKAGE}.models",
        "llava.model.language_model.llava_mistral": f"{PACKAGE}.models",
        "llava.model.language_model.llava_mpt": f"{PACKAGE}.models",
        "llava.eval.run_llava": f"{PACKAGE}.run_llava",
        "llava.serve.cli": f"{PACKAGE}.chat",
        "llava.train.train": f"{PACKAGE}.training",
        "llava.train.train_mem": f"{PACKAGE}.training",
        "llava.train.llava_trainer": f"{PACKAGE}.llava_trainer",
    }
)
"""Module of the original -> ours, which is the very same module object under both names."""

Self = TypeVar("Self")


class LlavaFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the original among ours."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for the names of the original, nothing for others."""
        if fullname not in PACKAGES and fullname not in MODULES:
            return None
        return importlib.util.spec_from_loader(fullname, self, is_package=fullname in PACKAGES)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The default: an empty module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill a package with names; put our module in the place of any other."""
        name = module.__name__
        if name in MODULES:
            # One object: what a program assigns to a name of the module, our functions see.
            sys.modules[name] = importlib.import_module(MODULES[name])
            return
        source = PACKAGES[name]
        if source is not None:
            ours = importlib.import_module(source)
            module.__dict__.update({public: getattr(ours, public) for public in ours.__all__})

    def get_code(self, fullname: str) -> CodeType | None:
        """What `python -m lapilli.compat -m llava.eval.run_llava` runs.

        Raises:
            ImportError: there is no such module to run.
        """
        spec = importlib.util.find_spec(MODULES[fullname])
        if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
            raise ImportError(f"{fullname} cannot be run as a program", name=fullname)
        return spec.loader.get_code(MODULES[fullname])


def install() -> None:
    """Make `import llava` and its submodules find lapilli, in this process, from now on.

    Where torch sees no GPU, `.cuda()` of tensors and modules returns them as they are, because
    programs for the original call it unconditionally. Calling `install` again changes nothing.

    Raises:
        ImportError: another package named llava has been imported already.
    """
    if not any(isinstance(finder, LlavaFinder) for finder in sys.meta_path):
        if "llava" in sys.modules:
            raise ImportError(
                "a package named llava is imported already: call lapilli.compat.install() first",
                name="llava",
            )
        sys.meta_path.insert(0, LlavaFinder())
    if not torch.cuda.is_available():
        for kind in (torch.Tensor, torch.nn.Module):
            setattr(kind, "cuda", _stay)  # noqa: B010  mypy knows another signature


def _stay(self: Self, *_args: object, **_kwargs: object) -> Self:
    return self
