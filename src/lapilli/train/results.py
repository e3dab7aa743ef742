"""Results of a run on the disk: their form, what they lie on, and the exam that they sit.

    align                        config.json, mm_projector.bin           a projector
    instruct, lora               adapter, non_lora_trainables.bin        adapter and projector
    instruct | lora, save.merge  a whole checkpoint
    save.layout = "huggingface"  the same as LlavaForConditionalGeneration, or a PEFT adapter

    held-out sample              positions before an answer --load, engine, greedy--> answer
                                 the answer itself ------------------------------------> equal?
    folder/exam.jsonl            {"sample", "reference", "answer", "equal"}

The same files at the end and at every save on the way, tokenizer included. The folder changes in
one step: killed or out of space while saving, what was there before stays whole. Knows how a loaded
model answers; must not know file formats or the loop.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Final, TypedDict

import torch
from torch import nn

from lapilli.checkpoint.device import DTYPES
from lapilli.checkpoint.formats.weights import complete_weights
from lapilli.checkpoint.keymaps import PROJECTOR, TOWER, is_joint
from lapilli.checkpoint.load import Loaded, load_checkpoint
from lapilli.checkpoint.read.adapter import is_adapter, open_adapter
from lapilli.checkpoint.read.directory import find_base
from lapilli.checkpoint.source import find_directory, is_local, read_optional_json
from lapilli.checkpoint.write.adapter import (
    is_unknown_to_peft,
    merged_state,
    save_adapter,
)
from lapilli.checkpoint.write.files import Formats, Stored
from lapilli.checkpoint.write.huggingface import check_hf_files, check_hf_layout, save_hf
from lapilli.checkpoint.write.llava import (
    as_original,
    check_llava_layout,
    is_lasting,
    save_llava,
    save_projector,
)
from lapilli.config.generation import SamplingParams
from lapilli.config.model import ModelConfig
from lapilli.config.reader import given_path
from lapilli.errors import ConfigError, LapilliError
from lapilli.generate.output import Generation
from lapilli.lora import LoraConfig, adapters
from lapilli.model import VisionLanguageModel
from lapilli.nn.linear import FrozenQuantizedLinear
from lapilli.pipeline.backend import Backend, ProcessedPrompt, with_stops
from lapilli.prompt.choose import Template, template_by_name
from lapilli.prompt.encode import EncodedPrompt
from lapilli.train.data import EncodedDataset, EncodedSample
from lapilli.train.recipe import Recipe
from lapilli.train.trainer.task import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """The form of the results of a run.

    Attributes:
        loaded: the checkpoint that the run started from.
        config: what the trained model is.
        base: the checkpoint with the weights that an adapter or a projector lies on.
        template: the conversation template that the model is spoken to with.
    """

    loaded: Loaded
    recipe: Recipe
    config: ModelConfig
    base: str
    template: Template

    @classmethod
    def of(cls, loaded: Loaded, recipe: Recipe) -> "Results":
        """Check before the run that the results of a recipe can be saved.

        Raises:
            ConfigError: the recipe asks for a form that this checkpoint cannot be saved in.
            MissingFileError: an adapter or a projector whose base is not there.
        """
        config = as_original(loaded.config) if recipe.save.layout == "llava" else loaded.config
        tuned = config.vision_in_checkpoint or recipe.model.tune_tower
        tuned = tuned or any(name.startswith(TOWER) for name in loaded.beside)
        results = cls(
            loaded=loaded,
            recipe=recipe,
            config=replace(config, vision_in_checkpoint=tuned),
            base=_base_of(loaded, recipe),
            template=_spoken(loaded, recipe),
        )
        results._check_savable()
        return results

    @property
    def dtype(self) -> Formats:
        """Return the dtype of the stored weights: as in the files that the run started from."""
        name = self.recipe.save.dtype
        if name is None:
            return self.loaded.stored
        if name not in DTYPES:
            raise ConfigError(f"save.dtype is {name!r}: choose from {', '.join(DTYPES)}")
        return DTYPES[name]

    def config_for(self, *, whole: bool) -> ModelConfig:
        """Return the configuration, its tower named so that it is found from the results.

        A tower in a folder of the checkpoint itself is copied into a whole one; an adapter or a
        projector says where it is.
        """
        source = self.config.vision_source
        if source is None or Path(source).is_absolute() or (whole and not is_lasting(source)):
            return self.config
        found = find_directory(source, beside=(self.loaded.path, Path(self.base)))
        return replace(self.config, vision_source=str(found) if found else source)

    @property
    def is_adapter(self) -> bool:
        """Return whether what comes out is an adapter beside its base."""
        return self.recipe.lora is not None and not self.recipe.save.merge

    def _check_savable(self) -> None:
        """Check the recipe against what the layouts can hold; see `of`."""
        save, lora = self.recipe.save, self.recipe.lora
        if save.merge and lora is not None and lora.base != "float":
            raise ConfigError(
                f"save.merge with lora.base {lora.base!r}: an adapter is not folded into packed "
                "weights; leave merge out, then load base and adapter in float and save that"
            )
        _ = self.dtype
        if save.layout != "huggingface":
            check_llava_layout(self.config)
            return
        check_hf_layout(self.loaded.config)
        if not self.is_adapter:
            check_hf_files(
                self.config,
                tokenizer=self.loaded.tokenizer,
                tokenizer_path=self.loaded.tokenizer_path,
                template=self.template,
            )
            return
        if self.recipe.model.tune_tower or self.loaded.config.has_newline:
            what = "a tuned vision tower" if self.recipe.model.tune_tower else "image_newline"
            raise ConfigError(
                f"save.layout is 'huggingface', but a PEFT adapter cannot carry {what}: set "
                'save.merge, or save.layout = "llava"'
            )
        if self.config.modalities:
            raise ConfigError(
                "save.layout is 'huggingface', but a PEFT adapter cannot carry the modality "
                f'{self.config.modalities[0][0]!r}: set save.merge, or save.layout = "llava"'
            )
        beyond = [name for name in self.loaded.beside if not name.startswith(PROJECTOR)]
        if beyond:
            raise ConfigError(
                f"save.layout is 'huggingface', but a PEFT adapter cannot carry {beyond[0]}, which "
                "came with the adapter that the run starts from: set save.merge, or save.layout = "
                '"llava"'
            )
        beyond = [path for path in self._adapted() if is_unknown_to_peft(path)]
        if beyond:
            raise ConfigError(
                f"save.layout is 'huggingface', but a PEFT adapter cannot lie on {beyond[0]} "
                f"({len(beyond)} such layers): take the vision tower out of lora.targets, or set "
                'save.merge, or save.layout = "llava"'
            )
        if self.loaded.config.layout == "llava":
            raise ConfigError(
                f"save.layout is 'huggingface', but the adapter lies on {self.base}, which has the "
                "layout of the original: PEFT needs the model in its own layout. Set save.merge, "
                "or export the checkpoint first: lapilli export SOURCE OUT --layout huggingface"
            )

    def _adapted(self) -> list[str]:
        """Return the paths of the layers that have an adapter or will get a fresh one."""
        model, lora = self.loaded.model, self.recipe.lora
        present = [path for path, _ in adapters(model)]
        if present or lora is None or not lora.targets:
            return present
        config = LoraConfig(rank=lora.rank, alpha=lora.alpha, targets=lora.targets)
        return [
            path
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear | FrozenQuantizedLinear) and config.is_target(path)
        ]


def save_results(
    folder: Path,
    model: VisionLanguageModel,
    results: Results,
    *,
    state: Mapping[str, torch.Tensor] | None = None,
    extra: Mapping[str, str | bytes] | None = None,
) -> None:
    """Save what the stage trained, in the form that its recipe asks for.

    Args:
        folder: is made or replaced, in one step; it holds nothing but these results.
        model: as it is trained, adapters unmerged.
        results: made before the run.
        state: tensors under the names of `model.state_dict()` in place of the model's own
            (averages, or what several processes gathered).
        extra: more files by name, such as README.md.

    Raises:
        CheckpointError: the disk is full; what was in `folder` before is still there.
    """
    recipe = results.recipe
    is_hf = recipe.save.layout == "huggingface"
    has_adapter = any(True for _ in adapters(model))
    merges = has_adapter and recipe.save.merge
    common = _Common(
        tokenizer_path=results.loaded.tokenizer_path,
        template=results.template,
        overwrite=True,
        state=merged_state(model, state) if merges else state,
        extra=extra,
    )
    base, lies_on = results.base, results.config_for(whole=False)
    if has_adapter and not merges:
        trained = [*_trained_whole(model, recipe), *results.loaded.beside]
        layout = recipe.save.layout
        save_adapter(folder, model, lies_on, layout=layout, base=base, trained=trained, **common)
    elif is_hf:
        save_hf(
            folder,
            model,
            results.config,
            tokenizer=results.loaded.tokenizer,
            dtype=results.dtype,
            **common,
        )
    elif _is_projector_alone(model):
        save_projector(folder, model, lies_on, base=base, **common)
    else:
        config = results.config_for(whole=True)
        save_llava(folder, model, config, dtype=results.dtype, **common)


class _Common(TypedDict):
    """Arguments that every form is saved with."""

    tokenizer_path: Path
    template: Template
    overwrite: bool
    state: Mapping[str, Stored] | None
    extra: Mapping[str, str | bytes] | None


def _trained_whole(model: VisionLanguageModel, recipe: Recipe) -> list[str]:
    """Return the parameters that an adapter's folder holds beside the adapter."""
    tunes_tower = recipe.model.tune_tower  # a tower is read from one place, so all of it
    return [
        name
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
        and (parameter.requires_grad or (tunes_tower and name.startswith(TOWER)))
    ]


def _is_projector_alone(model: VisionLanguageModel) -> bool:
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return bool(trained) and all(is_joint(name) for name in trained)


def _spoken(loaded: Loaded, recipe: Recipe) -> Template:
    """Return the template of the results; the captions of the first stage say nothing."""
    asked = recipe.data.template
    return template_by_name(asked) if asked and "plain" not in asked else loaded.template.template


def _base_of(loaded: Loaded, recipe: Recipe) -> str:
    """Return the nearest checkpoint with weights: a hub id as it is, a folder by full path."""
    source, path = recipe.model.checkpoint or str(loaded.path), loaded.path
    if recipe.model.adapter is not None and is_adapter(path):  # laid over the checkpoint
        return source if not is_local(source) else str(given_path(source).resolve())
    is_hub = not is_local(source)
    while not complete_weights(path):
        path = find_base(None, _named_below(path), path)
        is_hub = False
    return source if is_hub else str(path.resolve())


def _named_below(path: Path) -> str | None:
    if is_adapter(path):
        return open_adapter(path).base_name
    name = (read_optional_json(path / "config.json") or {}).get("_name_or_path")
    return name if isinstance(name, str) else None


ANSWERS: Final = "exam.jsonl"
FIGURE: Final = "exact_match"
_ROOM: Final = 8  # tokens beyond the reference's: the same words may be cut into more of them


@dataclass(frozen=True, slots=True)
class Graded:
    """An answer beside the one that the data has."""

    sample: str
    reference: str
    answer: str

    @property
    def equal(self) -> bool:
        """Return whether they are the same but for white space around them."""
        return self.reference == self.answer


def hold_exam(
    model: Path, samples: EncodedDataset, number: int, *, template: Template, device: torch.device
) -> list[Graded]:
    """Answer the questions of `number` held-out samples, spread evenly over all of them.

    Every answer of a sample is asked for, the true turns before it. Samples that cannot be read are
    left out where the data set skips them, and so are answers that max_length cut.

    Args:
        model: folder of the results, loaded as `lapilli ask` would load it.
        samples: those that are held out.
        number: of samples; all of them, where there are fewer.
        template: of the samples; it says where an answer stops.
        device: where the answers are computed.

    Raises:
        CheckpointError: the results, or the base below them, cannot be read.
    """
    loaded = load_checkpoint(model, device=device)
    backend = Backend(loaded)
    number = min(number, len(samples))
    graded = []
    for index in (at * len(samples) // number for at in range(number)):
        name = samples.dataset.label(index)
        for prompt, ids in _questions(samples.sample(index)):
            params = SamplingParams(max_new_tokens=len(ids) + _ROOM)
            params = with_stops(params, template, loaded.tokenizer)
            reference = loaded.tokenizer.decode(ids).strip()
            for stop in template.stop:
                reference = reference.removesuffix(stop).strip()
            graded.append(Graded(name, reference, _answer(backend, prompt, params)))
    return graded


def _answer(backend: Backend, prompt: ProcessedPrompt, params: SamplingParams) -> str:
    """Return the text, or why there is none where the prompt leaves the context no room."""
    try:
        found: Generation = backend.generate([prompt], params)[0]
    except LapilliError as error:
        return f"({error})"
    return found.text.strip()


def _questions(encoded: EncodedSample) -> Iterator[tuple[ProcessedPrompt, list[int]]]:
    """Yield what stands before every whole answer of a sample, and the ids of the answer."""
    if encoded.skipped:
        return
    ids, spans = encoded.prompt.input_ids, encoded.prompt.spans
    for start, end in answers_of(encoded.prompt.loss_mask):
        if start == 0 or (encoded.cut and end == len(ids)):
            continue
        before = tuple(span for span in spans if span.start + span.length <= start)
        prompt = EncodedPrompt(ids[:start], [False] * start, before)
        yield ProcessedPrompt(prompt, tuple(encoded.media[: len(before)])), ids[start:end]


def answers_of(loss_mask: Sequence[bool]) -> list[tuple[int, int]]:
    """Return start and end of every run of supervised positions."""
    found = []
    for counts, places in groupby(range(len(loss_mask)), key=lambda at: loss_mask[at]):
        stretch = list(places)
        if counts:
            found.append((stretch[0], stretch[-1] + 1))
    return found


def write_exam(folder: Path, graded: Sequence[Graded]) -> None:
    """Write every answer as a line of `folder/exam.jsonl`."""
    lines = [json.dumps({**asdict(one), "equal": one.equal}, ensure_ascii=False) for one in graded]
    (folder / ANSWERS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def exam_record(step: int, graded: Sequence[Graded]) -> Record:
    """Return the metrics of an exam for the log."""
    equal = sum(one.equal for one in graded)
    share = equal / len(graded) if graded else 0.0
    return {"step": step, FIGURE: share, "equal": equal, "answers": len(graded)}
