"""Attention inside the pieces of a row against the formula under a block-diagonal mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapilli.nn.segments import Segments

LENGTHS = st.lists(
    st.lists(st.integers(1, 9) | st.integers(31, 39), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def masked(q, k, v, lengths, *, scale, window, slopes):
    """Everything at once: scores of all pairs, those of other pieces and of later ones hidden."""
    rows, heads, total, _ = q.shape
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    at = torch.arange(total)
    distance = at[:, None] - at
    out = torch.zeros_like(q)
    for row in range(rows):
        piece = torch.full((total,), -1)
        for number, length in enumerate(lengths[row]):
            start = sum(lengths[row][:number])
            piece[start : start + length] = number
        seen = (piece[:, None] == piece) & (piece >= 0)[:, None] & (distance >= 0)
        if window is not None:
            seen &= distance < window
        scores = q[row] @ k[row].transpose(-1, -2) * scale
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        shares = torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).nan_to_num()
        out[row] = shares @ v[row]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("has_slopes", [False, True])
@given(LENGTHS, st.integers(0, 3))
def test_no_piece_sees_another(window, has_slopes, lengths, padding):
    total = max(map(sum, lengths)) + padding
    random = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(len(lengths), n, total, 8, generator=random) for n in (4, 2, 2))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.05]) if has_slopes else None
    how = {"scale": 0.3, "window": window, "slopes": slopes}
    expected = masked(q, k, v, lengths, **how)
    torch.testing.assert_close(Segments(lengths).attend(q, k, v, **how), expected)
