"""Language-model families: the facts that every other file asks for by `model_type`.

A file of this folder that has a `FAMILY` is one of them without being named anywhere else. A family
does not compute anything. What its layers do is said by the record that `parse` returns
(config/model.py) and done by the module that is built from it (lm/).
"""

import pkgutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module

from lapilli.config.model import TextConfig
from lapilli.config.reader import KeyReader, shown
from lapilli.errors import UnsupportedModelError

_DEFAULT = "llama"  # of files that only say "llava"


def keys_of(names: str) -> frozenset[str]:
    """Return the keys of a text, with spaces or line ends between them."""
    return frozenset(names.split())


# Keys that are knowingly not read, here and in the files of the layouts: leaving one out cannot
# change an answer. It speaks about training, about the library that wrote the file, or repeats what
# another file says with more authority.

# Written by every release of the transformers library. quantization_config is read where the
# weights are.
LIBRARY_KEYS = keys_of("""
    _attn_implementation_autoset _commit_hash _from_model_config _name_or_path _num_labels
    architectures attn_implementation auto_map cross_attention_hidden_size finetuning_task id2label
    is_composition is_decoder is_encoder_decoder label2id model_type problem_type
    quantization_config quantization_config_file return_dict sep_token_id task_specific_params
    tf_legacy_loss tokenizer_class transformers_version use_bfloat16 use_cache use_return_dict
""")

# Sampling defaults that old releases wrote into config.json; the caller's sampling options decide.
SAMPLING_KEYS = keys_of("""
    add_cross_attention bad_words_ids begin_suppress_tokens chunk_size_feed_forward
    decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores prefix pruned_heads
    remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens temperature
    tie_encoder_decoder top_k top_p torchscript typical_p
""")

# About training only.
TRAINING_KEYS = keys_of("""
    attention_dropout attn_pdrop dropout emb_pdrop embedding_fraction init_device
    initializer_factor initializer_range pretraining_tp resid_pdrop use_gradient_checkpointing
""")

COMMON_KEYS = LIBRARY_KEYS | SAMPLING_KEYS | TRAINING_KEYS

IGNORED = COMMON_KEYS | keys_of("layer_types max_window_layers decoder_sparse_step")


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A language-model family.

    Attributes:
        model_type: of its config.json, and of a `text_config`.
        original: model_type and class of a LLaVA of it in the original layout.
        marks: what tells it by the class name in old files, whose model_type is only "llava".
        template: the conversation template of checkpoints that do not say which, if there is one
            that belongs to the family.
        template_first: the template counts even where the vocabulary speaks for another one.
        stem: what names of its tensors begin with.
        slow_tokenizer: the original reads its tokenizer.model, not its tokenizer.json.
        in_hf_llava: transformers' LLaVA classes take it as their `text_config`.
        ignored: keys of its config.json that are knowingly not read.
    """

    model_type: str
    original: tuple[str, str]
    marks: tuple[str, ...] = ()
    template: str | None = None
    template_first: bool = False
    stem: str = "model"
    slow_tokenizer: bool = False
    in_hf_llava: bool = True
    ignored: frozenset[str] = IGNORED

    @abstractmethod
    def parse(self, reader: KeyReader, *, tied: bool | None = None) -> TextConfig:
        """Return the language model that the reader's keys describe.

        Args:
            reader: keys of a plain config.json, of a LLaVA config.json or of a `text_config`.
            tied: whether the output layer is the embedding, when the caller knows better than the
                file.

        Raises:
            ConfigError: a key is missing or of the wrong type.
            UnsupportedModelError: a variation of the family that lapilli does not have.
        """

    @abstractmethod
    def is_tied(self, reader: KeyReader) -> bool:
        """Return whether the keys say that the output layer is the embedding."""

    @abstractmethod
    def write(self, text: TextConfig) -> dict[str, object]:
        """Return the keys of a language model, as `parse` reads them.

        Raises:
            UnsupportedModelError: something about it that the family has no key for.
        """


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known, in place of one of the same model_type, and return it."""
    _FAMILIES[family.model_type] = family
    return family


def text_types() -> tuple[str, ...]:
    """Return the model_type of every family."""
    return tuple(_FAMILIES)


def original_types() -> dict[str, str]:
    """Return the family of every model_type in the original layout."""
    return {family.original[0]: name for name, family in _FAMILIES.items()}


def find_family(kind: str) -> Family | None:
    """Return the family that a model_type of either layout belongs to, if we have it."""
    kind = original_types().get(kind, kind)
    return _FAMILIES.get(kind) or _FAMILIES.get(kind.removeprefix("llava_"))


def family_named(kind: object, where: str = "config.json") -> Family:
    """Return the family of a model_type.

    Raises:
        UnsupportedModelError: lapilli has no such family.
    """
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UnsupportedModelError(
            f"{where}: language model type {shown(kind)} is not supported, "
            f"choose from {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[kind]


def family_of(text: TextConfig) -> Family:
    """Return the family of a language model.

    Raises:
        UnsupportedModelError: it is one of transformers, which is only run.
    """
    return family_named(text.family, "the language model")


def family_by_class(architectures: str) -> Family:
    """Return the family that class names speak of, in any case; "qwen3" before "qwen"."""
    lowered = architectures.lower()
    marks = [(mark, family) for family in _FAMILIES.values() for mark in family.marks]
    marks.sort(key=lambda one: -len(one[0]))
    return next((family for mark, family in marks if mark in lowered), _FAMILIES[_DEFAULT])


# Last, as the files of the families import this one.
for _module in pkgutil.iter_modules(__path__):
    _found = getattr(import_module(f"{__name__}.{_module.name}"), "FAMILY", None)
    if isinstance(_found, Family):
        register(_found)
