"""Launch of a run: a recipe from its files to its results, in every process.

    checkpoint --load--> model --stages--> what is trained --> TrainedModel
    files ----> samples --order(step)--> encoded samples --collate, or pack--> TrainingBatch
    task -> what could not be saved is refused -> steps -> FOLDER/model, also on the way where
    small -> the exam, which asks what was saved -> model card

Knows every room of the trainer; must not know the loop's arithmetic or how results are stored.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from lapilli import __version__
from lapilli.checkpoint.load import Loaded
from lapilli.checkpoint.source import RESULTS
from lapilli.checkpoint.write.files import locked_folder
from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError
from lapilli.lora import adapters
from lapilli.modality.projector import Resampler
from lapilli.pipeline.stores import Stores
from lapilli.prompt.choose import Template
from lapilli.train.card import add_card, model_card
from lapilli.train.data import (
    Dataset,
    EncodedDataset,
    EncodedSample,
    SampleEncoder,
    encoded_dataset,
    open_dataset,
    order_of,
)
from lapilli.train.data.dataset import fingerprint_of
from lapilli.train.data.encoder import EncodesSamples, declared_names
from lapilli.train.data.sampler import Order
from lapilli.train.distill import (
    DistilledModel,
    PairEncoder,
    Teacher,
    load_teacher,
    with_teacher,
)
from lapilli.train.distributed import ParallelContext
from lapilli.train.recipe import Recipe
from lapilli.train.recipe.file import check_idle_keys
from lapilli.train.results import Results, exam_record, hold_exam, save_results, write_exam
from lapilli.train.stages import (
    choose_template,
    choose_trainable,
    for_model,
    load_start,
    set_up_layers,
)
from lapilli.train.trainer.loop import number_of_steps, train
from lapilli.train.trainer.metrics import RunLog
from lapilli.train.trainer.model import TrainedModel
from lapilli.train.trainer.state import gather, holds_state
from lapilli.train.trainer.task import (
    Loss,
    Plain,
    Task,
    TrainingBatch,
    collate,
    collate_packed,
    pack,
)


class LaunchedTask(Task, Protocol):
    """A task whose model is saved as a checkpoint.

    Attributes:
        recipe: that it was made by.
        parallel: the processes that run it.
        skipped: why samples could not be read.
    """

    recipe: Recipe
    parallel: ParallelContext
    skipped: list[str]

    @property
    def loaded(self) -> Loaded:
        """Return the checkpoint that it came from; its model is saved."""
        ...

    @property
    def held_out(self) -> Sized | None:
        """Return what evaluation reads; None: there is nothing."""
        ...

    @property
    def num_samples(self) -> int:
        """Return the samples of one epoch."""
        ...


Build = Callable[[Recipe, ParallelContext], LaunchedTask]


@dataclass
class TrainingTask:
    """A model and its data; see `lapilli.train.trainer.loop.Task`.

    Attributes:
        model: what learns, and how its loss is made.
        loaded: the checkpoint that it came from.
        held_out: what evaluation reads; None: there is nothing.
        weights: files of the models that it begins with, by the recipe's keys.
        skipped: why samples could not be read, as far as batches of them were learned from.
    """

    model: TrainedModel
    loaded: Loaded
    recipe: Recipe
    parallel: ParallelContext
    samples: EncodedDataset
    order: Order
    held_out: EncodedDataset | None
    template: Template
    weights: Mapping[str, Sequence[Path]]
    skipped: list[str] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Return the samples of one epoch."""
        return self.order.epoch_size

    def fingerprint(self) -> Mapping[str, Plain]:
        """Return what decides the batches and what rests; files are read for their digests."""
        counts = [len(source) for source in self.samples.dataset.sources]
        return fingerprint_of(self.recipe, self.template.name, counts, self.weights)

    def names(self, step: int, micro: int) -> list[str]:
        """Return place and id of the samples of a micro-batch."""
        return [self.samples.dataset.label(index) for index in self.order.indices(step, micro)]

    def batch(self, step: int, micro: int) -> tuple[TrainingBatch, int]:
        """Return the micro-batch and how many supervised tokens it has."""
        indices = self.order.indices(step, micro)
        made = self._collate([self.samples.sample(index) for index in indices])
        return made, made.num_valid

    def _collate(self, samples: list[EncodedSample]) -> TrainingBatch:
        data = self.recipe.data
        if not data.pack:
            return with_teacher(collate(samples), samples)
        bins = pack([len(sample.prompt) for sample in samples], data.max_length)
        packed = [[samples[i] for i in numbers] for numbers in bins]
        return with_teacher(collate_packed(packed), [sample for one in packed for sample in one])

    def loss(self, batch: TrainingBatch) -> Loss:
        """Return the summed loss."""
        self.skipped += batch.skipped  # here, as batches may be made in other processes
        found: Loss = self.model(batch)
        return found

    def evaluate(self) -> Mapping[str, float]:
        """Return the loss per supervised token of what is held out, the same in every process.

        In pieces all processes run equally many batches; one that has none left repeats its first
        for nothing. So does a sample that stands in for one that cannot be read: `eval_skipped`
        counts those, where there are any.
        """
        if self.held_out is None:
            return {}
        size, parallel = self.recipe.run.batch_size, self.parallel
        starts = range(0, len(self.held_out), size)
        sums = {"total": 0.0, "count": 0.0, "skipped": 0.0}
        for turn in range(-(-len(starts) // parallel.size)):
            at = turn * parallel.size + parallel.rank
            start = starts[at] if at < len(starts) else 0
            numbers = range(start, min(start + size, len(self.held_out)))
            samples = [self.held_out.sample(i) for i in numbers]
            batch = self._collate([_silent(one) if one.skipped else one for one in samples])
            total = float(self.model(batch).total)
            if at < len(starts):
                sums["total"] += total
                sums["count"] += batch.num_valid
                sums["skipped"] += sum(bool(one.skipped) for one in samples)
        sums = parallel.sum_floats(sums)
        found = {"eval_loss": sums["total"] / sums["count"]}
        return found | ({"eval_skipped": sums["skipped"]} if sums["skipped"] else {})


def _silent(sample: EncodedSample) -> EncodedSample:
    """Return the sample with nothing supervised."""
    prompt = replace(sample.prompt, loss_mask=[False] * len(sample.prompt))
    return replace(sample, prompt=prompt)


def build_task(recipe: Recipe, parallel: ParallelContext) -> TrainingTask:
    """Build the task of a recipe whose stage trains a whole model.

    Raises:
        ConfigError: the recipe names no checkpoint or no data, or parts do not go together.
        CheckpointError: the checkpoint cannot be read.
        DataError: the data cannot be read.
        UnknownKeyError: a key that nothing would read.
    """
    check_idle_keys(recipe)
    kept, held = _datasets(recipe)
    loaded = load_start(recipe)
    names = declared_names(loaded.model)
    kept, held = kept.declaring(names), None if held is None else held.declaring(names)
    if recipe.data.pack:
        check_packing(loaded, recipe.data.max_length)
    if parallel.is_sharded:
        check_sharding(loaded)
    teacher = load_teacher(recipe, loaded)
    template = choose_template(recipe, loaded)
    data = recipe.data
    encoder = _sample_encoder(loaded, template, recipe)
    pairs: EncodesSamples = encoder
    if teacher is not None:
        theirs = _sample_encoder(teacher, for_model(template, teacher), recipe, is_cut=False)
        pairs = PairEncoder(encoder, theirs)
    order = order_of(kept, recipe.data, recipe.run)
    torch.manual_seed(recipe.run.seed)  # a fresh adapter is drawn
    choose_trainable(loaded.model, recipe)
    set_up_layers(loaded.model, recipe.run)
    model = _learner(recipe, loaded, teacher)
    parallel.wrap(model, precision=recipe.run.precision)
    held_out = None
    if held is not None:
        held_out = EncodedDataset(held, encoder, on_bad_sample=data.on_bad_sample)
        if data.on_bad_sample == "error":
            # The first evaluation would else end a run after all of its steps, before they are
            # saved.
            for index in range(parallel.rank, len(held_out), parallel.size):
                held_out.sample(index)
    weights = {"model.checkpoint": loaded.weight_files}
    if teacher is not None:
        weights["distill.teacher"] = teacher.weight_files
    return TrainingTask(
        model=model,
        loaded=loaded,
        recipe=recipe,
        parallel=parallel,
        samples=encoded_dataset(kept, pairs, recipe.data),
        order=order,
        held_out=held_out,
        template=template,
        weights=weights,
    )


def check_sharding(loaded: Loaded) -> None:
    """Check that all processes call the layers of every modality equally often.

    Raises:
        ConfigError: a resampler takes items one by one, and a batch has another number of them in
            every process: each would wait for the others.
    """
    for name in declared_names(loaded.model):
        if any(isinstance(module, Resampler) for module in loaded.model.modalities[name].modules()):
            raise ConfigError(
                f'run.sharding = "fsdp" and the modality {name!r} has a resampler, which reads one '
                'item at a time: set run.sharding = "ddp", or another projector'
            )


def check_packing(loaded: Loaded, max_length: int) -> None:
    """Check that packed sequences give the loss of their samples.

    Raises:
        ConfigError: positions are scaled by the longest sample of a sequence, so they would not.
    """
    text = loaded.config.text
    scaling = text.rope_scaling if isinstance(text, DecoderConfig) else None
    if scaling is not None and scaling.kind == "dynamic" and max_length > text.max_positions:
        raise ConfigError(
            f"data.pack with rows of {max_length} positions: this model's positions grow with the "
            f"row beyond {text.max_positions}; set data.max_length to that, or data.pack = false"
        )


def _sample_encoder(
    loaded: Loaded, template: Template, recipe: Recipe, *, is_cut: bool = True
) -> SampleEncoder:
    stores = Stores(loaded.model)
    for name, folder in recipe.data.stores.items():
        stores[name] = folder
    return SampleEncoder(
        loaded.tokenizer,
        template,
        loaded.model,
        recipe.data.max_length if is_cut else None,
        image_id=loaded.config.tokens.image_id,
        alpha=recipe.data.alpha,
        stores=stores,
    )


def _learner(recipe: Recipe, loaded: Loaded, teacher: Loaded | None) -> TrainedModel:
    """Return what learns: from the data, and from the teacher where there is one."""
    kind: Callable[..., TrainedModel] = TrainedModel
    if recipe.distill is not None and teacher is not None:
        kind = partial(DistilledModel, teacher=Teacher(teacher.model), distill=recipe.distill)
    return kind(
        loaded.model,
        noise=recipe.noise,
        z_loss=recipe.optim.z_loss,
        compiles=recipe.run.compile,
    )


def _datasets(recipe: Recipe) -> tuple[Dataset, Dataset | None]:
    """Return what is learned from, and what evaluation reads."""
    data = recipe.data
    if not data.sources:
        raise ConfigError(
            "recipe key data.sources is empty: name a file of conversations, for instance "
            '--data.sources \'[{path = "train.json", images = "pictures"}]\''
        )
    dataset = open_dataset(data.sources, placement=data.placement)
    if data.evaluation:
        return dataset, open_dataset(data.evaluation, placement=data.placement)
    if data.held_out:
        return dataset.split(data.held_out, seed=recipe.run.seed)
    if recipe.run.keep_best:
        raise ConfigError(
            "run.keep_best compares evaluations, and nothing is held out: set data.held_out or "
            "data.evaluation"
        )
    return dataset, None


def launch(
    recipe: Recipe,
    folder: Path,
    *,
    parallel: ParallelContext,
    build: Build | None = None,
    echo: bool = False,
    progress: bool = False,
) -> LaunchedTask:
    """Run a recipe from where it stopped, and leave its results in `folder/model`.

    A projector or an adapter is saved with every checkpoint, a whole model at the end. With
    run.exam the main process then answers held-out questions, while the others wait.

    `echo` writes log lines to stderr, `progress` a progress bar. `build` makes the task; None: of
    conversations, `build_task`.

    Raises:
        ConfigError: something else lies where the results would, or another run writes there.
        LapilliError: see build_task, Results.of and train.
    """
    check_output_folder(folder, recipe)
    task = (build or build_task)(recipe, parallel)
    saver = _Saver(task, Results.of(task.loaded, recipe), folder / RESULTS)
    with locked(folder) if parallel.is_main_process else nullcontext():
        train(
            task,
            recipe,
            folder,
            parallel=parallel,
            echo=echo,
            progress=progress,
            on_save=saver.on_the_way,
        )
        saver.save(card=not recipe.run.exam)
        if recipe.run.exam:
            saver.examine(echo=echo)
    return task


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make this the only run that writes to `folder`, where the system can do that.

    The system lets go of the lock when the process ends, however it ends.

    Raises:
        ConfigError: another run writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"another run trains into {folder}: wait for it, or give another folder as --out"
    with locked_folder(folder, refusal):
        yield


def check_output_folder(folder: Path, recipe: Recipe) -> None:
    """Check that `folder` can be written, and that nobody needs `folder/model`, its results.

    Raises:
        ConfigError: it is on a disk that is read-only or somebody else's; no run that can go on
            left the results, or this run begins with them.
    """
    _check_writable(folder.absolute())
    results, model = folder / RESULTS, recipe.model
    teacher = None if recipe.distill is None else recipe.distill.teacher
    for given in (model.checkpoint, model.projector, model.adapter, teacher):
        if given is None:
            continue
        start = Path(given).expanduser()
        if results.resolve() in (start.resolve(), (start / RESULTS).resolve()):
            raise ConfigError(
                f"the results of this run would replace {results}, which it begins with: give "
                "another folder as --out"
            )
    if results.exists() and not holds_state(folder):
        raise ConfigError(
            f"the results of this run would replace {results}, and there is no state of a run "
            "beside it to go on from: give another folder as --out, or move it away"
        )


def _check_writable(folder: Path) -> None:
    """Check that files can be made in a folder, or in the nearest one that is there."""
    place = next(p for p in (folder, *folder.parents) if os.access(p, os.F_OK))
    if not place.is_dir():
        raise ConfigError(f"{place} is no folder: give another one as --out")
    if not os.access(place, os.W_OK):
        raise ConfigError(
            f"{place} cannot be written to (its file system is read-only, or it is somebody "
            "else's): give another folder as --out"
        )


@dataclass(frozen=True, slots=True)
class _Saver:
    task: LaunchedTask
    results: Results
    folder: Path

    def on_the_way(self, step: int) -> None:
        """Save with a checkpoint what is small enough."""
        del step
        model = self.task.loaded.model
        if self.results.recipe.stage == "align" or any(True for _ in adapters(model)):
            self.save()

    def save(self, *, card: bool = False) -> None:
        """Save the results as the model is now; every process has to call it.

        Args:
            card: with the model card, whose digest reads all of the data.
        """
        parallel, model = self.task.parallel, self.task.loaded.model
        state = gather(model.state_dict(), parallel) if parallel.is_sharded else None
        if parallel.is_main_process:
            extra = self._card() if card else None
            save_results(self.folder, model, self.results, state=state, extra=extra)
        parallel.wait()

    def examine(self, *, echo: bool = False) -> None:
        """Let the saved results answer held-out questions, log the metrics, add the card.

        Every process has to call it; the main process alone works, as it alone is sure to see the
        files.
        """
        task, parallel, folder = self.task, self.task.parallel, self.folder.parent
        number = self.results.recipe.run.exam
        if parallel.is_main_process and isinstance(task, TrainingTask) and task.held_out:
            graded = hold_exam(
                self.folder, task.held_out, number, template=task.template, device=parallel.device
            )
            write_exam(folder, graded)
            log = RunLog(folder, echo=echo)
            record = exam_record(number_of_steps(task, self.results.recipe.run), graded)
            if record not in log.records():  # the same command may be given again
                log.write(record)
            add_card(self.folder, self._card())
        parallel.wait()

    def _card(self) -> dict[str, str | bytes]:
        """Return the files of the model card, with what is known of the run beside its log."""
        task, parallel = self.task, self.task.parallel
        parameters = task.model.parameters()
        learned = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        held_out = "" if task.held_out is None else f", and {len(task.held_out):,} held out"
        facts = {
            "samples": f"{task.num_samples:,}{held_out}",
            "trainable parameters": f"{learned:,}",
            "made with": f"lapilli {__version__}, torch {torch.__version__}, "
            f"{parallel.size} x {parallel.device.type}",
        }
        return model_card(self.results, self.folder.parent, facts=facts)
