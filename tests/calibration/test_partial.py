"""A run that was killed goes on where it was: the same bytes, nothing done twice, or refused."""

import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lapilli.calibration import run
from lapilli.calibration.builtin import builtin_text
from lapilli.calibration.partial import open_partial_run
from lapilli.checkpoint.write import files, llava
from lapilli.errors import CheckpointError, ConfigError, LapilliError
from tests.calibration.conftest import quantized, write_conversations
from tests.calibration.killed import run_until
from tests.train.faults import kill, start, wait_for

WEIGHTS = "model.safetensors"
GPTQ: dict[str, object] = {"method": "gptq", "number": 4}
LAST_FILE = 9  # settings.json, and three files of each of three layers


@pytest.fixture(scope="module")
def undisturbed(small, conversations, tmp_path_factory):
    """The bytes of a run that nobody killed."""
    target = tmp_path_factory.mktemp("undisturbed") / "q"
    quantized(small, target, {**GPTQ, "samples": conversations})
    return (target / WEIGHTS).read_bytes()


def killed(small, target, options, moment):
    """The folder of layers of a run that was killed before its file of this number."""
    child = start(run_until, moment, small, str(target), options)
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    return target.parent / f".{target.name}.layers"


MOMENTS = [3, *(pytest.param(at, marks=pytest.mark.slow) for at in (0, 1, 2, 4, 5, 6, 8, 9))]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_between_the_files_of_a_layer(small, conversations, tmp_path, undisturbed, moment):
    options = {**GPTQ, "samples": conversations}
    folder = killed(small, tmp_path / "q", options, moment)
    done = max(0, moment - 1) // 3
    assert len(list(folder.glob("report-*.json"))) == done
    assert not (tmp_path / "q").exists()
    kept = {
        file: file.read_bytes() for file in folder.glob("layer-*") if int(file.name[6:11]) < done
    }
    said: list[str] = []
    reports = quantized(small, tmp_path / "q", options, said)
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == undisturbed
    assert len([line for line in said if line.startswith("layer ")]) == 3 - done
    assert ([f"{done} layers are done" in line for line in said].count(True) == 1) == (done > 0)
    assert [report.index for report in reports] == [0, 1, 2]
    assert len(kept) == done
    assert not folder.exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "awq", "mbq"])
@pytest.mark.parametrize("form", ["lapilli", "gemm"])
def test_killed_and_gone_on_with_other_methods(small, conversations, tmp_path, method, form):
    options = {"method": method, "form": form, "rotate": True}
    options |= {} if method == "rtn" else {"samples": conversations, "number": 4}
    quantized(small, tmp_path / "whole", options)
    folder = killed(small, tmp_path / "q", options, 4 if method == "rtn" else 7)
    assert (folder / "report-00000.json").exists()
    quantized(small, tmp_path / "q", options)
    wanted = load_file(tmp_path / "whole" / WEIGHTS)
    found = load_file(tmp_path / "q" / WEIGHTS)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.fixture
def stopped(small, conversations, tmp_path_factory, undisturbed):
    """A copy of the source, a target, and the folder of a run that has done one layer of it."""
    folder = tmp_path_factory.mktemp("stopped")
    source = folder / "source"
    shutil.copytree(small, source)
    shutil.copytree(Path(conversations).parent, folder / "samples")
    samples = folder / "samples" / "conversations.jsonl"
    options = {**GPTQ, "samples": str(samples)}
    layers = killed(str(source), folder / "q", options, 4)
    return source, folder / "q", options, layers


def test_another_run_does_not_go_on_with_it(stopped):
    source, target, options, layers = stopped
    before = {file.name: file.read_bytes() for file in layers.iterdir()}

    def refused(message, config=None, **other):
        with pytest.raises(ConfigError, match=message) as error:
            quantized(str(source), target, {**options, **other}, **(config or {}))
        assert "remove the folder to begin again" in str(error.value)
        assert {file.name: file.read_bytes() for file in layers.iterdir()} == before

    refused("method was 'gptq' and is 'awq'", method="awq")
    refused("samples was 4 and is 3", number=3)
    refused("group_size was 64 and is 32", {"group_size": 32})
    refused("rotate was False and is True", rotate=True)
    refused("levels was 'nonlinear' and is 'zeros'", {"levels": "zeros", "value_bits": 8})
    refused("quantize_tower was False and is True", {"quantize_tower": True})
    file = Path(str(options["samples"]))
    picture = Image.open(file.with_name("1.png"))
    picture.putpixel((5, 5), (1, 2, 3))
    picture.save(file.with_name("1.png"))
    refused("what the calibration samples say or show changed")
    file.write_text(file.read_text("utf-8").replace("square", "shape"), encoding="utf-8")
    refused("what the calibration samples say or show changed")


def test_other_weights_or_another_configuration_do_not_go_on_with_it(stopped):
    source, target, options, _ = stopped
    config = source / "config.json"
    content = json.loads(config.read_text("utf-8"))
    content["text_config"]["rms_norm_eps"] = 1e-3
    whole = config.read_text("utf-8")
    config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="the configuration of the model changed"):
        quantized(str(source), target, options)
    config.write_text(whole, encoding="utf-8")
    tensors = load_file(source / WEIGHTS)
    next(t for name, t in tensors.items() if "layers.2.mlp.up" in name)[0, 0] += 1
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="the weights of the model changed"):
        quantized(str(source), target, options)


def test_a_copied_source_goes_on(stopped, undisturbed):
    """Neither the place of the files nor their time counts."""
    source, target, options, _ = stopped
    for file in source.iterdir():
        os.utime(file, (1, 1))
    quantized(str(source), target, options)
    assert (target / WEIGHTS).read_bytes() == undisturbed


@pytest.mark.parametrize(
    "name",
    ["layer-00000.safetensors", "samples-00001.safetensors", "report-00000.json", "settings.json"],
)
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_files_of_layers_are_named(stopped, name, damage):
    source, target, options, layers = stopped
    whole = (layers / name).read_bytes()
    flipped = whole[:-60] + bytes([whole[-60] ^ 128]) + whole[-59:]
    content = {"cut": whole[: len(whole) // 2], "flipped": flipped, "empty": b""}[damage]
    (layers / name).write_bytes(content)
    with pytest.raises(
        (CheckpointError, ConfigError), match=r"remove (the folder|\S+layers) to begin"
    ):
        quantized(str(source), target, options)
    assert not target.exists()


def test_lost_samples_are_named(stopped):
    source, target, options, layers = stopped
    (layers / "samples-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"samples-00001.safetensors is damaged or missing"):
        quantized(str(source), target, options)


def test_a_limit_on_the_size_of_files_leaves_what_is_done(
    small, conversations, tmp_path, undisturbed
):
    options = {**GPTQ, "samples": conversations}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"q could not be written: .*Raise the limit"):
            quantized(small, tmp_path / "q", options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    quantized(small, tmp_path / "q", options)
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == undisturbed


def test_two_processes_do_not_quantize_into_one_folder(small, conversations, tmp_path):
    with open_partial_run(tmp_path / "q"), pytest.raises(ConfigError, match="another process"):
        quantized(small, tmp_path / "q", {**GPTQ, "samples": conversations})
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_files_of_others_stay(small, conversations, tmp_path):
    folder = tmp_path / ".q.layers"
    (folder / "chapters").mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    quantized(small, tmp_path / "q", {"method": "gptq", "samples": conversations})
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert {file.name for file in folder.iterdir()} == {"chapters", "thesis.txt"}


def test_a_run_that_is_refused_leaves_no_folder(small, tmp_path):
    file = write_conversations(tmp_path, 1, pictures=False)
    with pytest.raises(LapilliError, match="cannot be read"):
        quantized(small, tmp_path / "q", {"samples": str(file.with_name("none.txt"))})
    with pytest.raises(ConfigError, match=r"no calibration sample of 1 from .* has a picture"):
        quantized(small, tmp_path / "q", {"method": "mbq", "samples": str(file)})
    assert sorted(found.name for found in tmp_path.iterdir() if found.is_dir()) == []


@pytest.mark.slow
def test_killed_while_it_computes(small, conversations, tmp_path, undisturbed):
    """By another process, whenever it sees that a layer is done."""
    options = {**GPTQ, "samples": conversations}
    for index in range(2):
        child = start(run_until, -1, small, str(tmp_path / "q"), options)
        report = tmp_path / ".q.layers" / f"report-{index:05d}.json"
        assert wait_for(report.exists)
        kill(child)
    quantized(small, tmp_path / "q", options)
    assert (tmp_path / "q" / WEIGHTS).read_bytes() == undisturbed


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A file of text in the working directory, for a run of two samples of it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.txt").write_text(builtin_text()[:3000], encoding="utf-8")
    return {"method": "gptq", "number": 2, "samples": "s.txt"}


@pytest.mark.parametrize(
    "changed", [{"samples": "./s.txt"}, {"samples": "sub/../s.txt"}, {"samples": "moved.txt"}]
)
def test_the_same_samples_by_another_name_go_on(small, tmp_path, texts, changed):
    killed(small, tmp_path / "q", texts, 4)
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "s.txt", tmp_path / "moved.txt")
    said: list[str] = []
    quantized(small, tmp_path / "q", {**texts, **changed}, said)
    assert "1 layers are done already, and are not quantized again" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto would be another device")
def test_a_device_by_another_name_goes_on_and_other_samples_do_not(small, tmp_path, texts):
    killed(small, tmp_path / "q", texts, 4)
    (tmp_path / "s.txt").write_text(builtin_text()[500:3500], encoding="utf-8")
    with pytest.raises(ConfigError, match="what the calibration samples say or show changed"):
        quantized(small, tmp_path / "q", texts)
    (tmp_path / "s.txt").write_text(builtin_text()[:3000], encoding="utf-8")
    said: list[str] = []
    quantized(small, tmp_path / "q", {**texts, "device": "auto"}, said)
    assert "1 layers are done already, and are not quantized again" in said


def test_plain_rounding_leaves_no_layers_of_another_method_behind(tmp_path):
    folder = tmp_path / ".q.layers"
    with open_partial_run(tmp_path / "q") as unfinished:
        unfinished.begin({"method": "gptq"})
        (folder / "samples-00000.safetensors.part").touch()  # before any layer was done
    with open_partial_run(tmp_path / "q") as unfinished:
        unfinished.begin_anew("rtn")
    assert not folder.exists()
    with open_partial_run(tmp_path / "q") as unfinished:
        unfinished.begin({"method": "gptq"})
        (folder / "report-00000.json").write_text("{}")
    with (
        pytest.raises(ConfigError, match=r"method was 'gptq' and is 'rtn'.*or remove the folder"),
        open_partial_run(tmp_path / "q") as unfinished,
    ):
        unfinished.begin_anew("rtn")
    assert (folder / "report-00000.json").is_file()


def killed_while_verifying(source, target, options):
    """Quantize, and die when the files are written and not verified yet."""
    run.verify_written = lambda _path, loaded: os.kill(os.getpid(), signal.SIGKILL)
    quantized(source, Path(target), options)


@pytest.mark.parametrize("form", ["lapilli", "gemm", "llm-awq"])
def test_a_target_appears_when_it_is_verified(small, tmp_path, texts, form):
    texts = {**texts, "form": form}
    child = start(killed_while_verifying, small, str(tmp_path / "q"), texts)
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert not (tmp_path / "q").exists()
    said: list[str] = []
    quantized(small, tmp_path / "q", texts, said)
    assert "3 layers are done already, and are not quantized again" in said
    assert (tmp_path / "q" / WEIGHTS).is_file()
    assert [found.name for found in tmp_path.iterdir() if found.name.startswith(".")] == []


def test_files_that_differ_when_read_back_do_not_become_the_target(
    small, tmp_path, texts, monkeypatch
):
    (tmp_path / "q").mkdir()
    write = files.write_json

    def spoil(path, content):
        write(path, content)
        for weights in path.parent.glob("*.safetensors"):
            data = bytearray(weights.read_bytes())
            data[-70_000] ^= 16
            weights.write_bytes(data)

    monkeypatch.setattr(llava, "write_json", spoil)
    with pytest.raises(CheckpointError, match=r"differs by up to .* when it is read back"):
        quantized(small, tmp_path / "q", texts)
    assert list((tmp_path / "q").iterdir()) == []
    monkeypatch.undo()
    quantized(small, tmp_path / "q", {**texts, "samples": tmp_path / "s.txt"})
    assert (tmp_path / "q" / WEIGHTS).is_file()
