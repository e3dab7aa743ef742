"""The exam of score.py, taken by a model in training or by exported files.

Features come from a function of scenes, so the same exam serves the language stage (region words)
and the later ones
(a tower that sees the drawn picture).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lapilli.config.generation import SamplingParams
from lapilli.generate.reference import generate
from lapilli.modality.image.image import VisionTransformer
from lapilli.model import VisionLanguageModel
from lapilli.pipeline import load
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import Message
from lapilli.prompt.template import TEMPLATES
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor
from pebble.draw import draw, model_pixels
from pebble.reader import FeatureReader
from pebble.regions import region_words
from pebble.scene import Scene
from pebble.score import Answerer, ExamItem, score
from pebble.tower import normalise

SceneFeatures = Callable[[Scene], Float[Tensor, "P E"]]


def words_of_scene(patches: int) -> SceneFeatures:
    """Region words in the place of features."""

    def features(scene: Scene) -> Tensor:
        words = region_words(scene, patches)
        return torch.from_numpy(words.reshape(patches**2, -1).astype(np.float32))

    return features


def seen_by(tower: VisionTransformer) -> SceneFeatures:
    """Return what the tower makes of the drawn picture."""

    def features(scene: Scene) -> Tensor:
        pixels = model_pixels(draw(scene), tower.config.image_size)
        out: Tensor = tower(normalise(torch.from_numpy(pixels)[None]))[0]
        return out

    return features


def examine(
    model: FeatureReader,
    tokenizer: Tokenizer,
    features: SceneFeatures,
    items: Sequence[ExamItem],
    *,
    template: str = "vicuna_v1",
) -> Mapping[str, float]:
    """Accuracy per skill of greedy answers, and "all"."""
    reader = VisionLanguageModel(model.language_model)
    params = SamplingParams(max_new_tokens=80)

    def answer(batch: Sequence[ExamItem]) -> list[str]:
        seen = [[] if item.scene is None else [features(item.scene)] for item in batch]
        prompts = [
            _prompt(item, tokenizer, [len(one) for one in item_seen], template)
            for item, item_seen in zip(batch, seen, strict=True)
        ]
        media = [[model.projector(one.float()).float() for one in item_seen] for item_seen in seen]
        fused = reader.embed_prompts(prompts, media)
        return [one.text for one in generate(reader, fused, params, tokenizer=tokenizer)]

    with torch.no_grad():
        tallies = score(answer, items)
    return {name: round(tally.accuracy, 4) for name, tally in tallies.items()}


def ask_exported(folder: Path) -> Answerer:
    """Greedy answers of the files in a folder, read and asked as a person's program would."""
    chat = load(str(folder), template="vicuna_v1", dtype="float32")
    params = SamplingParams(max_new_tokens=80)

    def answer(batch: Sequence[ExamItem]) -> list[str]:
        conversations = [
            messages_of(item, None if item.scene is None else draw(item.scene)) for item in batch
        ]
        return [one.text for one in chat.batch(conversations, params)]

    return answer


def _prompt(
    item: ExamItem, tokenizer: Tokenizer, lengths: Sequence[int], template: str
) -> EncodedPrompt:
    segments = TEMPLATES[template].render(messages_of(item, "picture" if lengths else None))
    return encode(segments, tokenizer, lengths)


def messages_of(item: ExamItem, picture: object | None) -> list[Message]:
    """Return the question with what was said before it; a picture stands in the first turn."""
    messages = []
    for question, answer in item.history:
        messages += [Message.user(question), Message.assistant(answer)]
    messages.append(Message.user(item.question))
    if picture is not None:
        messages[0] = Message.user(messages[0].text, picture)
    return messages
