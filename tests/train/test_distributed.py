import signal
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lapilli.errors import ConfigError
from lapilli.train.distributed import (
    SINGLE_PROCESS,
    ParallelContext,
    RankInfo,
    is_network_error,
    joined,
    layers_of,
    rank_info_of,
    shard,
)
from lapilli.train.trainer.loop import train
from tests.model.conftest import build_tiny
from tests.train import cluster
from tests.train.conftest import new_recipe, new_regression

TALK = {"gradient_accumulation_steps": 4, "steps": 6, "save_every": 100, "evaluate_every": 3}
RUN = {"gradient_accumulation_steps": 4, "steps": 12, "save_every": 100}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses and weights of the same run in one process."""
    folder, task = tmp_path_factory.mktemp("alone"), new_regression()
    train(task, new_recipe(**RUN), folder / "run")
    return cluster.losses(folder), dict(task.model.named_parameters())


@pytest.mark.cluster
@pytest.mark.parametrize(("sharding", "size"), [("ddp", 3), ("fsdp", 2)])
def test_several_processes_take_the_steps_of_one(tmp_path, alone, sharding, size):
    """Three share four micro-batches: the first process takes two of them."""
    answers = cluster.together(cluster.run_regression, size, tmp_path, sharding, RUN)
    losses, weights = alone
    assert cluster.losses(tmp_path) == pytest.approx(losses, abs=1e-5)
    for answer in answers:
        assert not isinstance(answer, Exception), answer
        for name, weight in weights.items():
            torch.testing.assert_close(answer[name], weight.detach(), atol=1e-5, rtol=0)


@pytest.mark.cluster
def test_means_of_means_are_the_same_in_several_processes(tmp_path):
    """The micro-batches have 2 to 4 rows each, so their means weigh otherwise than their rows."""
    run = {**RUN, "steps": 4, "reduction": "llava"}
    task = new_regression()
    train(task, new_recipe(**run), tmp_path / "alone" / "run")
    answers = cluster.together(cluster.run_regression, 2, tmp_path, "ddp", run)
    expected = cluster.losses(tmp_path / "alone")
    assert cluster.losses(tmp_path) == pytest.approx(expected, abs=1e-5)
    is_the_same(answers[1], {name: p.detach() for name, p in task.model.named_parameters()})
    by_tokens = tmp_path / "tokens"
    train(new_regression(), new_recipe(**{**run, "reduction": "tokens"}), by_tokens / "run")
    assert cluster.losses(by_tokens)[0] != pytest.approx(expected[0], abs=1e-3)


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """The same of a tiny vision language model, by what of it is trained."""

    @cache
    def talk(kind):
        folder = tmp_path_factory.mktemp(kind)
        return folder, cluster.run_talk(None, folder, "ddp", kind, TALK)

    return talk


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("kind", "sharding", "size"),
    [
        ("full", "ddp", 2),
        ("full", "ddp", 4),
        ("full", "fsdp", 2),
        ("full", "fsdp", 4),
        ("frozen", "fsdp", 4),
        ("lora", "ddp", 4),
        ("lora", "fsdp", 2),
    ],
)
def test_a_vision_language_model_learns_the_same(tmp_path, talks, kind, sharding, size):
    folder, weights = talks(kind)
    answers = cluster.together(cluster.run_talk, size, tmp_path, sharding, kind, TALK)
    for answer in answers:
        assert isinstance(answer, dict), answer
    assert cluster.losses(tmp_path) == pytest.approx(cluster.losses(folder), abs=1e-5)
    is_the_same(answers[0], weights)
    for name in weights:
        assert torch.equal(answers[-1][name], answers[0][name])


@pytest.mark.gpu
@pytest.mark.cluster
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two CUDA devices here")
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_gpus_learn_the_same(tmp_path, talks, sharding):
    folder, _ = talks("full")
    job = partial(cluster.run_talk, device="cuda")
    answers = cluster.together(job, 2, tmp_path, sharding, "full", TALK)
    assert all(isinstance(answer, dict) for answer in answers), answers
    assert cluster.losses(tmp_path) == pytest.approx(cluster.losses(folder), rel=5e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.filterwarnings("default")  # what nccl says of a group of one
def test_pieces_of_one_gpu_have_the_gradients_of_the_whole(tmp_path):
    """One process alone meets nobody, so nccl is put under it by hand."""
    whole, pieces = (cluster.Talk("full").model.to("cuda").train() for _ in range(2))
    batch, _ = cluster.Talk("full").batch(0, 0)
    meeting = f"file://{tmp_path / 'meeting'}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=meeting, rank=0, world_size=1)
    try:
        shard(pieces, 1, torch.device("cuda", 0), "float32")
        for model in (whole, pieces):
            model(batch).total.backward()
        for (name, one), other in zip(whole.named_parameters(), pieces.parameters(), strict=True):
            if one.grad is not None:
                found = other.grad.full_tensor()
                torch.testing.assert_close(found, one.grad, atol=1e-4, rtol=1e-3, msg=name)
    finally:
        dist.destroy_process_group()


def is_the_same(found, expected):
    for name, weight in expected.items():
        # A softmax does not see the bias of its keys: Adam scales up a gradient of rounding.
        atol = 1e-3 if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(found[name], weight, atol=atol, rtol=0, msg=name)


LONG = {"gradient_accumulation_steps": 4, "save_every": 2, "evaluate_every": 2, "keep_best": True}
OPTIM = {"lr": 0.01, "schedule": "constant", "ema": 0.9}


@pytest.mark.cluster
def test_a_run_goes_on_in_another_number_of_processes(tmp_path):
    alone, parts = tmp_path / "alone", tmp_path / "parts"
    weights = cluster.run_talk(None, alone, "ddp", "lora", {**LONG, "steps": 10}, OPTIM)
    for steps, size, sharding in ((2, 4, "fsdp"), (4, 2, "fsdp"), (6, 1, "ddp"), (8, 2, "fsdp")):
        run = {**LONG, "steps": steps}
        cluster.together(cluster.run_talk, size, parts, sharding, "lora", run, OPTIM)
        in_pieces = (parts / "run" / "state").exists()
        assert in_pieces == (size > 1)
        assert in_pieces != (parts / "run" / "state.pt").exists()
    run = {**LONG, "steps": 10}
    other = cluster.together(cluster.run_talk, 2, parts, "fsdp", "lora", {**run, "seed": 1}, OPTIM)
    for answer in other:
        assert "000008 is of another run (run.seed: the state says 0" in str(answer)
    answers = cluster.together(cluster.run_talk, 2, parts, "ddp", "lora", run, OPTIM)
    assert isinstance(answers[0], dict), answers
    assert cluster.losses(parts) == pytest.approx(cluster.losses(alone), abs=1e-5)
    is_the_same(answers[0], weights)


@pytest.mark.cluster
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_killed_process_is_named_and_the_run_goes_on(tmp_path, alone, sharding):
    run = {**RUN, "save_every": 3}
    dies = (2, 7, cluster.kill_me)
    answers = cluster.together(cluster.run_regression, 4, tmp_path, sharding, run, dies)
    assert answers[2] == -signal.SIGKILL
    for rank in (0, 1, 3):
        assert "ProcessLostError: process 2 of 4 is gone without a word" in str(answers[rank])
    answers = cluster.together(cluster.run_regression, 4, tmp_path, sharding, run)
    losses, weights = alone
    assert cluster.losses(tmp_path) == pytest.approx(losses, abs=1e-5)
    is_the_same(answers[3], {name: p.detach() for name, p in weights.items()})


@pytest.mark.cluster
def test_a_process_that_fails_tells_the_others_why(tmp_path):
    dies = (1, 3, cluster.fail)
    answers = cluster.together(cluster.run_regression, 2, tmp_path, "ddp", RUN, dies)
    assert "ValueError: row 17 has no picture" in str(answers[1])
    assert "process 1 of 2: ValueError: row 17 has no picture. start the same" in str(answers[0])


@pytest.mark.cluster
def test_killed_while_saving_pieces_the_earlier_ones_are_whole(tmp_path, alone):
    run = {**RUN, "save_every": 3}
    answers = cluster.together(cluster.run_killed_while_saving, 2, tmp_path, run, 6)
    assert answers[0] == -signal.SIGKILL
    assert "process 0 of 2" in str(answers[1])
    assert [path.name for path in sorted((tmp_path / "run" / "state").iterdir())] == [
        "000003",
        "000006.part",
    ]
    answers = cluster.together(cluster.run_regression, 2, tmp_path, "fsdp", run)
    assert cluster.losses(tmp_path) == pytest.approx(alone[0], abs=1e-5)
    assert isinstance(answers[1], dict)


def test_the_rank_is_read_from_what_torchrun_sets():
    variables = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a"}
    assert rank_info_of({"PATH": "/bin"}) is None
    assert rank_info_of({**variables, "MASTER_PORT": "29500"}) == RankInfo(3, 8, 1, "env://")
    with pytest.raises(
        ConfigError, match=r"WORLD_SIZE is 8 but MASTER_PORT is not set: start with"
    ):
        rank_info_of(variables)
    with pytest.raises(ConfigError, match=r"RANK=three.*expected whole numbers"):
        rank_info_of({**variables, "MASTER_PORT": "29500", "RANK": "three"})


def test_one_process_joins_no_group(monkeypatch):
    with joined(RankInfo(0, 1), device="cpu") as parallel:
        assert parallel == SINGLE_PROCESS
    with pytest.raises(ConfigError, match="device 'gpu' is unknown: try auto, cpu, cuda"):
        joined(None, device="gpu").__enter__()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)  # as a device that is there does
    with joined(None, device="cuda:1") as parallel:
        assert parallel.device == torch.device("cuda", 1)


def test_one_device_for_several_processes_is_refused():
    with pytest.raises(ConfigError, match="device cuda:1 for several processes: say cuda"):
        joined(RankInfo(0, 2), device="cuda:1").__enter__()


def test_every_micro_batch_belongs_to_one_process():
    owned = [list(ParallelContext(rank, 3).micro_batches(7)) for rank in range(3)]
    assert owned == [[0, 3, 6], [1, 4], [2, 5]]
    with pytest.raises(
        ConfigError, match=r"gradient_accumulation_steps is 7 in 3 processes.*a multiple of 3"
    ):
        ParallelContext(0, 3, "fsdp").micro_batches(7)


def test_a_rank_outside_of_the_group_is_refused():
    with pytest.raises(ConfigError, match="process 4 of 4: ranks are 0 to 3"):
        ParallelContext(4, 4)


def test_pieces_of_two_number_formats_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"0.bias is float32, 1.bias is bfloat16.*float32"):
        shard(model, 2, torch.device("cpu"), "float32")


def test_layers_are_the_members_of_the_outermost_lists():
    model = build_tiny()
    found = [type(layer).__name__ for layer in layers_of(model)]
    assert found == ["DecoderLayer"] * 2 + ["VisionLayer"] * 2


def test_other_errors_are_not_taken_for_the_network():
    assert not is_network_error(RuntimeError("CUDA out of memory"))
    assert is_network_error(RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed"))
    wrapped = ValueError("while summing")
    wrapped.__cause__ = dist.DistNetworkError("gone")
    assert is_network_error(wrapped)
