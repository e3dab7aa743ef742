import pytest
import torch
from torch import nn

from lapilli.config.model import DecoderConfig, ProjectorConfig
from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.modality.projector import build_projector
from pebble.fit import start_language_model, start_projector, word_vectors
from pebble.regions import LEXICON

NUM_WORDS = len(LEXICON)


def new_projector(width=NUM_WORDS + 6):
    return build_projector(ProjectorConfig(kind="mlp", depth=2, vision_size=16, hidden_size=width))


def test_a_projector_starts_as_the_sum_of_the_words_that_hold():
    torch.manual_seed(0)
    projector, head = new_projector(), nn.Linear(16, NUM_WORDS)
    vectors = torch.randn(NUM_WORDS + 6, NUM_WORDS)
    start_projector(projector, head, vectors)
    feature = torch.randn(3, 16)
    scores = head(feature)
    expected = nn.functional.gelu(scores) / 6.0 @ vectors.T
    torch.testing.assert_close(projector(feature), expected)


def test_a_projector_needs_a_unit_per_word():
    with pytest.raises(ConfigError, match=f"32 hidden units cannot hold {NUM_WORDS} words"):
        start_projector(new_projector(32), nn.Linear(16, NUM_WORDS), torch.zeros(32, NUM_WORDS))


def test_a_projector_of_one_layer_is_refused():
    one = nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Identity())
    with pytest.raises(ConfigError, match="expected an mlp2x_gelu projector"):
        start_projector(one, nn.Linear(2, NUM_WORDS), torch.zeros(2, NUM_WORDS))


@pytest.mark.slow
def test_words_and_answers_share_their_embeddings(tokenizer):
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=32, num_layers=1,
        num_heads=1, num_kv_heads=1, head_dim=64, norm_eps=1e-5, rope_theta=1e4, max_positions=64,
    )  # fmt: skip
    model = Decoder(config)
    start_language_model(model, 0)
    embedding = model.model.embed_tokens.weight
    assert torch.equal(embedding, model.lm_head.weight)
    vectors = word_vectors(embedding, tokenizer, 0)
    red = tokenizer.encode("red", add_bos=False)
    torch.testing.assert_close(vectors[:, LEXICON.index("red")], embedding[red].mean(0).detach())
    four = [vectors[:, LEXICON.index(name)] for name in ("tens:4", "units:4", "digit:4")]
    assert not torch.equal(four[0], four[1])
    assert torch.equal(four[1], four[2])
