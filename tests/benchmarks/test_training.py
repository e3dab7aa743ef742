"""The benchmark of training on a tiny shape: both engines do the same, packed rows are shorter."""

import pytest

from benchmarks.checkpoint import write_checkpoint
from benchmarks.training import MIXTURE, batch_of_rows, draw_row, measure, measure_packing


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_checkpoint("tiny", tmp_path_factory.mktemp("tiny"), layers=1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft with this transformers
def test_both_engines_take_the_same_steps(files):
    ours, theirs = (measure(name, files, "float32", 2) for name in ("lapilli", "transformers"))
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], abs=1e-4)
    assert ours["losses"][2] == pytest.approx(theirs["losses"][2], abs=0.05)  # other A, drawn anew
    assert ours["losses"][2] < ours["losses"][0] - 0.01
    assert len(ours["seconds"]) == len(ours["cpu_seconds"]) == 2


@pytest.mark.slow
def test_packed_and_padded_steps_are_timed_in_turn(files):
    found = measure_packing(files, "float32", 1)
    assert len(found["padded"]) == len(found["packed"]) == 1


def test_the_batch_has_two_pictures_and_the_mixture_long_and_short_samples():
    batch = batch_of_rows()
    assert [span.length for span in batch.spans] == [576, 576]
    assert batch.num_valid == 120
    assert sum(MIXTURE) < len(MIXTURE) * max(MIXTURE) / 4
    assert len(draw_row(0, 50, has_picture=False).prompt) == 50
