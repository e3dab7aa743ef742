"""A small tokenizer of pebble's world, made once."""

import pytest

from lapilli.prompt.tokenizer import TokenizerFiles
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer
from pebble.words import corpus, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(corpus(5, 400), path, 600)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    return SentencePieceTokenizer(TokenizerFiles(model=tokenizer_file.read_bytes()))
