"""Makes `import llava` find lapilli; knows module names only."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import CodeType, MappingProxyType, ModuleType

from lapilli.compat.device import stand_in

PACKAGE = "lapilli.compat"

PACKAGES: Mapping[str, str | None] = MappingProxyType(
    {
        "llava": f"{PACKAGE}.models",
        "llava.eval": None,
        "llava.model": f"{PACKAGE}.models",
        "llava.model.language_model": None,
        "llava.model.multimodal_encoder": None,
        "llava.model.multimodal_projector": None,
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
        "llava.model.utils": f"{PACKAGE}.utils",
        "llava.model.builder": f"{PACKAGE}.builder",
        "llava.model.llava_arch": f"{PACKAGE}.llava_arch",
        "llava.model.language_model.llava_llama": f"{PACKAGE}.models",
        "llava.model.language_model.llava_mistral": f"{PACKAGE}.models",
        "llava.model.language_model.llava_mpt": f"{PACKAGE}.models",
        "llava.model.multimodal_encoder.builder": f"{PACKAGE}.tower",
        "llava.model.multimodal_encoder.clip_encoder": f"{PACKAGE}.tower",
        "llava.model.multimodal_projector.builder": f"{PACKAGE}.tower",
        "llava.eval.m4c_evaluator": f"{PACKAGE}.m4c_evaluator",
        "llava.eval.run_llava": f"{PACKAGE}.run_llava",
        "llava.serve.cli": f"{PACKAGE}.chat",
        "llava.train.train": f"{PACKAGE}.training",
        "llava.train.train_mem": f"{PACKAGE}.training",
        "llava.train.train_xformers": f"{PACKAGE}.training",
        "llava.train.llava_trainer": f"{PACKAGE}.llava_trainer",
        "llava.train.llama_flash_attn_monkey_patch": f"{PACKAGE}.utils",
        "llava.train.llama_xformers_attn_monkey_patch": f"{PACKAGE}.utils",
    }
)
"""Module of the original -> ours, which is the very same module object under both names."""

PROGRAMS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "llava.eval.model_vqa": ("evaluation", ""),
        "llava.eval.model_vqa_loader": ("evaluation", "loader"),
        "llava.eval.model_vqa_science": ("evaluation", "science"),
        "llava.eval.model_vqa_mmbench": ("evaluation", "mmbench"),
        "llava.serve.controller": ("serving", "controller"),
        "llava.serve.model_worker": ("serving", "model_worker"),
    }
)
"""Program of the original -> the module of ours that has it, and its kind there."""


class LlavaFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of the original among ours."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for the names of the original, nothing for others."""
        if not any(fullname in table for table in (PACKAGES, MODULES, PROGRAMS)):
            return None
        return importlib.util.spec_from_loader(
            fullname,
            self,
            origin=fullname,  # what runpy gives to a program as its own name
            is_package=fullname in PACKAGES,
        )

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """The default: an empty module."""
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fill a package with names; put our module in the place of any other."""
        name = module.__name__
        if importlib.util.find_spec("transformers") is None:
            raise ImportError(
                "the names of the original need transformers: pip install 'lapilli[compat]'",
                name=name,
            )
        if name in MODULES:
            # One object: what a program assigns to a name of the module, our functions see.
            sys.modules[name] = importlib.import_module(MODULES[name])
            return
        if name in PROGRAMS:
            source, kind = PROGRAMS[name]
            ours = importlib.import_module(f"{PACKAGE}.{source}")
            module.__dict__.update(ours.names_of(kind))
            return
        package = PACKAGES[name]
        if package is not None:
            ours = importlib.import_module(package)
            module.__dict__.update({public: getattr(ours, public) for public in ours.__all__})

    def get_code(self, fullname: str) -> CodeType | None:
        """What `python -m lapilli.compat -m llava.eval.run_llava` runs.

        Raises:
            ImportError: there is no such module to run.
        """
        if fullname in PROGRAMS:
            source, kind = PROGRAMS[fullname]
            program = f"from {PACKAGE}.{source} import main\nmain({kind!r})"
            return compile(program, fullname, "exec")
        spec = importlib.util.find_spec(MODULES[fullname])
        if spec is None or spec.origin is None:
            raise ImportError(f"{fullname} cannot be run as a program", name=fullname)
        # From the file and not by its loader: that of an editable installation has no source, and
        # an import hook's (jaxtyping's, in the tests) would leave rewritten code for every Python.
        return compile(Path(spec.origin).read_bytes(), spec.origin, "exec", dont_inherit=True)


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
