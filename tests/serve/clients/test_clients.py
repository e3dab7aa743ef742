"""Programs of each protocol's own client library ask a real server.

The libraries are none of lapilli's dependencies: `make clients` puts them into an environment of
their own (build/clients). Every program is called with the server's address and a picture, and
fails when an answer is not what it expects.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.serve.conftest import picture

HERE = Path(__file__).parent
ENVIRONMENT = REPOSITORY / "build" / "clients"
PYTHON = ENVIRONMENT / "bin" / "python"
NODE = ENVIRONMENT / "node"

pytestmark = pytest.mark.slow


PAGE = REPOSITORY / "docs" / "guide" / "clients.md"
SNIPPETS = [
    block
    for block in re.findall(r"^```text\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    if "localhost:8000" in block
]


def run(command, client, tmp_path):
    """Run a program against the server; return what it printed."""
    image = tmp_path / "picture.png"
    image.write_bytes(picture("red"))
    url = str(client.base_url).rstrip("/")
    kept = ("PATH", "HOME", "LANG", "SYSTEMROOT")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    done = subprocess.run(
        [*command, url, str(image)],
        env={**environment, "NO_PROXY": "*", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("program", sorted(HERE.glob("use_*.py")), ids=lambda path: path.stem)
def test_clients_in_python(program, client, tmp_path):
    if not (ENVIRONMENT / ".installed").exists():
        pytest.skip("the clients are not installed: make clients")
    said = run([str(PYTHON), str(program)], client, tmp_path)
    assert said.splitlines()[-1] == "all of it answered"


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_the_guide_shows_what_runs(number, client, tmp_path):
    if not (ENVIRONMENT / ".installed").exists():
        pytest.skip("the clients are not installed: make clients")
    url = str(client.base_url).rstrip("/")
    program = tmp_path / "snippet.py"
    program.write_text(SNIPPETS[number].replace("http://localhost:8000", url), "utf-8")
    assert run([str(PYTHON), str(program)], client, tmp_path).strip()


def test_the_guide_has_a_snippet_of_every_library_in_python():
    named = {"openai", "agents", "anthropic", "ollama", "langchain_openai", "litellm"}
    found = {name for one in SNIPPETS for name in re.findall(r"^(?:from|import) (\w+)", one, re.M)}
    assert named <= found


@pytest.mark.parametrize("program", sorted(HERE.glob("use_*.mjs")), ids=lambda path: path.stem)
def test_clients_in_javascript(program, client, tmp_path):
    if not (NODE / ".installed").exists():
        pytest.skip("the clients of npm are not installed: make clients, with Node on the PATH")
    node = shutil.which("node")
    assert node is not None
    folder = NODE / "programs"  # beside node_modules, where imports are looked for
    folder.mkdir(exist_ok=True)
    copied = Path(shutil.copy(program, folder))
    said = run([node, str(copied)], client, tmp_path)
    assert said.splitlines()[-1] == "all of it answered"
