"""The machine's limits are positive and of the right order."""

from benchmarks.limits import measure_limits


def test_limits_of_this_machine() -> None:
    found = measure_limits(megabytes=16, side=256, seconds=0.02)
    assert set(found) == {"bytes_per_s", "float32_per_s", "bfloat16_per_s", "int8_per_s"}
    assert found["bytes_per_s"] > 1e8
    assert found["float32_per_s"] > 1e8
    assert min(found.values()) > 0
