"""A SentencePiece BPE model as a tokenizer.json, for the fast tokenizer of Llama and Mistral.

The merges are not in the file: every way to cut a piece into two pieces is one, ranked by the
score of what it makes.

Source: what transformers 4.37.2 builds for LlamaTokenizerFast when a checkpoint has only a
tokenizer.model.
"""

import json

from lapilli.errors import CheckpointError
from lapilli.prompt.tokenizer import spm_model


def llama_tokenizer_json(model: bytes) -> str:
    """tokenizer.json of a tokenizer.model.

    Raises:
        CheckpointError: a unigram, word or character model.

    Note: as in the original, the first three pieces are called <unk>, <s> and </s> whatever the
        file calls them, and text that no piece covers becomes bytes.
    """
    parsed = spm_model.parse(model)
    if parsed.algorithm != spm_model.BPE:
        raise CheckpointError(
            f"tokenizer.model holds algorithm {parsed.algorithm}, expected BPE ({spm_model.BPE}): "
            "use the slow tokenizer, or give a tokenizer.json"
        )
    named = ("<unk>", "<s>", "</s>")
    scores = dict.fromkeys(named, 0.0)
    scores |= {piece.text: piece.score for piece in parsed.pieces[len(named) :]}
    vocab = {text: i for i, text in enumerate((*named, *(p.text for p in parsed.pieces[3:])))}
    replace_space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [_special(i, name) for i, name in enumerate(named)],
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace_space],
            },
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": parsed.unk_piece,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": True,
                "vocab": vocab,
                "merges": _merges(parsed, scores),
            },
        }
    )


def _merges(model: spm_model.SpmModel, scores: dict[str, float]) -> list[list[str]]:
    """Pairs in the order in which they are merged: best score first, then first halves by id."""
    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    ranked: list[tuple[float, list[str]]] = []
    for piece, score in scores.items():
        cuts = ([piece[:i], piece[i:]] for i in range(1, len(piece)))
        halves = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        ranked += [(score, cut) for cut in sorted(halves, key=lambda c: (ids[c[0]], ids[c[1]]))]
    ranked.sort(key=lambda entry: entry[0], reverse=True)
    return [cut for _, cut in ranked]


def _special(index: int, name: str) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": name, "special": True, **flags}
