"""Foreign config files -> ModelConfig, by what the files say and never by a folder's name."""

from lapilli.config.families import family_named, original_types, text_types
from lapilli.config.files import ConfigFiles
from lapilli.config.huggingface import parse_hf_llava, parse_language_model
from lapilli.config.llava import inner_family, parse_llava
from lapilli.config.llava import named_tower as named_llava_tower
from lapilli.config.model import ModelConfig, TextConfig
from lapilli.config.reader import JsonObject, KeyReader, KeyReport, in_file, shown
from lapilli.errors import UnsupportedModelError

HF_LLAVA_TYPES = ("llava", "llava_next")


def supported_types() -> tuple[str, ...]:
    """Return every model_type of a config.json that is read here."""
    return ("llava", *original_types(), "llava_next", *text_types())


def parse_config(
    raw: JsonObject,
    *,
    tower: JsonObject | None = None,
    preprocessor: JsonObject | None = None,
    generation: JsonObject | None = None,
    weight_names: frozenset[str] = frozenset(),
) -> tuple[ModelConfig, KeyReport]:
    """Return what a checkpoint is, and what became of every key of its files.

    Args:
        raw: config.json.
        tower: config.json of the vision tower that `named_tower(raw)` names.
        preprocessor: preprocessor_config.json, or the image part of processor_config.json.
        generation: generation_config.json.
        weight_names: names of the checkpoint's tensors, where they are known cheaply.

    Raises:
        ConfigFileError: a key is missing, of the wrong type, or contradicts another.
        UnsupportedModelError: the model type, or a variation of it, is not one of ours.
    """
    files = ConfigFiles(
        config=raw,
        tower=tower,
        preprocessor=preprocessor,
        generation=generation or {},
        weight_names=weight_names,
    )
    with in_file():
        if is_original(raw):
            return parse_llava(files)
        if is_hf_llava(raw):
            return parse_hf_llava(files)
        kind = raw.get("model_type")
        if isinstance(kind, str) and kind in text_types():
            return parse_language_model(files)
    raise UnsupportedModelError(
        f"config.json: model_type {shown(kind)} is not supported, choose from "
        f"{', '.join(supported_types())}"
    )


def parse_text_config(raw: JsonObject) -> TextConfig:
    """Return the language model inside any supported config.json, without looking at its images.

    Raises:
        ConfigFileError: a key is missing or of the wrong type.
        UnsupportedModelError: a language model that lapilli does not have.
    """
    reader = KeyReader(raw, "config.json")
    with in_file():
        if is_original(raw):
            return inner_family(raw).parse(reader)
        if is_hf_llava(raw):
            reader = reader.child("text_config")
            return family_named(reader.text("model_type", "llama")).parse(reader)
        return family_named(reader.text("model_type")).parse(reader)


def is_hf_llava(raw: JsonObject) -> bool:
    """Return whether a file is Hugging Face's LLaVA: nested, without the original's flat keys."""
    if raw.get("model_type") not in HF_LLAVA_TYPES:
        return False
    nested = "text_config" in raw or "vision_config" in raw
    return nested or "ForConditionalGeneration" in str(raw.get("architectures", ""))


def is_original(raw: JsonObject) -> bool:
    """Return whether a file is of the original LLaVA: flat, with `mm_` keys.

    Note:
        Releases of 2023 say `llava`, like Hugging Face's own class; the shape of the file decides.
    """
    kind = raw.get("model_type")
    return kind in tuple(original_types()) or (kind == "llava" and not is_hf_llava(raw))


def named_tower(raw: JsonObject) -> str | None:
    """Return the directory or hub id of a separate vision tower, if there is one to fetch."""
    return named_llava_tower(raw) if is_original(raw) else None
