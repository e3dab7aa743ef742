"""Sizes and grids, against the numbers of the original and of transformers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.geometry import Grid, ImageSize, fit_within, with_shortest_edge
from lapilli.modality.image.modes.anyres import best_resolution, tile_grid, unpad_margins, unpadded

PINPOINTS = tuple(
    ImageSize(height, width)
    for width, height in [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
)
sizes = st.builds(ImageSize, st.integers(1, 3000), st.integers(1, 3000))


def golden_rows(conformance: Path) -> list[tuple[tuple[ImageSize, ...], int, dict]]:
    rows = []
    for path in sorted((conformance / "cases").glob("*/_images/cases.json")):
        for case in json.loads(path.read_text("utf-8"))["cases"]:
            if case["op"] != "geometry":
                continue
            points = case["input"]["pinpoints"]
            points = json.loads(points) if isinstance(points, str) else points
            pinpoints = tuple(ImageSize(height, width) for width, height in points)
            rows += [(pinpoints, case["input"]["tile"], row) for row in case["expect"]["rows"]]
    return rows


@pytest.mark.slow
def test_every_golden_row(conformance):
    rows = golden_rows(conformance)
    assert len(rows) > 100
    for pinpoints, tile, row in rows:
        size = ImageSize(row["size"][1], row["size"][0])
        best = best_resolution(size, pinpoints)
        assert [best.width, best.height] == row["best"], size
        grid = tile_grid(best, tile)
        assert [grid.columns, grid.rows] == row["grid"], size
        patches = tile // 14
        kept = unpadded(size, Grid(grid.rows * patches, grid.columns * patches))
        assert list(kept) == row["unpadded_hw"], size
        assert kept.rows * (kept.columns + 1) == row["n_features"], size
        inner = fit_within(size, best)
        left, top = (best.width - inner.width) // 2, (best.height - inner.height) // 2
        assert [left, top, left + inner.width, top + inner.height] == row["pasted_bbox"], size


def test_the_first_of_equal_resolutions_wins():
    square = ImageSize(336, 336)
    assert best_resolution(square, PINPOINTS) == ImageSize(672, 336)
    assert best_resolution(square, PINPOINTS[1:]) == ImageSize(336, 672)


def test_no_resolutions():
    with pytest.raises(ValueError, match="empty"):
        best_resolution(ImageSize(1, 1), ())


def test_truncation_differs_from_rounding():
    # 47 * (24 / 376) should be 3 and is 2.9999999999999996.
    size, whole = ImageSize(47, 376), Grid(48, 24)
    assert unpad_margins(size, whole) == Grid(23, 0)
    assert unpad_margins(size, whole, rounds=True) == Grid(22, 0)
    assert unpadded(size, whole) == Grid(2, 24)
    assert unpadded(size, whole, rounds=True) == Grid(4, 24)


@settings(deadline=None)  # the first call imports transformers
@given(sizes)
def test_best_resolution_agrees_with_transformers(size):
    processing = pytest.importorskip("transformers.image_processing_utils")
    points = [list(point) for point in PINPOINTS]
    assert best_resolution(size, PINPOINTS) == processing.select_best_resolution(size, points)


@settings(deadline=None)
@given(sizes, st.integers(1, 5), st.integers(1, 5))
def test_rounded_unpadding_agrees_with_transformers(size, rows, columns):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llava_next.modeling_llava_next")
    whole = Grid(rows * 24, columns * 24)
    expected = modeling.unpad_image(torch.zeros(1, *whole), list(size)).shape[1:]
    assert unpadded(size, whole, rounds=True) == tuple(expected)


@given(sizes, sizes)
def test_a_fitted_picture_touches_two_sides_and_is_never_empty(size, target):
    inner = fit_within(size, target)
    assert 1 <= inner.height <= target.height
    assert 1 <= inner.width <= target.width
    assert inner.height == target.height or inner.width == target.width


@given(sizes, st.integers(1, 400))
def test_the_shorter_side_becomes_the_edge(size, edge):
    resized = with_shortest_edge(size, edge)
    assert min(resized) == edge
    assert (resized.height >= resized.width) == (size.height >= size.width) or min(resized) == max(
        resized
    )


def test_sizes_print_width_first():
    assert str(ImageSize(height=20, width=2000)) == "2000x20"
