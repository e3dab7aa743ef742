"""`lapilli quantize SRC DST`, then the result is used like any checkpoint."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.calibration.conftest import text_config, write_conversations
from tests.calibration.test_run import plain_model
from tests.cli.conftest import PROGRAM, Run
from tests.integration.oracle import make_llava, make_oracle

pytestmark = pytest.mark.slow


def test_a_quantized_checkpoint_answers(lapilli: Run, tmp_path: Path, picture: str) -> None:
    target = tmp_path / "llava-small"
    done = lapilli("quantize", "pebble", str(target), "--bits", "4", "--group-size", "64")
    assert done.returncode == 0, done.stderr
    assert "4 bits, groups of 64, nonlinear levels, values in 8 bits, dynamic" in done.stderr
    assert "embeddings are tied" not in done.stderr
    asked = lapilli("ask", "What is in this picture?", picture, "-m", str(target), "-q")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    shown = lapilli("inspect", str(target))
    assert shown.returncode == 0, shown.stderr
    assert "missing" not in shown.stdout


def test_a_checkpoint_of_hugging_face_is_quantized_with_its_chat_template(
    lapilli: Run, tmp_path: Path, picture: str
) -> None:
    source = make_oracle(tmp_path / "hf", next_=False, text="llama", tower="clip").path
    done = lapilli("quantize", str(source), str(tmp_path / "small"), "-q")
    assert done.returncode == 0, done.stderr
    options = ("-q", "--max-new-tokens", "6")
    expected = lapilli("ask", "What?", picture, "-m", str(source), "--quantize", "int4", *options)
    asked = lapilli("ask", "What?", picture, "-m", str(tmp_path / "small"), *options)
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout == expected.stdout
    again = lapilli("quantize", str(tmp_path / "small"), str(tmp_path / "x"), "--bits", "8", "-q")
    assert again.returncode == 2
    assert "is quantized already" in again.stderr


def test_bad_options_are_one_line(lapilli: Run, tmp_path: Path) -> None:
    done = lapilli("quantize", "pebble", str(tmp_path / "x"), "--bits", "5")
    assert done.returncode == 2
    assert done.stderr.strip() == "lapilli: bits must be 3, 4 or 8, found 5"


GPTQ = ("--method", "gptq", "--samples", "4")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_llava(tmp_path_factory.mktemp("small") / "llava", text_config()).path)


def test_from_samples_of_a_file(lapilli: Run, small: str, tmp_path: Path, picture: str) -> None:
    file, target = write_conversations(tmp_path), tmp_path / "llava-q"
    options = ("--method", "mbq", "--calibration", str(file), "--format", "gemm", "--rotate")
    done = lapilli("quantize", small, str(target), *options)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines[0] == f"{file} has 4 samples, fewer than 32"
    assert lines[1] == "computing gradients of the calibration samples"
    assert [line.split(":")[0] for line in lines[2:5]] == [f"layer {i} of 3" for i in (1, 2, 3)]
    assert "4 bits, groups of 128, zero points, weight_only" in lines[5]
    asked = lapilli("ask", "What?", picture, "-m", str(target), "-q", "--max-new-tokens", "3")
    assert asked.returncode == 0, asked.stderr
    quiet = lapilli("quantize", small, str(target), "-q", "--overwrite", "--method", "awq",
                    "--calibration", str(file), "--bits", "3")  # fmt: skip
    assert (quiet.returncode, quiet.stderr) == (0, "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "best"), "method 'best' is unknown: choose rtn, gptq, awq, awq-clip, mbq"),
        (("--format", "exl2"), "format 'exl2' is unknown: choose lapilli, gemm, llm-awq"),
        (("--format", "exl2", "--tower"), "format 'exl2' is unknown"),
        (("--method", "awq", "--device", "abacus"), "device 'abacus' is unknown"),
        (("--method", "awq", "--samples", "0"), "samples must be 1 or more, found 0"),
        (("--method", "awq", "--samples", "-3"), "samples must be 1 or more, found -3"),
        (("--method", "awq", "--bits", "8"), "bits must be 3 or 4 here, found 8"),
        (("--rotate", "--bits", "8"), "bits must be 3 or 4 here, found 8"),
        (("--bits", "3", "--levels", "nonlinear"), "3 bits have linear levels"),
        (("--bits", "3", "--format", "gemm"), "files of format gemm have 4 bits, found 3"),
        (("--bits", "8", "--format", "gemm"), "files of format gemm have 4 bits, found 8"),
        (("--bits", "8", "--levels", "zeros"), "--levels zeros is of 4 bits, and 8 were asked for"),
        (("--levels", "symmetric", "--format", "gemm"), "cannot have levels 'symmetric'"),
        (("--tower", "--format", "llm-awq"), "cannot have a tower in 8 bits"),
        (("--group-size", "48", "--method", "awq"), "group_size must be 32, 64 or 128, found 48"),
        (("--activations", "4"), "activations must be 8 or 16, found 4"),
        (("--calibration", "builtin"), "--calibration changes nothing with --method rtn"),
        (("--samples", "8", "--rotate"), "--samples changes nothing with --method rtn"),
        (("--device", "cuda"), "--device changes nothing with --method rtn"),
        (("--activations", "8", "--format", "gemm"), "--activations changes nothing with"),
        (("--method", "awq", "--calibration", "none.txt"), "none.txt cannot be read"),
        (("--method", "awq", "--calibration", "none.json"), "none.json"),
    ],
)
def test_what_cannot_be_is_one_line(
    lapilli: Run, small: str, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = lapilli("quantize", small, str(tmp_path / "q"), *options, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("lapilli: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert [found.name for found in tmp_path.iterdir()] == []


def test_a_target_that_is_there_or_cannot_be(lapilli: Run, small: str, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    done = lapilli("quantize", small, str(tmp_path / "there"), *GPTQ)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is there already" in done.stderr
    done = lapilli("quantize", small, str(tmp_path / "there" / "file" / "q"), *GPTQ)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is a file" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(lapilli: Run, small: str, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    done = lapilli("quantize", small, str(tmp_path / "closed" / "q"), *GPTQ)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "nothing can be written" in done.stderr


def stopped(target: Path, number: signal.Signals) -> tuple[int, str]:
    """Send a signal once the first layer is done; return the code and what was said."""
    command = [str(PROGRAM), "quantize", "pebble", str(target), *GPTQ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A program in the background is started with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        report = target.parent / f".{target.name}.layers" / "report-00000.json"
        deadline = time.monotonic() + 100
        while not report.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_command_that_was_stopped_goes_on(
    lapilli: Run, tmp_path: Path, number: signal.Signals
) -> None:
    whole = lapilli("quantize", "pebble", str(tmp_path / "whole"), *GPTQ, "-q")
    assert whole.returncode == 0, whole.stderr
    code, said = stopped(tmp_path / "q", number)
    for _ in range(4):  # on a busy machine it may have ended before it was seen
        if code == 0:
            shutil.rmtree(tmp_path / "q")
            code, said = stopped(tmp_path / "q", number)
    assert code == (130 if number == signal.SIGINT else -number), said
    assert "Traceback" not in said
    assert not (tmp_path / "q").exists()
    done = lapilli("quantize", "pebble", str(tmp_path / "q"), *GPTQ)
    assert done.returncode == 0, done.stderr
    assert "layers are done already" in done.stderr
    assert "layer 1 of" not in done.stderr
    name = "model.safetensors"
    assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_plain_rounding_beside_a_killed_run_of_another_method(
    lapilli: Run, small: str, tmp_path: Path
) -> None:
    folder = tmp_path / ".q.layers"
    folder.mkdir()
    (folder / "settings.json").write_text('{"method": "gptq"}')
    (folder / "report-00000.json").write_text("{}")
    done = lapilli("quantize", small, str(tmp_path / "q"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds layers of another run: method was 'gptq' and is 'rtn'" in done.stderr
    assert not (tmp_path / "q").exists()
    (folder / "report-00000.json").unlink()  # no layer was done
    done = lapilli("quantize", small, str(tmp_path / "q"))
    assert done.returncode == 0, done.stderr
    assert [found.name for found in tmp_path.iterdir()] == ["q"]


@pytest.mark.parametrize("options", [(), ("--rotate",)])
def test_a_tower_that_is_not_there_is_noted(
    lapilli: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    source = plain_model(tmp_path / "text")
    done = lapilli("quantize", str(source), str(tmp_path / "q"), "--tower", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("it has no vision tower, and quantize_tower (--tower)") == 1
    done = lapilli("quantize", str(source), str(tmp_path / "plain"), *options)
    assert "vision tower" not in done.stderr


def test_damaged_weights_are_one_line(lapilli: Run, small: str, tmp_path: Path) -> None:
    source = tmp_path / "bad"
    source.mkdir()
    for file in Path(small).iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    next(t for name, t in tensors.items() if name.endswith("layers.1.mlp.up_proj.weight"))[0] = 1e38
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    file = write_conversations(tmp_path)
    options = ("--method", "awq", "--calibration", str(file))
    done = lapilli("quantize", str(source), str(tmp_path / "q"), *options)
    assert done.returncode == 2
    assert "layer 1 makes NaN or infinity" in done.stderr.splitlines()[-1]
