"""Tokenizer files with a token more: what the layout of Hugging Face needs for its image token."""

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from lapilli.checkpoint.files import read_optional_json, read_optional_text
from lapilli.checkpoint.save import copy_tokenizer
from lapilli.checkpoint.save_files import write_json
from lapilli.errors import CheckpointError
from lapilli.prompt.tokenizer import Tokenizer as LoadedTokenizer
from lapilli.prompt.tokenizer.convert import llama_tokenizer


def save_tokenizer_with(
    folder: Path, source: Path, tokenizer: LoadedTokenizer, token: str, *, processor: str
) -> int:
    """Write tokenizer.json and its configuration with `token` among them; its id.

    Args:
        folder: where to.
        source: a directory with tokenizer.json or tokenizer.model.
        tokenizer: the same, loaded, with the tokens that were added at loading.
        token: is added at the end where the tokenizer does not have it.
        processor: class of transformers that the files are for.

    Raises:
        CheckpointError: the files give other ids than the loaded tokenizer.
    """
    rust = _rust(source)
    for name, index in sorted(tokenizer.added_vocab.items(), key=lambda item: item[1]):
        if index not in rust.get_added_tokens_decoder():
            known = tokenizer.added_tokens[index]
            entry = AddedToken(
                name,
                single_word=known.single_word,
                lstrip=known.lstrip,
                rstrip=known.rstrip,
                normalized=False,  # as slow tokenizers, which look at the text as it is
            )
            (rust.add_special_tokens if known.special else rust.add_tokens)([entry])
        if rust.token_to_id(name) != index:
            raise CheckpointError(
                f"{source}: token {name!r} has id {index}, but would get "
                f"{rust.token_to_id(name)} in tokenizer.json"
            )
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    _frame(rust, tokenizer)
    copy_tokenizer(source, folder)
    rust.save(str(folder / "tokenizer.json"))
    written = dict(read_optional_json(source / "tokenizer_config.json") or {})
    # What names its ids stands in tokenizer.json now.
    for key in ("added_tokens_decoder", "auto_map"):
        written.pop(key, None)
    (folder / "added_tokens.json").unlink(missing_ok=True)
    written |= {"padding_side": "left", "processor_class": processor}
    pad = _pad(tokenizer, written, read_optional_json(source / "special_tokens_map.json") or {})
    if pad is not None:
        written["pad_token"] = pad
    write_json(folder / "tokenizer_config.json", written)
    found = rust.token_to_id(token)
    if found is None:  # the library adds what it is asked to add
        raise CheckpointError(f"{token!r} could not be added to the tokenizer of {source}")
    return int(found)


def _rust(source: Path) -> Tokenizer:
    text = read_optional_text(source / "tokenizer.json")
    if text is not None:
        return Tokenizer.from_str(text)
    return llama_tokenizer((source / "tokenizer.model").read_bytes())


def _frame(rust: Tokenizer, tokenizer: LoadedTokenizer) -> None:
    """Let the file write what our tokenizer writes before and after a text, such as <s>."""
    prefix, suffix = list(tokenizer.prefix_ids), list(tokenizer.suffix_ids)
    if rust.encode("").ids == prefix + suffix:
        return
    names = {index: str(tokenizer.id_to_token(index)) for index in (*prefix, *suffix)}
    single = [*(names[i] for i in prefix), "$A", *(names[i] for i in suffix)]
    rust.post_processor = TemplateProcessing(
        single=single,
        pair=[*single, *("$B:1" if part == "$A" else f"{part}:1" for part in single)],
        special_tokens=[(name, index) for index, name in names.items()],
    )


def _pad(
    tokenizer: LoadedTokenizer, config: Mapping[str, object], special_map: Mapping[str, object]
) -> str | None:
    """A token for padding where the files name none: unk as in the original, else the end."""
    if config.get("pad_token") or special_map.get("pad_token"):
        return None
    for index in (tokenizer.pad_id, tokenizer.unk_id, tokenizer.eos_id):
        if index is not None:
            return tokenizer.id_to_token(index)
    return None
