"""The text that pebble's tokenizer is trained on, and its training; knows sentencepiece.

Most lines come from pebble's world. Everyday sentences keep other words from falling apart into
single bytes.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from lapilli.errors import ConfigError
from pebble.conversation import text_sample
from pebble.scene import WORDS
from pebble.typed import wide_scene

VOCAB_SIZE: Final = 1200
SUBJECTS: Final = (
    "the child", "my friend", "a teacher", "the dog", "our neighbour", "the old man", "a woman",
    "the driver", "everyone", "somebody", "the team", "her brother", "his sister", "the doctor",
    "a student", "the computer",
)  # fmt: skip
VERBS: Final = (
    "is looking at", "wants to buy", "found", "has lost", "would like", "can see", "talks about",
    "is drawing", "remembers", "needs", "writes about", "is waiting for", "asked about",
    "will bring", "does not know", "likes",
)  # fmt: skip
THINGS: Final = (
    "a new house", "the next train", "some fresh bread", "a good question", "the long answer",
    "an old photograph", "a cup of coffee", "the first page", "a green garden", "the blue water",
    "a small machine", "the open window", "a piece of paper", "the whole story",
    "a different language", "the right word", "a funny picture", "some music",
)  # fmt: skip
WHENS: Final = (
    "today", "in the morning", "every evening", "at school", "on the table", "near the river",
    "in the city", "before dinner", "after work", "on Monday", "during the summer",
    "because it is raining", "with great care", "for the first time", "in front of the door",
    "between two trees", "without help", "as soon as possible",
)  # fmt: skip
TALK: Final = (
    "Hello, how are you?",
    "Good morning! What can I do for you?",
    "Thank you very much, that was helpful.",
    "Please tell me more about yourself.",
    "Who are you and what do you know?",
    "I am a small model that was trained on drawn shapes, words, numbers and handwritten digits.",
    "I do not know the answer to this question.",
    "I need a picture to answer that.",
    "This text is too small to read.",
    "Could you explain why this is so?",
    "Is this a photo, a drawing, a person or an animal?",
    "Which one of these would you choose, and why?",
    "What time is it? When will they come back? How much does it cost?",
    "A chat between a person and an assistant, who gives helpful, detailed and polite answers.",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:",
    "Answer with one word. Answer the question using a single word or phrase.",
)


def corpus(seed: int, num_lines: int) -> Iterator[str]:
    """Lines of text, the same for a seed: four fifths from pebble's world, the rest everyday."""
    rng = np.random.default_rng([seed, 13])
    for i in range(num_lines):
        if i % 10 == 9:
            yield TALK[int(rng.integers(len(TALK)))]
        elif i % 10 == 8:
            yield _everyday(rng)
        else:
            sample = text_sample(wide_scene(seed + i), rng)
            turns = [turn["value"] for turn in sample["conversations"]]
            yield " ".join(turns).replace("\n", " ")


def _everyday(rng: np.random.Generator) -> str:
    parts = [
        options[int(rng.integers(len(options)))] for options in (SUBJECTS, VERBS, THINGS, WHENS)
    ]
    if rng.random() < 0.2:
        parts.append(
            f"and says {WORDS[int(rng.integers(len(WORDS)))]} {int(rng.integers(1000))} times"
        )
    sentence = " ".join(parts)
    return sentence[0].upper() + sentence[1:] + "."


def train_tokenizer(
    lines: Iterable[str], path: Path, vocab_size: int = VOCAB_SIZE, *, symbols: Sequence[str] = ()
) -> None:
    """Write a SentencePiece model laid out like Llama's tokenizer.model.

    BPE with byte fallback, unk 0, bos 1, eos 2, digits split, a leading space added, no
    normalisation.

    Args:
        lines: the corpus.
        path: where the model file goes; its folder must exist.
        vocab_size: pieces including 3 control pieces and 256 bytes.
        symbols: pieces that are never split.

    Raises:
        ConfigError: the vocabulary has no room beside bytes and letters.
    """
    import sentencepiece

    if vocab_size < 400:
        raise ConfigError(
            f"vocab_size is {vocab_size}; 259 pieces are bytes and controls: 400 or more"
        )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        character_coverage=1.0,
        user_defined_symbols=list(symbols),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
