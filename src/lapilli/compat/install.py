"""Import hook that lets `import llava` find lapilli; it knows names of modules only."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from types import CodeType, MappingProxyType, ModuleType

from lapilli.compat.device import stand_in

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
    }
)
"""Package of the original -> the module of ours whose public names it has, if any."""

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "llava.constants": "constants",
        "llava.conversation": "conversation",
        "llava.mm_utils": "mm_utils",
        "llava.utils": "utils",
        "llava.model.utils": "utils",
        "llava.model.builder": "builder",
        "llava.model.llava_arch": "llava_arch",
        "llava.model.language_model.llava_llama": "models",
        "llava.model.language_model.llava_mistral": "models",
        "llava.model.language_model.llava_mpt": "models",
        "llava.model.multimodal_encoder.builder": "tower",
        "llava.model.multimodal_encoder.clip_encoder": "tower",
        "llava.model.multimodal_projector.builder": "tower",
        "llava.eval.m4c_evaluator": "m4c_evaluator",
        "llava.eval.run_llava": "evaluation",
        "llava.serve.cli": "evaluation",
        "llava.train.train": "training",
        "llava.train.train_mem": "training",
        "llava.train.train_xformers": "training",
        "llava.train.llava_trainer": "trainer",
        "llava.train.llama_flash_attn_monkey_patch": "utils",
        "llava.train.llama_xformers_attn_monkey_patch": "utils",
    }
)
"""Module of the original -> ours, which is the very same module object under both names."""

PROGRAMS: Mapping[str, str] = MappingProxyType(
    {
        "llava.eval.model_vqa": "evaluation",
        "llava.eval.model_vqa_loader": "evaluation",
        "llava.eval.model_vqa_science": "evaluation",
        "llava.eval.model_vqa_mmbench": "evaluation",
        "llava.serve.controller": "serving",
        "llava.serve.model_worker": "serving",
    }
)
"""Program of the original -> the module of ours that has its names and those of others."""


class LlavaFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finder and loader of the modules of the original among ours."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for the names of the original, nothing for others."""
        if not any(fullname in table for table in (PACKAGES, MODULES, PROGRAMS)):
            return None
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
        source = PROGRAMS.get(fullname) or MODULES.get(fullname)
        if source not in ("evaluation", "serving", "training"):
            raise ImportError(f"{fullname} cannot be run as a program", name=fullname)
        program = f"from {PACKAGE}.{source} import run\nrun({_kind(fullname)!r})"
        return compile(program, fullname, "exec")


def why_no_names() -> str | None:
    """Return what the names of the original lack here, in one line; None: nothing."""
    if importlib.util.find_spec("transformers") is not None:
        return None
    return "the names of the original need transformers: pip install 'lapilli[compat]'"


def _ours(name: str) -> ModuleType:
    return importlib.import_module(f"{PACKAGE}.{name}")


def _kind(name: str) -> str:
    """Return what our module calls a program: the last part, of a benchmark what is special."""
    return name.rpartition(".")[2].removeprefix("model_vqa").removeprefix("_")


def install() -> None:
    """Make `import llava` and its submodules find lapilli, in this process, from now on.

    Where torch sees no GPU, "cuda" means the CPU, because programs for the original ask for it
    unconditionally. Calling `install` again changes nothing.

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
    stand_in()
