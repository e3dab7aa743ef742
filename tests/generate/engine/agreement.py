"""Equal answers, up to the rounding of a step: two tokens may change places only in a near tie."""

import torch

from lapilli.generate.engine import Request
from lapilli.generate.output import Generation
from lapilli.model import VisionLanguageModel

TIE = 1e-3
"""Largest difference of two logits that float32 rounding may turn round (docs/guide/engine.md)."""


def assert_same(
    ours: Generation, theirs: Generation, model: VisionLanguageModel, request: Request
) -> None:
    if ours == theirs:
        return
    pairs = list(zip(ours.token_ids, theirs.token_ids, strict=False))
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if at is None or not request.params.is_greedy:
        parts = [(g.token_ids, g.text, g.finish_reason, g.prompt_len) for g in (ours, theirs)]
        assert parts[0] == parts[1]
        for a, b in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
            assert abs(a.logprob - b.logprob) < TIE
        return
    scores = logits_after(model, request, theirs.token_ids[:at])
    gap = scores[theirs.token_ids[at]] - scores[ours.token_ids[at]]
    assert gap.abs() < TIE, f"token {at}: {ours.token_ids} instead of {theirs.token_ids}"


@torch.inference_mode()
def logits_after(
    model: VisionLanguageModel, request: Request, token_ids: tuple[int, ...]
) -> torch.Tensor:
    batch = model.embed_prompts([request.prompt], [request.media])
    answer = model.language_model.embed(torch.tensor([token_ids], dtype=torch.long))
    x = torch.cat((batch.inputs_embeds, answer), dim=1)
    positions = torch.arange(x.shape[1])[None]
    hidden = model.language_model.forward(x, position_ids=positions, memory=batch.memory)
    return model.logits(hidden[0, -1])
