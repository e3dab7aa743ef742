"""Many short suffixes after one prefix, in as few passes as fit, read at their last position.

    prefix    read once -> keys and values, kept by content and version of the weights
    suffixes  -> chunks of at most `max_tokens` positions, in which what begins alike stands once
    a chunk   one flat row, `SharedPrefix` as its cache -> hidden states of the last positions
              read(hidden [n, D]) -> values [n, L]: logits of labels, or those of a head

Every value is that of the suffix alone, up to the rounding of floats. Several threads may score at
the same time: the model is run by one of them at a time, chunk by chunk. Knows ids, vectors and
positions; must not know queries, items or templates.

Source: multi-item scoring and in-batch prefix caching, MixLM (arXiv 2512.07846).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from lapilli.config.reader import shown
from lapilli.errors import ConfigError, PromptError
from lapilli.generate.engine.feature_cache import FeatureCache, WeightWatch, content_digest
from lapilli.generate.reference import lock_of
from lapilli.lm import Memory
from lapilli.model import VisionLanguageModel
from lapilli.nn.shared_prefix import SharedPrefix
from lapilli.pipeline.backend import ProcessedPrompt
from lapilli.pipeline.prefix_tree import new_positions, prefix_tree
from lapilli.prompt.encode import EncodedPrompt, Span
from lapilli.prompt.guard import check_work
from lapilli.shapes import Float, Int, Tensor

MAX_TOKENS = 2048
PREFIX_BYTES = 256 << 20

Read = Callable[[Float[Tensor, "n D"]], Float[Tensor, "n L"]]
"""Values of hidden states behind the final norm."""


def _checked(suffix: ProcessedPrompt) -> ProcessedPrompt:
    """Return the suffix, which has positions, and nothing beside them."""
    if not len(suffix.encoded):
        raise PromptError("a suffix has no positions: nothing would be read after it")
    beside = [span.modality for span in suffix.encoded.spans if not span.length]
    if beside:
        raise PromptError(
            f"the {beside[0]} of an item, or behind the items, stands beside the sequence "
            '(fusion = "cross_attention"), which many items share: put it into the query '
            'before them, or declare it with fusion = "tokens"'
        )
    return suffix


def join(pieces: Sequence[ProcessedPrompt]) -> ProcessedPrompt:
    """Return pieces of a prompt one after the other."""
    ids: list[int] = []
    spans: list[Span] = []
    for piece in pieces:
        start = len(ids)
        ids += piece.encoded.input_ids
        spans += [
            Span(0, start + span.start, span.length, span.modality) for span in piece.encoded.spans
        ]
    media = tuple(item for piece in pieces for item in piece.media)
    return ProcessedPrompt(EncodedPrompt(ids, [False] * len(ids), tuple(spans)), media)


class SuffixScorer:
    """Scores suffixes after a prefix.

    A language model of another library is given every prompt alone and whole.

    Args:
        model: the model.
        max_tokens: positions of suffixes in one pass; a longer suffix has a pass of its own.
        prefix_bytes: most bytes of keys and values that are kept of prefixes; 0: of none beyond
            the call that made them.

    Raises:
        ConfigError: limits that leave nothing.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        max_tokens: int = MAX_TOKENS,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        are_numbers = all(type(one) is int for one in (max_tokens, prefix_bytes))
        if not are_numbers or max_tokens < 1 or prefix_bytes < 0:
            raise ConfigError(
                "max_tokens must be at least 1 and prefix_bytes at least 0, got "
                f"{shown(max_tokens)} and {shown(prefix_bytes)}"
            )
        self._model = model
        self._max_tokens = max_tokens
        self._watch = WeightWatch(model)
        self.prefixes = FeatureCache(prefix_bytes)
        """Keys and values of prefixes."""

    def logits(
        self,
        prefix: ProcessedPrompt,
        suffixes: Iterable[ProcessedPrompt],
        ids: Sequence[int],
        *,
        on_prefix: Callable[[bool], None] | None = None,
    ) -> Iterator[Float[Tensor, " L"]]:
        """Yield the logits of these tokens after every suffix, float32 on the CPU."""
        wanted = torch.tensor(ids, device=self._model.device)

        def read(hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n L"]:
            return self._token_logits(hidden, wanted)

        return self.values(prefix, suffixes, read, on_prefix=on_prefix)

    def values(
        self,
        prefix: ProcessedPrompt,
        suffixes: Iterable[ProcessedPrompt],
        read: Read,
        *,
        on_prefix: Callable[[bool], None] | None = None,
    ) -> Iterator[Float[Tensor, " L"]]:
        """Yield what `read` makes of the last hidden state of every suffix, in order.

        The suffixes are taken from the iterable when there is room for them. What `read` returns
        comes as float32 on the CPU. `on_prefix` is told once whether keys and values of the prefix
        were kept from an earlier call; never where the model reads every prompt alone.

        Raises:
            PromptError: a prefix or a suffix without positions, or a medium beside the sequence
                that stands in a suffix.
        """
        if not len(prefix.encoded):
            raise PromptError("the prefix has no positions: there is nothing to share")
        run = self._pass if self._model.language_model.supports_varlen else self._alone
        held = _Held(content_digest(prefix), on_prefix)
        for chunk in self._chunks(suffixes):
            check_work()
            yield from run(prefix, chunk, read, held)

    def _token_logits(self, hidden: Tensor, ids: Int[Tensor, " L"]) -> Tensor:
        return self._model.language_model.token_logits(hidden, ids)

    def _chunks(self, suffixes: Iterable[ProcessedPrompt]) -> Iterator[list[ProcessedPrompt]]:
        """Yield suffixes that go through the model together.

        Those before one that cannot be read come first, then its error.
        """
        chunk: list[ProcessedPrompt] = []
        tokens, failed = 0, None
        checked = map(_checked, suffixes)
        while True:
            try:
                suffix = next(checked)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised below
                failed = error
                break
            # One that adds nothing counts as one, since its values take room.
            new = max(1, new_positions(suffix, chunk[-1])) if chunk else len(suffix.encoded)
            if chunk and tokens + new > self._max_tokens:
                yield chunk
                chunk, tokens, new = [], 0, len(suffix.encoded)
            chunk.append(suffix)
            tokens += new
        if chunk:
            yield chunk
        if failed is not None:
            raise failed

    @torch.inference_mode()
    def _pass(
        self,
        prefix: ProcessedPrompt,
        chunk: Sequence[ProcessedPrompt],
        read: Read,
        held: "_Held",
    ) -> Float[Tensor, "n L"]:
        """Return the values of suffixes that are read together."""
        tree, model = prefix_tree(chunk), self._model
        packed = join([branch.piece for branch in tree.branches])
        lengths = [len(branch.piece.encoded) for branch in tree.branches]
        parents = [branch.parent for branch in tree.branches]
        with lock_of(model.language_model).turn:
            before = self._prefix(prefix, held)
            shared = SharedPrefix(before, lengths, parents)
            row = model.embed_prompts([packed.encoded], [packed.media])
            hidden = model.language_model.forward(
                row.inputs_embeds,
                position_ids=shared.position_ids,
                cache=shared,
                memory=self._memory(prefix, held),
            )
            return read(hidden[0, shared.last[list(tree.ends)]]).float().cpu()

    def _prefix(self, prefix: ProcessedPrompt, held: "_Held") -> Float[Tensor, "2 L 1 K P A"]:
        """Return keys and values of the prefix, of the weights of now; the model is locked."""
        version = self._watch.version, self._watch.token  # asked for in this order
        self._watch.release()
        if held.layers is not None and held.version == version:
            return held.layers
        model, config = self._model, self._model.language_model.config
        length = len(prefix.encoded)
        shape = (2, config.num_layers, 1, config.num_kv_heads, length, config.head_dim)
        kept = self.prefixes.get((held.digest, version))
        if held.version is None and held.on_prefix is not None:
            held.on_prefix(kept is not None)
        if kept is None:
            batch = model.embed_prompts([prefix.encoded], [prefix.media])
            cache = model.language_model.new_cache(1, capacity=length)
            model.language_model.forward(
                batch.inputs_embeds,
                position_ids=batch.position_ids,
                cache=cache,
                memory=batch.memory,
            )
            kept = cache.stacked().view(-1, config.head_dim)
            self.prefixes.put((held.digest, version), kept)
        held.layers, held.version, held.memory = kept.view(shape), version, None
        return held.layers

    def _memory(self, prefix: ProcessedPrompt, held: "_Held") -> Memory | None:
        """Return what stands beside the prefix, seen by every position of the suffixes."""
        if all(span.length for span in prefix.encoded.spans):
            return None
        if held.memory is None:
            memory = self._model.embed_prompts([prefix.encoded], [prefix.media]).memory
            if memory is not None:
                held.memory = replace(memory, starts=torch.zeros_like(memory.starts))
        return held.memory

    @torch.inference_mode()
    def _alone(
        self,
        prefix: ProcessedPrompt,
        chunk: Sequence[ProcessedPrompt],
        read: Read,
        held: "_Held",
    ) -> Float[Tensor, "n L"]:
        """Return the same values from a pass over every whole prompt: the plain twin."""
        found = []
        for suffix in chunk:
            whole = join([prefix, suffix])
            with lock_of(self._model.language_model).turn:
                hidden = self._model(self._model.embed_prompts([whole.encoded], [whole.media]))
                found.append(read(hidden[:, -1]).float().cpu())
        return torch.cat(found)


class _Held:
    """The prefix of one call, so that it stays through the call whatever else is kept."""

    def __init__(self, digest: bytes, on_prefix: Callable[[bool], None] | None) -> None:
        self.digest = digest
        self.on_prefix = on_prefix
        self.version: tuple[int, object] | None = None
        self.layers: Float[Tensor, "2 L 1 K P A"] | None = None
        self.memory: Memory | None = None
