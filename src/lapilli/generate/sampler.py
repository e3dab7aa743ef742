"""Sampler: the one place where logits become tokens, and what the sampling options do to them.

    logits [R, V] --grammar: what it forbids is -inf--> --processors: bias, penalties-->
                  --temperature 0: argmax; else: warp (filters), draw--> token

The plain loop, the engine, verified drafts and recorded CUDA graphs all call `Sampler.sample`. A
new option is a field of SamplingParams and an entry in PROCESSORS or FILTERS: whether a row may
take the argmax of the raw logits is decided from these tables, so no path can miss an option.

The order is that of the transformers library: bias, repetition penalty, temperature, top-k, top-p
and min-p, each on what the one before it left over.
"""

from collections.abc import Callable, Sequence

import torch

from lapilli.config.generation import SamplingParams
from lapilli.errors import GenerationError
from lapilli.generate.grammar import TokenMatcher, fill_masks, unpack_masks
from lapilli.generate.output import TokenLogprob
from lapilli.shapes import Bool, Float, Int, Tensor

DEFAULTS = SamplingParams()


def penalize_repetition(
    logits: Float[Tensor, "B V"], seen: Bool[Tensor, "B V"], penalty: float
) -> Float[Tensor, "B V"]:
    """Make logits of seen tokens smaller: positive ones divided, negative ones multiplied."""
    punished = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, punished, logits)


def filter_top_k(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Keep the k best tokens of every row (and those that tie with the last one); others -inf."""
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def filter_top_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keep the smallest set of best tokens whose probabilities sum to at least p; others -inf."""
    if p >= 1:
        return logits
    ascending, order = logits.sort(dim=-1)
    dropped = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped[:, -1] = False  # 1 - p rounds to 1 for a tiny p: the best token stays all the same
    return logits.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)


def filter_min_p(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keep tokens at least p times as probable as the best one of their row; others -inf."""
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


FILTERS: dict[str, Callable[..., Tensor]] = {
    "top_k": filter_top_k,
    "top_p": filter_top_p,
    "min_p": filter_min_p,
}
"""Filters of the tempered logits by option, in their order. Each keeps the best token."""


def warp(logits: Float[Tensor, "B V"], params: SamplingParams) -> Float[Tensor, "B V"]:
    """Return logits after temperature and filters; the temperature is above 0."""
    logits = logits / params.temperature
    for name, keep in FILTERS.items():
        value = getattr(params, name)
        if value is not None:
            logits = keep(logits, value)
    return logits


class LogitsProcessors:
    """Bias and penalties of some rows, applied to logits before sampling, and their token counts.

    Args:
        params: the options.
        prompt_ids: per row the tokens that the repetition penalty counts as seen from the start.
        vocab_size: width of the logits.
        device: of the logits.

    Raises:
        GenerationError: a bias for a token that the model does not have.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.params = params
        self.steps = [PROCESSORS[name] for name in active_processors(params)]
        shape = (len(prompt_ids), vocab_size)
        self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=device)
        for row, token_ids in enumerate(prompt_ids):
            self.in_prompt[row, list(token_ids)] = True
        self.counts = torch.zeros(shape, dtype=torch.int32, device=device)
        """Occurrences of each token in the answer."""
        check_logit_bias(params, vocab_size)
        self.bias = torch.zeros(vocab_size, device=device)
        self.bias[list(params.logit_bias)] = self.bias.new_tensor([*params.logit_bias.values()])

    def __call__(self, logits: Float[Tensor, "B V"]) -> Float[Tensor, "B V"]:
        """Return the logits, or log-probabilities, after bias and penalties."""
        for step in self.steps:
            logits = step(logits, self)
        return logits

    def push(self, token_ids: Int[Tensor, " B"]) -> None:
        """Count one more token of every row."""
        at = token_ids.unsqueeze(1).to(self.counts.device)
        self.counts.scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))

    def take(self, rows: Sequence[int]) -> None:
        """Keep these rows only, in this order; a row may be named more than once."""
        self.in_prompt, self.counts = self.in_prompt[list(rows)], self.counts[list(rows)]


Processor = Callable[[Tensor, LogitsProcessors], Tensor]
PROCESSORS: dict[str, Processor] = {
    "logit_bias": lambda logits, of: logits + of.bias,
    "repetition_penalty": lambda logits, of: penalize_repetition(
        logits, of.in_prompt | (of.counts > 0), of.params.repetition_penalty
    ),
    "frequency_penalty": lambda logits, of: logits - of.params.frequency_penalty * of.counts,
    "presence_penalty": lambda logits, of: logits - of.params.presence_penalty * (of.counts > 0),
}
"""Processors of logits by option, in their order; an option at its default is left out.

Source: transformers (repetition), OpenAI's API reference (bias, frequency, presence)."""


def active_processors(params: SamplingParams) -> list[str]:
    """Return the names of the options among PROCESSORS that change logits."""
    return [name for name in PROCESSORS if getattr(params, name) != getattr(DEFAULTS, name)]


def logits_processors(
    params: SamplingParams,
    prompt_ids: Sequence[Sequence[int]],
    vocab_size: int,
    device: torch.device,
) -> LogitsProcessors | None:
    """Return the LogitsProcessors of these options; None where none of them changes logits."""
    if not active_processors(params):
        return None
    return LogitsProcessors(params, prompt_ids, vocab_size, device)


def check_logit_bias(params: SamplingParams, vocab_size: int) -> None:
    """Check that the model has every token of `logit_bias`.

    Raises:
        GenerationError: it has not.
    """
    strange = [token_id for token_id in params.logit_bias if token_id >= vocab_size]
    if strange:
        raise GenerationError(
            f"logit_bias names token {strange[0]}, the model has tokens 0 to {vocab_size - 1}"
        )


class SamplingState:
    """State of the sampling of one answer: options, random generator, counts, grammar.

    Args:
        params: the options.
        vocab_size: width of the logits.
        device: of the logits.
        prompt_ids: tokens that the repetition penalty counts as seen.
        matcher: of the options' grammar.
    """

    def __init__(
        self,
        params: SamplingParams,
        vocab_size: int,
        device: torch.device,
        *,
        prompt_ids: Sequence[int] = (),
        matcher: TokenMatcher | None = None,
    ) -> None:
        if (matcher is None) is not (params.grammar is None):
            raise RuntimeError("a grammar was asked for and not compiled, or the other way round")
        self.params = params
        self.matcher = matcher
        # Greedy sampling needs no generator, so it leaves torch's global one alone.
        self.generator = new_generator(params.seed, device) if params.temperature > 0 else None
        self.processors = logits_processors(params, [prompt_ids], vocab_size, device)

    @property
    def is_over(self) -> bool:
        """True once the grammar allows nothing more: the answer is whole."""
        return self.matcher is not None and self.matcher.is_over


class Sampler:
    """Sampler of the tokens of one pass of the model.

    Args:
        logits: a row for every token that may be sampled, in any floating type; they are computed
            with in float32.
    """

    def __init__(self, logits: Float[Tensor, "R V"]) -> None:
        self._logits = logits
        self._allowed = logits
        """The logits, -inf where a grammar forbids a token."""
        self._constrained: set[int] = set()
        self._best: list[int] | None = None

    def constrain(self, wanted: Sequence[tuple[int, SamplingState, Sequence[int]]]) -> None:
        """Compute what the grammars of many rows allow, in parallel; on a GPU while it works.

        Args:
            wanted: per sequence its first row, its state, and its draft tokens, whose rows follow.
        """
        known = [(row, one.matcher, draft) for row, one, draft in wanted if one.matcher is not None]
        if not known:
            return
        rows, vocab_size = self._logits.shape
        masks = fill_masks(known, rows=rows, vocab_size=vocab_size)
        allowed = unpack_masks(masks, vocab_size, self._logits.device)
        self._allowed = self._allowed.masked_fill(~allowed, -torch.inf)
        self._best = None
        for row, _, draft in known:
            self._constrained.update(range(row, row + 1 + len(draft)))

    def sample(self, row: int, state: SamplingState) -> tuple[int, TokenLogprob | None]:
        """Return the token of one row and its report, if asked for; count it in `state`.

        Raises:
            GrammarError: its grammar allows no token, or reached a limit.
        """
        params, processors, matcher = state.params, state.processors, state.matcher
        if matcher is not None:
            if row not in self._constrained:
                self.constrain([(row, state, ())])
            matcher.check()
        if processors is None and state.generator is None:
            if self._best is None:  # of all rows at once
                self._best = self._allowed.argmax(dim=-1).tolist()
            token_id = self._best[row]
        else:
            scores = self._allowed[row : row + 1].float()
            if processors is not None:
                scores = processors(scores)
            tokens = (
                scores.argmax(dim=-1)
                if state.generator is None
                else draw(warp(scores, params), [state.generator])
            )
            if processors is not None:
                processors.push(tokens)
            token_id = int(tokens)
        if matcher is not None:
            matcher.consume(token_id)
        if params.logprobs is None:
            return token_id, None
        [report] = report_logprobs(self._logits[row : row + 1], [token_id], params.logprobs)
        return token_id, report


def new_generator(seed: int | None, device: torch.device) -> torch.Generator:
    """Return the random generator of one row, whose draws do not depend on other rows.

    Without a seed it starts from torch's global source (`torch.manual_seed`).
    """
    if seed is None:
        seed = int(torch.randint(2**62, (1,)).item())
    return torch.Generator(device=device).manual_seed(seed)


def draw(logits: Float[Tensor, "B V"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """Draw one token per row, each with its row's own generator."""
    probabilities = logits.softmax(dim=-1)
    drawn = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(probabilities, generators, strict=True)
    ]
    return torch.cat(drawn)


def report_logprobs(
    logits: Float[Tensor, "B V"], tokens: Sequence[int], alternatives: int
) -> list[TokenLogprob]:
    """Report the log-probability of each row's token, and of its `alternatives` best tokens."""
    logprobs = logits.float().log_softmax(dim=-1)
    best = logprobs.topk(min(alternatives, logits.shape[-1]))
    return [
        TokenLogprob(
            token, float(row[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
        )
        for row, token, ids, values in zip(logprobs, tokens, best.indices, best.values, strict=True)
    ]
