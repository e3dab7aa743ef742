"""Baselines of recommendation and retrieval, each a function from what is known to scores.

popularity      how often an item was taken
item_knn        cosine of the users of two items, summed over the last items of a user
SequenceModel   a causal transformer over item numbers (SASRec)
bm25            words of the query in the text
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  torch's own habit

from lapilli.datasets.interactions import Interactions

Score = Callable[[np.ndarray], np.ndarray]
"""From the history of a user, item numbers in order, to a score of every item, float [items]."""


def popularity(train: Interactions) -> Score:
    """Score an item by how often it was taken."""
    counts = train.counts().astype(np.float64)
    return lambda _history: counts


def item_knn(train: Interactions, *, last: int = 10) -> Score:
    """Score an item by its similarity to the last items of a user.

    The similarity of two items is the cosine of the sets of users who took them.
    """
    taken = np.zeros((len(train.user_ids), len(train.item_ids)), dtype=np.float32)
    taken[train.users, train.items] = 1
    norms = np.sqrt(taken.sum(0)).clip(1)
    similar = (taken.T @ taken) / norms[:, None] / norms
    np.fill_diagonal(similar, 0)
    return lambda history: cast("np.ndarray", similar[history[-last:]].sum(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceOptions:
    """Sizes and training of a SequenceModel."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.3
    length: int = 50
    epochs: int = 60
    batch: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0
    check_every: int = 10


class SequenceModel(nn.Module):
    """A causal transformer that predicts the next item, by a softmax over all of them.

    Source: Kang and McAuley 2018 (SASRec, arXiv 1808.09781), with the softmax of Klenitskiy and
        Vasilev 2023 (arXiv 2309.07602), who found it better than sampled negatives.
    """

    def __init__(self, items: int, options: SequenceOptions) -> None:
        super().__init__()
        self.options = options
        self.items = nn.Embedding(items + 1, options.width)  # the last one is padding
        self.positions = nn.Parameter(torch.randn(options.length, options.width) * 0.02)
        self.bias = nn.Parameter(torch.zeros(items))
        layer = nn.TransformerEncoderLayer(
            options.width,
            options.heads,
            4 * options.width,
            options.dropout,
            "gelu",
            batch_first=True,
            norm_first=True,
        )
        self.layers = nn.TransformerEncoder(
            layer, options.layers, norm=nn.LayerNorm(options.width), enable_nested_tensor=False
        )
        self.dropout = nn.Dropout(options.dropout)
        nn.init.normal_(self.items.weight, std=0.05)

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Return a state [B, T, W] after every item of sequences [B, T], padded on the right."""
        length = items.shape[1]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.dropout(self.items(items) + self.positions[:length])
        out: torch.Tensor = self.layers(x, mask=later)
        return out

    def scores(self, states: torch.Tensor) -> torch.Tensor:
        """Return scores [.., items] of what comes next."""
        return F.linear(states, self.items.weight[:-1], self.bias)


def train_sequence_model(
    train: Interactions,
    options: SequenceOptions | None = None,
    *,
    validate: Callable[[SequenceModel], float] | None = None,
) -> SequenceModel:
    """Train a SequenceModel on windows of the users' items, cut elsewhere in each epoch.

    Args:
        train: what is learned from.
        options: sizes and training.
        validate: says how good the model is, after every `options.check_every` epochs: the weights
            that it finds best are returned. None: the last ones are.
    """
    options = options or SequenceOptions()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        rng = np.random.default_rng(options.seed)
        model = SequenceModel(len(train.item_ids), options).train()
        best, kept = -math.inf, None
        optimizer = torch.optim.AdamW(
            model.parameters(), options.lr, weight_decay=options.weight_decay
        )
        for epoch in range(options.epochs):
            rate = 0.5 * (1 + math.cos(math.pi * epoch / options.epochs))
            for group in optimizer.param_groups:
                group["lr"] = options.lr * rate * min(1.0, (epoch + 1) / 3)
            windows = _windows(train, options.length, rng)
            for start in range(0, len(windows), options.batch):
                _step(model, optimizer, windows[start : start + options.batch])
            if validate is not None and (epoch + 1) % options.check_every == 0:
                found = validate(model.eval())
                if found > best:
                    best, kept = found, {n: v.clone() for n, v in model.state_dict().items()}
                model.train()
        if kept is not None:
            model.load_state_dict(kept)
    return model.eval()


def stretches(
    lengths: Sequence[int], events: int, rng: np.random.Generator
) -> list[tuple[int, slice]]:
    """Return users and where stretches of at most events + 1 of their events lie, shuffled.

    Long histories are cut elsewhere in each call; every event but the first is predicted once,
    but for some at the end of a long one.
    """
    found = []
    for user, length in enumerate(lengths):
        end = length
        if end > events:
            end -= int(rng.integers(events))
        while end > 1:
            found.append((user, slice(max(0, end - events - 1), end)))
            end -= events
    return [found[i] for i in rng.permutation(len(found))]


def _windows(train: Interactions, length: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return stretches of at most length + 1 items of all users, in random order."""
    histories = [train.history(user) for user in range(len(train.user_ids))]
    places = stretches([len(one) for one in histories], length, rng)
    return [histories[user][where] for user, where in places]


def _step(
    model: SequenceModel, optimizer: torch.optim.Optimizer, windows: Sequence[np.ndarray]
) -> None:
    padding = model.items.num_embeddings - 1
    rows = torch.full((len(windows), max(map(len, windows))), padding)
    for row, window in zip(rows, windows, strict=True):
        row[: len(window)] = torch.from_numpy(window)
    targets = rows[:, 1:]
    known = targets != padding
    states = model(rows[:, :-1])[known]
    loss = F.cross_entropy(model.scores(states), targets[known])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own
    optimizer.step()


def sequence_scores(model: SequenceModel) -> Score:
    """Return the scores of a trained SequenceModel."""

    def score(history: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            last = torch.from_numpy(history[-model.options.length :])[None]
            found: np.ndarray = model.scores(model(last)[0, -1]).numpy()
        return found

    return score


def bm25(texts: Sequence[str]) -> Callable[[str], np.ndarray]:
    """Return a function from a query to a score of every text, float [texts].

    Source: Robertson and Zaragoza 2009, as bm25s computes it by default.
    """
    import bm25s

    index = bm25s.BM25()
    tokens = bm25s.tokenize(list(texts), stopwords="en", show_progress=False)
    index.index(tokens, show_progress=False)

    def score(query: str) -> np.ndarray:
        [words] = bm25s.tokenize([query], stopwords="en", show_progress=False, return_ids=False)
        found: np.ndarray = index.get_scores(words)
        return found

    return score


def next_item_ranks(score: Score, known: Interactions, held_out: Interactions) -> np.ndarray:
    """Return how many items stand before the one that each user took next, int64 [users].

    All items are ranked but those that the user took before; users without a held-out event are
    left out. Equal scores stand before it: a model that cannot tell gains nothing.
    """
    ranks = []
    for user in range(len(held_out.user_ids)):
        target = held_out.history(user)
        if not len(target):
            continue
        history = known.history(user)
        scores = np.array(score(history), dtype=np.float64)
        own = scores[target[0]]
        scores[history] = -np.inf
        ranks.append(int((scores >= own).sum()) - 1)
    return np.array(ranks, dtype=np.int64)


def hit_rate(ranks: np.ndarray, k: int) -> float:
    """Return the share of users whose next item stands among the first k."""
    return float((ranks < k).mean())


def ndcg(ranks: np.ndarray, k: int) -> float:
    """Return the mean of 1 / log2(rank + 2) within the first k, with one right item each."""
    return float(np.where(ranks < k, 1 / np.log2(ranks + 2.0), 0).mean())
