from collections import Counter

import pytest
import sentencepiece

from lapilli.errors import ConfigError
from pebble.words import corpus, train_tokenizer

VOCAB_SIZE = 1000


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return list(corpus(0, 200))


@pytest.fixture(scope="module")
def tokenizer(lines, tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.model"
    train_tokenizer(lines, path, VOCAB_SIZE, symbols=("USER:",))
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.slow
def test_the_corpus_repeats_for_a_seed(lines):
    assert list(corpus(0, 200)) == lines
    assert list(corpus(1, 20)) != lines[:20]
    assert not any("\n" in line for line in lines)


def test_everyday_words_are_in_the_corpus(lines):
    words = Counter(word for line in lines for word in line.lower().split())
    assert words["the"] > 100
    assert sum(line[0].isupper() and line.endswith(".") for line in lines) > 15


def test_the_tokenizer_is_laid_out_like_llamas(tokenizer):
    assert tokenizer.vocab_size() == VOCAB_SIZE
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id()) == (0, 1, 2)
    assert tokenizer.id_to_piece(3) == "USER:"
    assert tokenizer.is_byte(tokenizer.piece_to_id("<0x00>"))
    assert tokenizer.pad_id() == -1


def test_text_comes_back_as_it_was(tokenizer):
    for text in ("What is in this picture?", "a  b", "Zürich 東京 🙂", "line\nline", " x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_split_into_digits(tokenizer):
    pieces = tokenizer.encode("there are 427 of them", out_type=str)
    assert [piece for piece in pieces if piece.strip("▁").isdigit()] == ["4", "2", "7"]


def test_words_of_the_world_are_few_pieces(tokenizer):
    text = "a large red circle at the top left and a small blue star on the right"
    assert len(tokenizer.encode(text)) <= len(text.split()) + 2


def test_a_vocabulary_without_room_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="vocab_size is 300; 259 pieces are bytes"):
        train_tokenizer(["a"], tmp_path / "t.model", 300)
