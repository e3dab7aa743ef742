"""recipes/launch: the files as somebody starts them, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_every_launch_file_is_a_program(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.suffix == ".sbatch" or os.access(path, os.X_OK)


@pytest.fixture
def conversations(tmp_path):
    """Every third sample has no picture."""
    records = []
    for number in range(12):
        asked, answer = "Which colour?", f"It is {number}."
        record = {"id": str(number)}
        if number % 3:
            Image.new("RGB", (50, 40), (20 * number, 90, 30)).save(tmp_path / f"{number}.png")
            record["image"], asked = f"{number}.png", f"<image>\n{asked}"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append({**record, "conversations": turns})
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(records))
    return path


def log(folder):
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line[name] for line in lines for name in ("loss", "eval_loss") if name in line]


@pytest.mark.cluster
def test_torchrun_trains_the_model_that_one_process_trains(tmp_path, conversations):
    recipe = str(ROOT / "recipes" / "tiny" / "instruct.toml")
    given = ["--model.checkpoint", "pebble", "--data.sources", f'[{{path = "{conversations}"}}]']
    given += ["--run.steps", "2", "--data.held_out", "0.3", "--run.evaluate_every", "1"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PROCESSES": "2", "OMP_NUM_THREADS": "1"}
    together, alone = tmp_path / "together", tmp_path / "alone"
    program = [str(LAUNCH / "one_machine.sh"), recipe, str(together), *given]
    commands = [
        [*program, "--run.sharding", "fsdp"],
        [
            str(Path(sys.executable).parent / "lapilli"),
            "train",
            recipe,
            "--out",
            str(alone),
            *given,
        ],
    ]
    for command in commands:
        done = subprocess.run(
            [*command, "--device", "cpu"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    assert log(together) == pytest.approx(log(alone), abs=1e-5)
    assert len(log(together)) == 4
    for folder in (together, alone):
        assert (folder / "model" / "model.safetensors").is_file()
