"""What worker processes find comes back whole, and is kept."""

import torch
from safetensors.torch import load_file, save_file

from comparison.workers import Workers


def mapped(folder, *, seed=0):
    """Weights that lie in the file of a checkpoint, and have no memory of their own."""
    path = folder / f"{seed}.safetensors"
    save_file({"weight": torch.full((1024,), float(seed))}, path)
    file = torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    return load_file(path)["weight"], file


def test_weights_that_are_mapped_come_back(tmp_path):
    pool = Workers(1, tmp_path / "kept")
    try:
        weight, file = pool.start("mapped", mapped, tmp_path, seed=3)()
    finally:
        pool.close()
    assert weight.eq(3).all()
    assert bytes(file.tolist()) == (tmp_path / "3.safetensors").read_bytes()
    assert pool.seconds["mapped"] > 0


def test_what_is_kept_is_not_done_again(tmp_path):
    for _ in range(2):
        found = Workers(0, tmp_path / "kept").start("mapped", mapped, tmp_path, seed=1)()
        assert found[0].eq(1).all()
        (tmp_path / "1.safetensors").unlink(missing_ok=True)
    assert not (tmp_path / "1.safetensors").exists()
