"""Pieces of prompts as a tree: nothing is lost, and nothing that is shared stands twice."""

from hypothesis import given
from hypothesis import strategies as st

from lapilli.pipeline.backend import ProcessedPrompt
from lapilli.pipeline.prefix_tree import new_positions, prefix_tree
from lapilli.pipeline.scorer import join
from lapilli.prompt.encode import EncodedPrompt, Span

MEDIA = [object(), object()]
PARTS = st.one_of(st.integers(1, 3), st.sampled_from(MEDIA))


def piece(parts: list[object]) -> ProcessedPrompt:
    """Tokens, and media of two positions."""
    pieces = []
    for part in parts:
        if isinstance(part, int):
            pieces.append(ProcessedPrompt(EncodedPrompt([part], [False]), ()))
        else:
            encoded = EncodedPrompt([0, 0], [False, False], (Span(0, 0, 2),))
            pieces.append(ProcessedPrompt(encoded, (part,)))
    return join(pieces)


@given(st.lists(st.lists(PARTS, min_size=1, max_size=6), min_size=1, max_size=12))
def test_every_piece_is_its_branches_one_after_the_other(drawn):
    pieces = list(map(piece, drawn))
    tree = prefix_tree(pieces)
    for whole, end in zip(pieces, tree.ends, strict=True):
        way = []
        while end >= 0:
            way.append(tree.branches[end].piece)
            end = tree.branches[end].parent
        assert join(way[::-1]) == whole


@given(st.lists(st.lists(PARTS, min_size=1, max_size=6), min_size=1, max_size=12))
def test_branches_of_one_parent_begin_differently(drawn):
    tree = prefix_tree(list(map(piece, drawn)))
    firsts = [
        (one.parent, one.piece.encoded.input_ids[0], [id(x) for x in one.piece.media[:1]])
        if not one.piece.encoded.input_ids[0]
        else (one.parent, one.piece.encoded.input_ids[0], [])
        for one in tree.branches
    ]
    assert len({str(first) for first in firsts}) == len(firsts)
    assert all(len(one.piece.encoded) for one in tree.branches)


def test_questions_share_their_beginning():
    tree = prefix_tree([piece([1, 2, 3]), piece([1, 2, 1, 1]), piece([1, 2]), piece([3])])
    positions = sum(len(branch.piece.encoded) for branch in tree.branches)
    assert positions == len([1, 2]) + len([3]) + len([1, 1]) + len([3])


def test_a_medium_is_the_same_where_it_is_the_same_object():
    first, second = piece([MEDIA[0], 1]), piece([MEDIA[0], 2])
    assert new_positions(second, first) == 1
    assert new_positions(piece([MEDIA[1], 2]), first) == 3
