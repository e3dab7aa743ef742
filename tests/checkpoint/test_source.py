"""Directories, hub ids and the embedded model; the hub is replaced by a function."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import errors

from lapilli.checkpoint import source
from lapilli.checkpoint.source import HUB_ID, find_directory, is_local, resolve
from lapilli.errors import CheckpointError, MissingFileError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Calls of snapshot_download; `fails` is raised instead of answering."""

    answers = SimpleNamespace(calls=[], fails=None, files=("model.safetensors",))

    def snapshot_download(repository, **options):
        answers.calls.append((repository, options))
        if answers.fails is not None:
            raise answers.fails
        for pattern in options["allow_patterns"]:
            for name in answers.files:
                if Path(name).match(pattern):
                    (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return answers


def test_directory_is_taken_before_the_hub(hub, tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("owner/name") == tmp_path / "owner" / "name"
    assert is_local("owner/name")
    assert hub.calls == []


def test_hub_id_with_revision(hub, tmp_path):
    assert resolve("owner/some-name@v1.5") == tmp_path
    names = {repository for repository, _ in hub.calls}
    assert names == {"owner/some-name"}
    assert all(options["revision"] == "v1.5" for _, options in hub.calls)
    fetched = [pattern for _, options in hub.calls for pattern in options["allow_patterns"]]
    assert "*.safetensors" in fetched
    assert "pytorch_model*.bin" not in fetched


def test_pickles_are_fetched_only_without_safetensors(hub):
    hub.files = ("pytorch_model.bin",)
    resolve("owner/name")
    fetched = [pattern for _, options in hub.calls for pattern in options["allow_patterns"]]
    assert "pytorch_model*.bin" in fetched


def test_without_weights_only_small_files_are_fetched(hub):
    resolve("owner/name", weights=False)
    assert len(hub.calls) == 1
    assert "*.safetensors" not in hub.calls[0][1]["allow_patterns"]


REQUEST = SimpleNamespace(headers={}, url="u", method="GET")
RESPONSE = SimpleNamespace(headers={}, request=REQUEST, status_code=404)


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (errors.LocalEntryNotFoundError("offline"), r"cannot be reached \(offline\?\)"),
        (
            errors.GatedRepoError("gated", response=RESPONSE),
            "'owner/name' is gated: accept its terms",
        ),
        (errors.RevisionNotFoundError("no", response=RESPONSE), "has no revision 'v9'"),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "nor a repository of the hub"),
        (
            errors.HfHubHTTPError("status 500", response=RESPONSE),
            "could not be fetched .*: status 500",
        ),
        (OSError("disk full"), "could not be fetched from the hub: disk full"),
    ],
)
def test_refusals_of_the_hub_are_explained(hub, error, match):
    hub.fails = error
    with pytest.raises(MissingFileError, match=match):
        resolve("owner/name@v9")


@pytest.mark.parametrize("name", ["./here", "a/b/c", "/a", "a b", "owner/", "", "-x/y"])
def test_names_that_are_no_hub_id_are_refused(hub, name):
    assert HUB_ID.fullmatch(name) is None
    if name:
        with pytest.raises(MissingFileError, match="is neither a directory nor a hub id such as"):
            resolve(name)
    assert hub.calls == []


def test_relative_names_start_beside_the_checkpoint(tmp_path, monkeypatch):
    checkpoint, elsewhere = tmp_path / "checkpoint", tmp_path / "elsewhere"
    for folder in (checkpoint / "tower", elsewhere / "tower"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    assert find_directory("tower", (checkpoint,)) == checkpoint / "tower"
    assert find_directory("tower") == elsewhere / "tower"
    assert find_directory("nothing", (checkpoint,)) is None


def test_a_file_is_named(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        find_directory(str(tmp_path / "weights.bin"))


def test_pebble_is_embedded(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "files", lambda _: tmp_path)
    with pytest.raises(MissingFileError, match=r"'pebble' is not in this installation: run `make"):
        resolve("pebble")
    (tmp_path / "pebble").mkdir()
    (tmp_path / "pebble" / "config.json").touch()
    assert resolve("pebble") == tmp_path / "pebble"
    assert is_local("pebble")
