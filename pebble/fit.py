"""Where fresh models start so that words, patches and answers share one space from the first step.

    embedding of a word  =  vector of that word on a patch  ~  row of the head that answers with it

A question's "star" then looks like a patch with a star in it, and what is read there looks like
the answer: a language model that begins with three unrelated spaces was still guessing colours
after 20,000 conversations.

And a first projector without training: from the tower's naming head to those vectors.

    feature --naming head--> a score per word --GELU--> about 0 where a word does not hold
            --vectors of the words, scaled--> their sum, which the language stage has read

Both layers of the projector are trained from there; without this start the align stage would have
to find again what the two models already agree on.
"""

from typing import cast

import torch
from torch import nn

from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder, DecoderLayer
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor
from pebble.initialise import initialise
from pebble.regions import LEXICON
from pebble.scene import PLACES

_SPACE = "\u2581"  # how a tokenizer writes a space on its own
_CARRIED = 0.7  # gain of values and of outputs: half of what is seen is added
_SURE = 6.0  # about what the head scores a word that holds


def start_language_model(model: Decoder, seed: int) -> None:
    """Fresh weights from which looking things up is a short way.

    Embeddings that the first layers do not drown and a head that reads them; attention that falls
    on what is similar, and that carries over what it finds as it is.

    Source: Trockman & Kolter 2023 (arXiv 2305.09828), section 3, for equal queries and keys.
    """
    initialise(model, seed, depth=model.config.num_layers)
    embedding = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        embedding.normal_(std=embedding.shape[1] ** -0.5, generator=generator)
        model.lm_head.weight.copy_(embedding)
        for layer in model.model.layers:
            attention = cast(DecoderLayer, layer).self_attn
            nn.init.orthogonal_(attention.q_proj.weight, generator=generator)
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            nn.init.orthogonal_(attention.v_proj.weight, _CARRIED, generator=generator)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def word_vectors(
    embedding: Float[Tensor, "V D"], tokenizer: Tokenizer, seed: int
) -> Float[Tensor, "D K"]:
    """One column per word of the lexicon: the mean of the embeddings of its pieces.

    A number of objects and a tens digit are spelled like other words, and "top left" like "top"
    and "left": half of their vector is their own.
    """
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for word in LEXICON:
        kind, _, text = word.rpartition(":")
        ids = tokenizer.encode(text, add_bos=False)
        ids = [index for index in ids if tokenizer.id_to_token(index) != _SPACE] or ids
        column = embedding[ids].mean(0).detach()
        if kind in ("objects", "tens") or word in PLACES:
            own = torch.randn(len(column), generator=generator) * len(column) ** -0.5
            column = (column + own) * 0.5**0.5
        columns.append(column)
    return torch.stack(columns, dim=1)


def start_projector(
    projector: nn.Sequential, naming_head: nn.Linear, vectors: Float[Tensor, "D K"]
) -> None:
    """Set the projector's weights in place; hidden units beyond the words keep theirs, unread.

    Args:
        projector: linear, GELU, linear.
        naming_head: from tower width to a score per word.
        vectors: one column per word, in the language model's width.

    Raises:
        ConfigError: the projector's hidden layer has fewer units than there are words.
    """
    first, _, second = projector
    number = vectors.shape[1]
    if not isinstance(first, nn.Linear) or not isinstance(second, nn.Linear):
        raise ConfigError(f"expected an mlp2x_gelu projector, found {projector}")
    if first.out_features < number:
        raise ConfigError(
            f"a projector of {first.out_features} hidden units cannot hold {number} words"
        )
    with torch.no_grad():
        first.weight[:number] = naming_head.weight
        first.bias[:number] = naming_head.bias
        second.weight[:, :number] = vectors / _SURE
        second.weight[:, number:] = 0.0
        second.bias.zero_()
