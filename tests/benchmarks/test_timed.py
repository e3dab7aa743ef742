"""The clock around an engine, and the work that is counted."""

import pytest
import torch
from torch import nn

import lapilli
from benchmarks.timed import TimedChat, linear_bytes, prompt_operations
from lapilli.config.model import DecoderConfig
from lapilli.errors import LapilliError
from lapilli.lm import build_language_model
from lapilli.pipeline import Chat

TEXT = tuple(range(20, 30))


@pytest.fixture(scope="module")
def pebble() -> Chat:
    return lapilli.load("pebble", device="cpu", dtype="float32")


def _picture(engine: TimedChat, number: int) -> bytes:
    random = torch.Generator().manual_seed(number)
    return bytes(torch.randint(256, (3 * engine.side**2,), generator=random).tolist())


@pytest.mark.slow
def test_every_token_of_every_answer_has_a_time(pebble: Chat) -> None:
    engine = TimedChat(pebble)
    questions = [((_picture(engine, i),), TEXT) for i in range(3)]
    answers = engine.answer(questions, 7)
    assert [len(times) for times in answers] == [7, 7, 7]
    for times in answers:
        assert times == sorted(times)
        assert times[0] > 0
        assert len(set(times)) == 7  # nothing is guessed, a step gives one token


def test_the_second_question_about_a_picture_reads_the_text_alone(pebble: Chat) -> None:
    engine = TimedChat(pebble)
    seen = _picture(engine, 5)
    engine.answer([((seen,), TEXT)], 2)
    known = engine.engine.prefix_stats.cached_tokens
    engine.answer([((seen,), TEXT[::-1])], 2)
    visual = engine.work(0)["positions"]
    assert (
        engine.engine.prefix_stats.cached_tokens - known
        >= visual - engine.engine.options.block_size
    )


def test_errors_of_the_engine_are_raised(pebble: Chat) -> None:
    engine = TimedChat(pebble)
    with pytest.raises(LapilliError, match="50001 tokens"):
        engine.answer([((), TEXT * 5000)], 2)


def test_a_decoded_token_reads_all_matrices_and_the_head_once(pebble: Chat) -> None:
    model = pebble.model.language_model
    assert isinstance(model, nn.Module)
    names = [name for name, _ in model.named_parameters()]
    tied = not any("lm_head" in name for name in names)
    expected = sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if "norm" not in name and (tied or "embed" not in name)
    )
    assert linear_bytes(model) == expected


@pytest.mark.slow
def test_packed_weights_are_counted_as_they_are_stored(pebble: Chat) -> None:
    plain = TimedChat(pebble).facts["weight_bytes"]
    packed = TimedChat(lapilli.load("pebble", device="cpu", quantize="int8")).facts["weight_bytes"]
    assert plain / 4 <= packed < plain / 3.5


@pytest.mark.parametrize("positions", [1, 7, 100])
def test_operations_are_two_per_weight_and_position(positions: int) -> None:
    config = DecoderConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        norm_eps=1e-5,
        rope_theta=1e4,
        max_positions=64,
    )
    model = build_language_model(config)
    assert isinstance(model, nn.Module)
    layers = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n)
    attention = 3 * positions**2 * 64
    expected = 2 * (layers * positions + attention + 300 * 64)
    assert prompt_operations(config, positions) == expected
