"""Loading imports no slow modules, which every call of the command line would pay for."""

import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "sympy", "transformers", "huggingface_hub", "peft")


@pytest.mark.slow
def test_loading_a_local_checkpoint_imports_nothing_heavy(golden):
    _, built, _ = golden("llava-v1.6-mistral-tiny")
    program = (
        "import sys\n"
        "from lapilli.checkpoint.load import load_checkpoint\n"
        f"load_checkpoint({built['model_path']!r}, dtype='float32')\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"
