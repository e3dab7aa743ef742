"""Special token ids and the token switches of the original -> TokenConfig."""

from lapilli.config.model import TokenConfig
from lapilli.config.reader import KeyReader


def parse_tokens(
    reader: KeyReader, generation: KeyReader, *, image_id: int | None = None
) -> TokenConfig:
    """Return the special ids that the files agree on; generation_config.json wins over config.json.

    Args:
        reader: keys of the language model's config.json or `text_config`.
        generation: keys of generation_config.json.
        image_id: the vocabulary entry that stands for a picture, where there is one.

    Note:
        `mm_use_im_patch_token` is true when absent: the original then adds one token at loading.
    """
    bos, eos, pad = (
        _first(_real(generation.ids(key)), _real(reader.ids(key)))
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    return TokenConfig(
        bos_id=bos[0] if bos else None,
        eos_ids=eos,
        pad_id=pad[0] if pad else None,
        image_id=image_id,
        use_start_end=reader.flag("mm_use_im_start_end", False),
        use_patch_token=reader.flag("mm_use_im_patch_token", True),
    )


def _real(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return the ids without negative ones, which are how some files say "none"."""
    return tuple(one for one in ids if one >= 0)


def _first(wins: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return wins or other  # both were read, so that both keys count as used
