"""A folder changes in one step: killed, out of space or interrupted, the old one stays whole."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lapilli.checkpoint.keymaps import ORIGINAL, PROJECTOR
from lapilli.checkpoint.write import files
from lapilli.checkpoint.write.files import (
    Deferred,
    check_target,
    new_directory,
    write_json,
    write_pickled,
    write_safetensors,
    write_weights,
)
from lapilli.errors import CheckpointError

WRITER = """
import sys
from pathlib import Path
import torch
from lapilli.checkpoint.write.files import new_directory, write_json, write_weights

path = Path(sys.argv[1])
number = 0
while True:
    number += 1
    tensors = {f"t{i}": torch.full((200_000,), float(number)) for i in range(6)}
    with new_directory(path, overwrite=True) as folder:
        write_weights(folder, tensors, shard_bytes=2_000_000)
        write_json(folder / "config.json", {"number": number})
    print(number, flush=True)
"""


def numbers_in(path):
    """Every number that the folder speaks of: one, if it is whole."""
    found = {int(float(line)) for line in [_config_number(path)]}
    for name in sorted(path.glob("*.safetensors")):
        for tensor in load_file(name).values():
            found |= {int(value) for value in tensor.unique()}
    assert len(list(path.glob("*.safetensors"))) == 3
    return found


def _config_number(path):
    return (path / "config.json").read_text().split(":")[1].strip(" }\n")


@pytest.mark.slow
def test_killed_while_saving_one_version_is_whole(tmp_path):
    path = tmp_path / "results"
    for delay in (0.0, 0.003, 0.006, 0.01, 0.02):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        for _ in range(2):
            writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        assert len(numbers_in(path)) == 1
    with new_directory(path, overwrite=True) as folder:
        (folder / "new").write_text("")
    assert [found.name for found in tmp_path.iterdir()] == ["results"]


def saved(path, value):
    with new_directory(path, overwrite=True) as folder:
        write_weights(folder, {"t": torch.full((100_000,), value)})
        write_json(folder / "config.json", {})


@pytest.mark.parametrize(
    ("inside", "found"),
    [
        (["notes.txt"], "no adapter_config.json or config.json"),
        (["config.json", "runs/source/config.json"], "a folder 'runs'"),
    ],
)
def test_only_a_checkpoint_is_overwritten(tmp_path, inside, found):
    for name in inside:
        (tmp_path / "there" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / name).write_text("{}")
    with pytest.raises(CheckpointError, match=f"there is {found} in it"):
        saved(tmp_path / "there", 1.0)
    assert all((tmp_path / "there" / name).read_text() == "{}" for name in inside)


def test_a_checkpoint_with_a_tower_beside_is_overwritten(tmp_path):
    saved(tmp_path / "there", 1.0)
    (tmp_path / "there" / "vision_tower").mkdir()
    saved(tmp_path / "there", 2.0)
    assert load_file(tmp_path / "there" / "model.safetensors")["t"].unique().tolist() == [2.0]


def test_the_folder_that_a_link_leads_to_is_written(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("full", "disk"), ("dangling", "disk/new"), ("loop", "loop")):
        (tmp_path / name).symlink_to(target)
    saved(tmp_path / "dangling", 1.0)
    assert (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "disk" / "new" / "model.safetensors").exists()
    with pytest.raises(CheckpointError, match="a folder 'new' in it"):
        saved(tmp_path / "full", 1.0)
    saved(tmp_path / "disk" / "new", 2.0)
    with pytest.raises(CheckpointError, match="loop"):
        saved(tmp_path / "loop", 1.0)


def test_what_cannot_be_replaced_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="file is no folder"):
        check_target(tmp_path / "file", overwrite=True)
    for path in (Path(), Path(".."), tmp_path):
        with pytest.raises(CheckpointError, match="holds the working directory"):
            check_target(path, overwrite=True)


ENDED = """
import sys, time
from pathlib import Path
from lapilli.checkpoint.write.files import new_directory
from lapilli.cli.main import end_in_order

end_in_order()
with new_directory(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_end_leaves_nothing_half_written(tmp_path, number):
    command = [sys.executable, "-c", ENDED, str(tmp_path / "results")]
    pipe = subprocess.PIPE
    # Where the tests run in the background some signals are ignored.
    with subprocess.Popen(
        command,
        stdout=pipe,
        stderr=pipe,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        writer.send_signal(number)
        writer.communicate(timeout=60)
    assert writer.returncode in (128 + number, -number)
    assert list(tmp_path.iterdir()) == []


def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    path = tmp_path / "results"
    saved(path, 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(
            CheckpointError,
            match=r"results could not be written: File too large; .*untouched\. Raise the limit on "
            r"the size of a file \(ulimit -f\)",
        ):
            saved(path, 2.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert load_file(path / "model.safetensors")["t"].unique().tolist() == [1.0]
    assert [found.name for found in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, r"No space left on device \(\d+ bytes are free on that disk\); .*Make room"),
        (errno.EDQUOT, r"Disk quota exceeded; .*Make room within your quota"),
        (errno.EFBIG, r"File too large; .*Raise the limit on the size of a file"),
    ],
)
def test_what_is_full_is_named(tmp_path, number, says):
    with (
        pytest.raises(CheckpointError, match=f"results could not be written: {says}") as told,
        new_directory(tmp_path / "results"),
    ):
        raise OSError(number, os.strerror(number))
    assert ("bytes are free" in str(told.value)) == (number == errno.ENOSPC)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_checked_before_it_takes_its_place(tmp_path):
    path = tmp_path / "results"
    saved(path, 1.0)
    seen: list[list[str]] = []

    def check(folder: Path) -> None:
        seen.append([file.name for file in folder.iterdir()])
        assert (path / "model.safetensors").is_file()  # the earlier one
        raise CheckpointError("damaged")

    with (
        pytest.raises(CheckpointError, match="damaged"),
        new_directory(path, overwrite=True, check=check) as folder,
    ):
        (folder / "config.json").write_text("{}")
    assert seen == [["config.json"]]
    assert load_file(path / "model.safetensors")["t"].unique().tolist() == [1.0]
    assert [found.name for found in tmp_path.iterdir()] == ["results"]


def test_other_errors_are_raised_unchanged(tmp_path):
    with pytest.raises(PermissionError), new_directory(tmp_path / "results"):
        raise PermissionError("not yours")
    assert list(tmp_path.iterdir()) == []


def test_without_renameat2_the_old_folder_is_renamed_first(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    path = tmp_path / "results"
    saved(path, 1.0)
    saved(path, 2.0)
    assert load_file(path / "model.safetensors")["t"].unique().tolist() == [2.0]
    assert [found.name for found in tmp_path.iterdir()] == ["results"]


def test_half_written_folders_are_removed(tmp_path):
    left = tmp_path / ".results.part" / "new"
    left.mkdir(parents=True)
    (left / "half").write_text("")
    saved(tmp_path / "results", 1.0)
    assert [found.name for found in tmp_path.iterdir()] == ["results"]


TENSORS = {
    "b.wide": torch.randn(3, 5, dtype=torch.float64),
    "a.half": torch.randn(7).bfloat16(),
    "c.view": torch.randn(4, 6).T,
    "d.bytes": torch.arange(5, dtype=torch.uint8),
    "e.empty": torch.empty(0, 3),
    "f.one": torch.tensor(2.5),
}


def test_safetensors_reads_the_file(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_another_format_is_made_while_writing(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS, dtype=torch.float16)
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["b.wide"], TENSORS["b.wide"].half())
    assert found["d.bytes"].dtype == torch.uint8


@given(st.lists(st.sampled_from([1, 7, 16, 32, 64, 100, 640]), min_size=1, max_size=6))
@settings(max_examples=20, deadline=None)
def test_whole_lines_of_the_cache_begin_at_one(tmp_path_factory, lengths):
    kinds = [torch.float32, torch.uint8, torch.float16, torch.int8]
    tensors = {f"{i}": torch.ones(n, dtype=kinds[i % 4]) for i, n in enumerate(lengths)}
    path = tmp_path_factory.mktemp("lines") / "x.safetensors"
    write_safetensors(path, tensors)
    raw = path.read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:length])
    for name, tensor in tensors.items():
        begin = length + header[name]["data_offsets"][0]
        assert begin % tensor.itemsize == 0
        if tensor.nbytes % 64 == 0:
            assert begin % 64 == 0
    assert load_file(path).keys() == tensors.keys()


def test_a_long_tensor_is_written_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_PIECE", 7)
    write_safetensors(tmp_path / "x.safetensors", TENSORS)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_weights_get_the_names_of_a_layout_and_keep_their_formats(tmp_path):
    state = {f"{PROJECTOR}0.weight": torch.randn(3, 5), f"{PROJECTOR}2.weight": torch.randn(4)}
    formats = {f"{PROJECTOR}2.weight": torch.bfloat16, "of another model": torch.float16}
    write_weights(tmp_path, state, ORIGINAL, dtype=formats, shard_bytes=60)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    found = {}
    for file in set(index["weight_map"].values()):
        found |= load_file(tmp_path / file)
    assert found.keys() == {"model.mm_projector.0.weight", "model.mm_projector.2.weight"}
    assert found["model.mm_projector.0.weight"].dtype == torch.float32
    assert found["model.mm_projector.2.weight"].dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="queries has no name in the layout 'original LLaVA'"):
        write_weights(tmp_path, {"queries": torch.zeros(1)}, ORIGINAL)


def test_deferred_tensors_live_one_at_a_time(tmp_path):
    alive, most = [0], [0]

    class Counted(torch.Tensor):
        def __del__(self):
            alive[0] -= 1

    def make():
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return torch.ones(10).as_subclass(Counted)

    deferred = {f"t{i}": Deferred(torch.Size((10,)), torch.float32, make) for i in range(5)}
    write_safetensors(tmp_path / "x.safetensors", deferred)
    assert len(load_file(tmp_path / "x.safetensors")) == 5
    assert most[0] <= 2


def test_a_pickled_view_does_not_bring_its_storage(tmp_path):
    write_pickled(tmp_path / "x.bin", {"t": torch.zeros(1_000_000)[:3]})
    assert (tmp_path / "x.bin").stat().st_size < 5_000
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["t"], torch.zeros(3))


def mounted(monkeypatch, path):
    """Make a folder one that is mounted: it cannot be renamed, and the system's table has it."""
    table = path.parent / "mountinfo"
    table.write_bytes(b"29 1 0:25 / %s rw - tmpfs tmpfs rw\n" % bytes(path).replace(b" ", rb"\040"))
    monkeypatch.setattr(files, "_MOUNTS", table)
    busy(monkeypatch, path)


def busy(monkeypatch, path):
    rename = os.rename

    def refused(one, other, **options):
        if path in (Path(one), Path(other)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(one), None, str(other))
        rename(one, other, **options)

    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", refused)


@pytest.mark.parametrize("known", [True, False])
def test_an_empty_mount_point_is_filled(tmp_path, monkeypatch, known):
    path = tmp_path / "a disk"
    path.mkdir()
    (mounted if known else busy)(monkeypatch, path)
    if known:  # what a killed process leaves
        (path / ".lapilli.part" / "new").mkdir(parents=True)
    saved(path, 1.0)
    assert {item.name for item in path.iterdir()} == {"config.json", "model.safetensors"}
    assert {item.name for item in tmp_path.iterdir()} <= {"a disk", "mountinfo"}
    with pytest.raises(CheckpointError, match="is a mount point, which cannot be replaced: give a"):
        saved(path, 2.0)
    assert load_file(path / "model.safetensors")["t"].unique().tolist() == [1.0]


def test_a_file_in_the_way_is_found_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for inside in ("file/q", "file/q/r"):
        with pytest.raises(CheckpointError, match=r"Not a directory: .*file is a file"):
            check_target(tmp_path / inside)


def test_a_folder_that_nobody_may_write_to_is_found_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may everything
    with pytest.raises(CheckpointError, match="nothing can be written in"):
        check_target(tmp_path / "new")


def test_json_does_not_name_what_it_cannot(tmp_path):
    with pytest.raises(CheckpointError, match=r"^config.json cannot name '/x/odd.*, as its name"):
        write_json(tmp_path / "config.json", {"a": "\xe9", "mm_vision_tower": "/x/odd\udcff/tower"})
    assert not (tmp_path / "config.json").exists()
