"""A SentencePiece BPE model as a tokenizer of the `tokenizers` library, for Llama and Mistral.

The merges are not in the file: every way to cut a piece into two pieces is one, ranked by the
score of what it makes.

Source: what transformers 4.37.2 builds for LlamaTokenizerFast when a checkpoint has only a
tokenizer.model.
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lapilli.errors import CheckpointError
from lapilli.prompt.tokenizer import spm_model
from lapilli.prompt.tokenizer.merges import merges
from lapilli.prompt.tokenizer.pieces import SPACE


def llama_tokenizer(model: bytes, *, legacy: bool = True) -> Tokenizer:
    """The tokenizer of a tokenizer.model.

    Args:
        model: content of tokenizer.model.
        legacy: a space is written before the first word of every stretch between added tokens;
            False: at the beginning of a text alone, as slow tokenizers with `legacy: false` do.

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
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges(scores, {piece.text: i for i, piece in enumerate(parsed.pieces)}),
            unk_token=parsed.unk_piece,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE, prepend_scheme="first", split=False
        )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in named])
    return tokenizer
