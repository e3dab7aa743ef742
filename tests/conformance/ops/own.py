"""The same golden numbers through `lapilli.*` itself, wherever our own API does the same thing.

Where it deliberately does not share a quirk of the original, what is right is checked instead and
`differs` names the quirk; a case that our own API has no counterpart for gives no result.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from PIL import Image

from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.config.generation import SamplingParams
from lapilli.config.llava import parse_pinpoints
from lapilli.config.model import ImageConfig, PixelConfig, VisionConfig
from lapilli.config.projector import tile_features
from lapilli.errors import LapilliError
from lapilli.generate.reference import generate as run_generation
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes import mode_of
from lapilli.modality.image.modes.anyres import best_resolution, tile_grid
from lapilli.model import FusedBatch
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import Message
from lapilli.prompt.template import TEMPLATES, MediaSlot, Segment, TextSegment, to_text
from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check, NotTheSame
from tests.conformance.ops.generation import compare_greedy
from tests.conformance.ops.pictures import compare_pixels
from tests.conformance.ops.vision import (
    EMBEDS_ATOL,
    LIMITED_ATOL,
    LOGITS_ATOL,
    compare_forward,
    compare_projection,
    load_projection,
    project,
    stored_positions,
)


def loaded(workshop: Workshop) -> Loaded:
    """The variant, loaded once through our own API."""

    def make() -> Loaded:
        made = workshop.checkpoint()
        with workshop.at_home():
            return load_checkpoint(
                made["model_path"], base=made["model_base"], device="cpu", dtype="float32"
            )

    return workshop.once("own", make)


def load(case: Case, workshop: Workshop, check: Check) -> None:
    own, expect = loaded(workshop), case.expect
    check.equal("missing", own.report.missing, ())
    check.equal("unexpected", own.report.unexpected, ())
    check.equal("vocabulary", own.tokenizer.vocab_size, expect["len_tokenizer"])
    check.equal("embedding rows", own.config.text.vocab_size, expect["embed_shape"][0])
    if workshop.spec.get("logit_limit"):
        return  # the original drew the new rows at random
    total = sum(float(p.detach().double().abs().sum()) for p in own.model.parameters())
    expected = sum(p["abs_sum"] for p in expect["params"].values())
    check.close("sum of all weights", total, expected, atol=0, rtol=1e-6)


def templates(case: Case, workshop: Workshop, check: Check) -> None:
    if case.raises or case.given.get("list") or case.given.get("clear"):
        raise NotTheSame
    segments = _render(case)
    check.equal("prompt", to_text(segments), case.expect["prompt"])


def _render(case: Case) -> list[Segment]:
    """The case's turns as messages, rendered by our template."""
    turns, name = case.given["turns"], case.given["conv"]
    roles = [role for role, _ in turns]
    alternating = roles == [i % 2 for i in range(len(turns))] and len(turns) > 0
    if not alternating or any(isinstance(text, list) for _, text in turns):
        raise NotTheSame
    template = TEMPLATES[name]
    if template.media_open and any("<image>" in (text or "") for _, text in turns):
        raise NotTheSame  # our template writes the tags, the original's caller does
    open_turn = roles[-1] == 0 or not turns[-1][1]
    if open_turn and roles[-1] == 0 and template.style != "plain":
        raise NotTheSame  # the original writes no open turn here
    messages = []
    for role, text in turns:
        pictures = [None] * (text or "").count("<image>")
        kind = "assistant" if role else "user"
        messages.append(Message.from_placeholders(kind, text or "", pictures))
    return template.render(messages, open_turn=open_turn)


def prompt(case: Case, workshop: Workshop, check: Check) -> None:
    if case.raises:
        raise NotTheSame
    tokenizer = loaded(workshop).tokenizer
    special = [tokenizer.id_to_token(index) for index in tokenizer.added_vocab.values()]
    if any(token in (text or "") for _, text in case.given["turns"] for token in special):
        check.differs = "12"  # what a person types stays text
        for _, text in case.given["turns"]:
            typed = encode([TextSegment(text or "", literal=True)], tokenizer, [])
            body = typed.input_ids[len(tokenizer.prefix_ids) :]
            check.equal(
                "ids of typed tokens", set(body) & set(tokenizer.added_vocab.values()), set()
            )
        return
    segments = _render(case)
    encoded = encode(segments, tokenizer, [1] * sum(isinstance(s, MediaSlot) for s in segments))
    check.equal("input_ids", with_markers(encoded), case.expect["input_ids"])


def with_markers(encoded: EncodedPrompt) -> list[int]:
    """Ids with -200 for every picture, whatever its length."""
    ids: list[int] = []
    at = 0
    for span in encoded.spans:
        ids += [*encoded.input_ids[at : span.start], -200]
        at = span.start + span.length
    return ids + encoded.input_ids[at:]


def pixels(case: Case, workshop: Workshop, check: Check) -> None:
    if case.raises:
        raise NotTheSame
    image = loaded(workshop).model.modality("image")
    pictures = workshop.pictures(case.given["images"])
    tiles = [image.prepare(picture).pixel_values for picture in pictures]
    found: Any = tiles
    if case.expect["container"] == "tensor":
        stacked = torch.stack(tiles)
        found = stacked if len(case.expect["shape"]) == 5 else stacked[:, 0]
    jpeg = any(name.endswith(".jpg") for name in case.given["images"])
    compare_pixels(check, found, case, case.expect, jpeg=jpeg)


def vision(case: Case, workshop: Workshop, check: Check) -> None:
    image = loaded(workshop).model.modality("image")
    pictures = workshop.pictures(case.given["images"])
    tiles = torch.cat([image.prepare(picture).pixel_values for picture in pictures])
    with torch.inference_mode():
        features, projected = image.vision_tower(tiles), image.encode_tiles(tiles)
    projection = load_projection(workshop)
    compare_projection(check, "features_proj", features, case, projection)
    compare_projection(check, "projected_proj", projected, case, projection)


def geometry(case: Case, workshop: Workshop, check: Check) -> None:
    tile = case.given["tile"]
    sizes = parse_pinpoints(case.given["pinpoints"], width_first=True)
    pixels = PixelConfig(crop_size=ImageSize(tile, tile), shortest_edge=tile)
    config = ImageConfig(pixels=pixels, aspect="anyres", merge="spatial_unpad", pinpoints=sizes)
    tower = VisionConfig(
        image_size=tile,
        patch_size=14,
        hidden_size=4,
        intermediate_size=4,
        num_layers=1,
        num_heads=1,
    )
    for (width, height), row in zip(case.given["sizes"], case.expect["rows"], strict=True):
        size = ImageSize(height, width)
        best = best_resolution(size, sizes)
        grid = tile_grid(best, tile)
        counted = mode_of(config).num_tokens(size, config, tile_features(tower), has_newline=True)
        found = counted - tower.num_patches
        check.equal(f"{width}x{height}", [best.width, best.height], row["best"])
        check.equal(f"{width}x{height}", [grid.columns, grid.rows], row["grid"])
        check.equal(f"{width}x{height}", found, row["n_features"])


class Rows:
    """The rows of a case, each with its own pictures, as our own API takes them."""

    def __init__(self, case: Case, workshop: Workshop) -> None:
        given = case.given
        plain = given.get("image_format", "auto") == "auto" and not given.get("no_image_sizes")
        if "prompts" not in given or not plain:
            raise NotTheSame
        self.own = loaded(workshop)
        self.texts: list[str] = given["prompts"]
        pictures = workshop.pictures(given["images"] or [])
        self.eats = given["images"] is not None and any("<image>" not in t for t in self.texts)
        self.media: list[list[Image.Image]] = []
        for text in self.texts:
            count = text.count("<image>")
            self.media.append(pictures[:count])
            # Quirk 3: in the original a row without a picture uses one up.
            pictures = pictures[max(count, int(given["images"] is not None)) :]
        self.fits = not pictures and all(
            len(row) == text.count("<image>")
            for row, text in zip(self.media, self.texts, strict=True)
        )

    def encode(self) -> tuple[list[EncodedPrompt], list[list[Any]]]:
        """Prompts and prepared pictures of every row."""
        image = self.own.model.modality("image")
        prepared = [[image.prepare(picture) for picture in row] for row in self.media]
        prompts = [
            encode(raw_segments(text), self.own.tokenizer, [image.num_tokens(item) for item in row])
            for text, row in zip(self.texts, prepared, strict=True)
        ]
        return prompts, prepared

    def batch(self) -> FusedBatch:
        """Embedded rows."""
        prompts, prepared = self.encode()
        return self.own.model.embed_prompts(prompts, prepared)

    @property
    def is_cut(self) -> bool:
        """Whether the original cuts one of the rows (quirk 6)."""
        limit = self.own.config.max_length
        return limit is not None and any(len(prompt) > limit for prompt in self.encode()[0])


def _is_windowed(rows: Rows) -> bool:
    """Whether our own API sees less than the original, which forgets Mistral's window."""
    window = getattr(rows.own.config.text, "sliding_window", None)
    longest = max(len(prompt) for prompt in rows.encode()[0])
    return window is not None and longest + 64 > window


@contextmanager
def whole_window(own: Loaded) -> Iterator[None]:
    """Inside, our model sees as far as the original's, which forgets Mistral's sliding window."""
    language_model = own.model.language_model
    before = language_model.config
    if getattr(before, "sliding_window", None) is not None:
        language_model.config = replace(before, sliding_window=None)
    try:
        yield
    finally:
        language_model.config = before


def raw_segments(text: str) -> list[Segment]:
    """A prompt of the original as segments."""
    segments: list[Segment] = []
    for number, piece in enumerate(text.split("<image>")):
        segments += [MediaSlot()] if number else []
        segments += [TextSegment(piece)] if piece else []
    return segments


def sample(case: Case, workshop: Workshop, check: Check) -> None:
    if case.given.get("pad_side") and case.given.get("attention_mask", "none") == "none":
        raise NotTheSame  # padding read as text (quirk 5)
    rows = Rows(case, workshop)
    if not rows.fits:
        check.differs = "4"
        _refuses(check, rows, case, workshop)
        return
    if case.raises:
        raise NotTheSame
    if rows.eats:
        check.differs = "3"
    if _is_windowed(rows):
        check.differs = "window"
    with torch.inference_mode(), whole_window(rows.own):
        batch = rows.batch()
        if rows.is_cut:
            check.differs = "6"
            full = [len(prompt) for prompt in rows.encode()[0]]
            check.equal("lengths", batch.attention_mask.sum(1), full)
            return
        _compare_rows(case, workshop, check, rows, batch)


def _refuses(check: Check, rows: Rows, case: Case, workshop: Workshop) -> None:
    """Our own API wants exactly one picture for each place."""
    given = workshop.pictures(case.given["images"] or [])
    image = rows.own.model.modality("image")
    items = [image.prepare(picture) for picture in given]
    media = [items, *[[] for _ in rows.texts[1:]]]
    try:
        prompts = [
            encode(raw_segments(text), rows.own.tokenizer, [image.num_tokens(i) for i in row])
            for text, row in zip(rows.texts, media, strict=True)
        ]
        rows.own.model.embed_prompts(prompts, media)
    except LapilliError:
        check.that(True, "")
        return
    check.that(False, "another number of pictures than of places was accepted")


def _compare_rows(
    case: Case, workshop: Workshop, check: Check, rows: Rows, batch: FusedBatch
) -> None:
    """Embeddings and logits, moved from our left padding to where the golden rows stand."""
    shape = case.expect["prepare"].get("inputs_embeds_shape")
    width = shape[1] if shape else batch.inputs_embeds.shape[1]
    valid = torch.zeros(len(rows.texts), width, dtype=torch.bool)
    left = loaded(workshop).config.padding_side == "left"
    for row, length in enumerate(batch.attention_mask.sum(1).tolist()):
        valid[row, width - length if left else 0 : width if left else length] = True

    def moved(values: torch.Tensor) -> torch.Tensor:
        out = values.new_zeros(*valid.shape, values.shape[-1])
        out[valid] = values[batch.attention_mask]
        return out

    projection = load_projection(workshop)
    if "embeds_proj" in case.arrays:
        found = project(moved(batch.inputs_embeds), projection)
        at = stored_positions(width)
        check.close("embeds_proj", found[:, at], case.arrays["embeds_proj"], atol=EMBEDS_ATOL)
    if "logits_proj" in case.arrays:
        model = rows.own.model
        if left and not case.given.get("position_ids"):
            # The original counts positions with their padding. That changes nothing but the
            # rounding of the rotary angles, which reaches 2e-4 in the logits here.
            slots = torch.arange(width).expand(valid.shape)
            batch = replace(batch, position_ids=slots)
        logits = moved(model.logits(model(batch)))
        limit = workshop.spec.get("logit_limit")
        compare_forward(check, case, logits, valid, projection, limit=limit)


def generate(case: Case, workshop: Workshop, check: Check) -> None:
    known = {"num_beams", "eos_token_id", "pad_token_id", "max_new_tokens", "length_penalty"}
    known |= {"use_cache"}
    options = case.given.get("kwargs", {})
    if case.raises or "stop" in case.given or set(options) - known:
        raise NotTheSame
    rows = Rows(case, workshop)
    if not rows.fits:
        raise NotTheSame
    if rows.is_cut:
        raise NotTheSame  # quirk 6: `sample` checks that nothing is cut
    if _is_windowed(rows):
        check.differs = "window"
    eos = options.get("eos_token_id")
    params = SamplingParams(
        max_new_tokens=options.get("max_new_tokens", 24),
        num_beams=options.get("num_beams", 1),
        length_penalty=options.get("length_penalty", 1.0),
    )
    own = rows.own

    def answer(batch: FusedBatch) -> list[Any]:
        eos_ids = own.config.tokens.eos_ids if eos is None else (eos,)
        return run_generation(
            own.model, batch, params, tokenizer=own.tokenizer, eos_ids=eos_ids or None
        )

    with torch.inference_mode(), whole_window(own):
        prompts, prepared = rows.encode()
        together = answer(own.model.embed_prompts(prompts, prepared))
        if len(prompts) > 1:
            alone = [
                answer(own.model.embed_prompts([p], [m]))[0]
                for p, m in zip(prompts, prepared, strict=True)
            ]
            check.equal("rows alone", [a.token_ids for a in together], [a.token_ids for a in alone])
            if own.config.padding_side == "right":
                check.differs = "5"
                return
    _compare_answers(case, workshop, check, together)


def _compare_answers(case: Case, workshop: Workshop, check: Check, answers: list[Any]) -> None:
    expected = case.expect["sequences"]
    if "sequences_scores" in case.expect:
        atol = LIMITED_ATOL if workshop.spec.get("logit_limit") else LOGITS_ATOL
        scores = [answer.score for answer in answers]
        check.close("sequences_scores", scores, case.expect["sequences_scores"], atol=atol)
        return
    # The first id of the original is the extra BOS; short rows end in padding.
    found = [
        [row[0], *answer.token_ids, *row[1 + len(answer.token_ids) :]]
        for row, answer in zip(expected, answers, strict=True)
    ]
    compare_greedy(check, found, expected, case.expect["step_gaps"])
