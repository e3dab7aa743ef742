"""recipes/launch: the files as somebody starts them, on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lapilli.checkpoint.source import resolve
from lapilli.errors import ConfigError
from lapilli.train.distributed import SINGLE_PROCESS, joined
from lapilli.train.launch import check_output_folder, launch
from lapilli.train.recipe import OptimRecipe, Recipe, RunRecipe
from lapilli.train.recipe.file import load_recipe

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
RECIPE = ROOT / "recipes" / "tiny" / "instruct.toml"


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


def free_port():
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


@pytest.fixture
def environment(tmp_path):
    """Two processes on one machine, with stand-ins for Slurm's own programs."""
    stubs = {"scontrol": 'echo "$3"', "srun": 'shift && exec "$@"'}
    for name, does in stubs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    places = (tmp_path / "bin", Path(sys.executable).parent, os.environ["PATH"])
    slurm = {"JOB_NUM_NODES": "1", "JOB_NODELIST": "localhost", "JOB_ID": "7"}
    return {
        **os.environ,
        "PATH": os.pathsep.join(map(str, places)),
        "PROCESSES": "2",
        "PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "SLURM_SUBMIT_DIR": str(ROOT),
    }


def start(file, run, given, environment, device="cpu"):
    program = ["bash", str(LAUNCH / file), str(RECIPE), str(run), *given, "--device", device]
    done = subprocess.run(
        program, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def given(conversations):
    """Two steps of pebble, which are evaluated."""
    options = ["--model.checkpoint", "pebble", "--data.sources", f'[{{path = "{conversations}"}}]']
    return [*options, "--run.steps", "2", "--data.held_out", "0.3", "--run.evaluate_every", "1"]


LORA = ["--lora.rank", "2", "--save.merge", "true"]


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("file", "more"), [("one_machine.sh", ["--run.workers", "1"]), ("slurm.sbatch", LORA)]
)
def test_torchrun_trains_the_model_that_one_process_trains(
    tmp_path, given, environment, file, more
):
    """slurm.sbatch starts several_machines.sh."""
    given = [*given, *more, "--save.dtype", "float32", "--run.sharding", "fsdp"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    start(file, together, given, environment)
    launch(load_recipe(RECIPE, [*given, "--run.workers", "0"]), alone, parallel=SINGLE_PROCESS)
    assert log(together) == pytest.approx(log(alone), abs=1e-5)
    assert len(log(together)) == 4
    found, expected = (
        load_file(folder / "model" / "model.safetensors") for folder in (together, alone)
    )
    before = load_file(resolve("pebble") / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=0, msg=name)
    learned = "model.layers.0.self_attn.q_proj.weight"
    assert (expected[learned] - before[learned].float()).abs().max() > 5e-4


@pytest.mark.gpu
@pytest.mark.cluster
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_one_process_of_torchrun_on_a_gpu_is_a_process(tmp_path, given, environment):
    together, alone = tmp_path / "together", tmp_path / "alone"
    start("one_machine.sh", together, given, {**environment, "PROCESSES": "1"}, "cuda")
    with joined(None, device="cuda") as parallel:
        launch(load_recipe(RECIPE, given), alone, parallel=parallel)
    assert log(together) == pytest.approx(log(alone), abs=1e-3)


def test_a_folder_that_takes_no_files_is_told_at_once(tmp_path, monkeypatch):
    recipe = Recipe(stage="instruct", optim=OptimRecipe(lr=1e-3), run=RunRecipe(batch_size=1))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"/file is no folder: give another one as --out"):
            check_output_folder(folder, recipe)
    access = os.access  # root may write anywhere but on a read-only file system
    monkeypatch.setattr(os, "access", lambda place, mode: mode == os.F_OK and access(place, mode))
    with pytest.raises(
        ConfigError, match=rf"^{tmp_path} cannot be written to \(its file system is"
    ):
        check_output_folder(tmp_path / "a/b", recipe)
