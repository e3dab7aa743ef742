"""The samples of CONTRIBUTING.md, as modules of their own outside of the package."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).resolve().parents[1] / "CONTRIBUTING.md"


def sample(heading: str, folder: Path) -> ModuleType:
    """Return the one Python block of a section, written to a file of `folder` and imported."""
    sections = re.split(r"^## ", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    [section] = [text for text in sections if text.startswith(f"{heading}\n")]
    [source] = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    name = heading.lower().replace(" ", "_").replace("-", "_")
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
