"""Recipe: what a training run does, as frozen values; no torch. file.py reads it from TOML."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from types import MappingProxyType
from typing import Any, Final, Literal

from lapilli.errors import ConfigError

Stage = Literal["align", "instruct"]
Schedule = Literal["cosine", "linear", "constant", "trapezoid"]
Reduction = Literal["tokens", "llava"]
Precision = Literal["float32", "bfloat16"]
Layout = Literal["llava", "huggingface"]
Placement = Literal["front", "written"]
OnBadSample = Literal["error", "skip"]
Sharding = Literal["ddp", "fsdp"]
Logger = Literal["tensorboard", "wandb"]


OBJECTIVES: Final = ("ranking", "next_item", "next_event")
"""Sections of a recipe that say what is learned from other rows than conversations."""

MAX_ITEMS: Final = 50
"""Items of a history that a language model reads, where nothing else is said."""
TEMPERATURE: Final = 0.05
"""Divisor of cosines, likewise."""

_RANGES: Final[Mapping[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "at least 1": lambda value: value >= 1,
        "0 or more": lambda value: 0 <= value < inf,
        "above 0": lambda value: 0 < value < inf,
        "a number above 0": lambda value: 0 < value < inf,
        "above 0 (inf switches clipping off)": lambda value: value > 0,
        "0 to 1": lambda value: 0 <= value <= 1,
        "at least 0 and below 1": lambda value: 0 <= value < 1,
        "two numbers of at least 0 and below 1": lambda pair: all(0 <= one < 1 for one in pair),
    }
)
"""What is expected of a value, as messages say it; nan is in none of the ranges."""


def _expect(section: str, recipe: object, what: str, *names: str) -> None:
    """Refuse values of these names that are given and out of their range."""
    for name in names:
        value = getattr(recipe, name)
        if value is not None and not _RANGES[what](value):
            raise ConfigError(f"{section}.{name} is {value}: expected {what}")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimRecipe:
    """The optimizer and its schedule.

    Attributes:
        name: "adamw", or "sgd" without momentum.
        lr: learning rate at the end of the warm-up.
        projector_lr: another one for the projector; None takes `lr`.
        tower_lr: another one for the vision tower; None takes `lr`.
        warmup_steps: steps of linear growth from 0.
        warmup_ratio: the same as a part of all steps, rounded up; it counts when warmup_steps is 0.
        decay: "original": weight decay for everything but norms and biases; "matrices": for
            parameters of two axes and more alone.
        decay_share: part of all steps that a `trapezoid` spends on its way down.
        min_lr_ratio: part of `lr` that is left at the end.
        max_grad_norm: largest norm of all gradients together, above 0; inf: they stay as they are.
        z_loss: weight of the squared log of the softmax's denominator; 0: none.
        ema: share of the old average that a step keeps; 0: no average.
    """

    lr: float
    name: Literal["adamw", "sgd"] = "adamw"
    projector_lr: float | None = None
    tower_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay: Literal["original", "matrices"] = "original"
    schedule: Schedule = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    decay_share: float = 0.3
    min_lr_ratio: float = 0.0
    max_grad_norm: float = 1.0
    z_loss: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        _expect("optim", self, "a number above 0", "lr", "eps")
        rest = ("projector_lr", "tower_lr", "weight_decay", "warmup_steps", "z_loss")
        _expect("optim", self, "0 or more", *rest)
        _expect("optim", self, "0 to 1", "decay_share", "warmup_ratio", "min_lr_ratio")
        _expect("optim", self, "at least 0 and below 1", "ema")
        _expect("optim", self, "two numbers of at least 0 and below 1", "betas")
        _expect("optim", self, "above 0 (inf switches clipping off)", "max_grad_norm")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecipe:
    """The course of a run: how long, how much at once, how often something is written.

    Attributes:
        steps: optimizer steps; 0: as many as `epochs` take.
        epochs: passes over the data, where `steps` is 0.
        batch_size: samples of a micro-batch.
        gradient_accumulation_steps: micro-batches of a step, in all processes together.
        precision: of the forward and backward pass; weights and moments stay as they are.
        reduction: "tokens": every supervised token of a step weighs the same; "llava": the mean of
            the micro-batches' means, as in the original.
        evaluate_every: steps between evaluations; 0: at the end alone. Nothing is evaluated
            where nothing is held out.
        keep_best: keep the weights with the lowest evaluation loss.
        gradient_checkpointing: forget the activations of the layers and compute them again.
        compile: torch.compile the layers.
        sharding: what several processes share: "ddp" nothing, "fsdp" weights and moments.
        workers: processes that read samples ahead; 0: read in the training process.
        loggers: programs that the log goes to as well.
        plot: draw the loss over the steps at the end.
        exam: samples of what is held out whose answers the finished model gives itself, greedily;
            `exact_match` is the share of answers that are equal to theirs. 0: no exam.
    """

    batch_size: int
    steps: int = 0
    epochs: float = 1.0
    gradient_accumulation_steps: int = 1
    precision: Precision = "float32"
    reduction: Reduction = "tokens"
    seed: int = 0
    threads: int | None = None
    log_every: int = 10
    save_every: int = 200
    evaluate_every: int = 0
    keep_best: bool = False
    gradient_checkpointing: bool = False
    compile: bool = False
    sharding: Sharding = "ddp"
    workers: int = 0
    loggers: tuple[Logger, ...] = ()
    plot: bool = True
    exam: int = 0

    def __post_init__(self) -> None:
        counts = ("batch_size", "gradient_accumulation_steps", "log_every", "save_every", "threads")
        _expect("run", self, "at least 1", *counts)
        _expect("run", self, "0 or more", "seed", "evaluate_every", "workers", "exam")
        if self.steps < 0 or not 0 < self.epochs < inf:
            raise ConfigError(
                f"run.steps is {self.steps} and run.epochs {self.epochs}: expected 0 or more steps "
                "and more than no epoch"
            )
        if self.keep_best and not self.evaluate_every:
            raise ConfigError(
                "run.keep_best compares evaluations, and run.evaluate_every is 0: set it to a "
                "number of steps"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerRecipe:
    """The part of a recipe that the loop reads; a program's own task adds keys to it.

    Attributes:
        stage: name of the run in the progress bar.
        optim: the optimizer and its schedule.
        run: how long, how much at once, how often something is written.
    """

    stage: str
    optim: OptimRecipe
    run: RunRecipe


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """The model that is trained.

    Attributes:
        checkpoint: a model that `lapilli build` made, or any LLaVA checkpoint.
        projector: a projector of an earlier run that is loaded over it (its output folder).
        adapter: a LoRA that is trained on.
        tune_tower: train the vision tower too (with `optim.tower_lr`).
        tune_encoder: modalities of `lapilli_modalities` whose encoder learns too; what stands
            between it and the language model always does.
        modalities: by name what `lapilli_modalities` of a config.json would say; one that the
            checkpoint does not have begins with fresh weights.
        freeze: beginnings of names of parameters that stay frozen all the same, such as
            "language_model.model.".
    """

    checkpoint: str | None = None
    projector: str | None = None
    adapter: str | None = None
    tune_tower: bool = False
    tune_encoder: tuple[str, ...] = ()
    modalities: Mapping[str, Any] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceRecipe:
    """One collection of samples.

    Attributes:
        path: a JSON, JSONL, CSV or Parquet file, or tar shards ("shards/{000..012}.tar", a glob).
        images: the folder that its image paths are relative to; None: the file's own.
        weight: how often its samples are drawn beside those of other sources; all 1: each
            sample of all sources once in an epoch.
    """

    path: str
    images: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRecipe:
    """The samples, and how they become sequences.

    Attributes:
        sources: where samples come from.
        held_out: part of every source that is kept for evaluation, below 1; at least one sample.
        evaluation: sources of their own for evaluation, instead of `held_out`.
        template: name of the chat template; "": what the checkpoint says ("plain" for align).
        max_length: positions of a sequence; longer samples are cut on the right.
        group: "modality": batches of similar length and of one kind; "length"; "none".
        pack: several samples in one sequence of max_length, none seeing another.
        placement: "front" moves the pictures of a turn before its text, as the original does with
            one; "written" leaves them where they stand.
        alpha: "drop" shows the colours under the transparency of a picture, as the original does;
            "composite" lays the picture on white.
        stores: folders of stores by the names of modalities, whose ids stand for media in samples.
        on_bad_sample: what a sample that cannot be read does to the run: "skip" puts the next one
            into its place and counts.
    """

    sources: tuple[SourceRecipe, ...] = ()
    held_out: float = 0.0
    evaluation: tuple[SourceRecipe, ...] = ()
    template: str = ""
    max_length: int = 2048
    group: Literal["none", "length", "modality"] = "none"
    pack: bool = False
    placement: Placement = "front"
    alpha: Literal["drop", "composite"] = "drop"
    stores: Mapping[str, str] = field(default_factory=dict)
    on_bad_sample: OnBadSample = "error"

    def __post_init__(self) -> None:
        _expect("data", self, "at least 0 and below 1", "held_out")
        _expect("data", self, "at least 1", "max_length")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRecipe:
    """Adapters instead of whole weights.

    Attributes:
        rank: of the two small matrices.
        alpha: scale is alpha / rank.
        targets: patterns of module paths; empty: all linear layers of the language model but
            the head, as the original.
        base: how the frozen base is held: "float", or packed in 4 bits ("int4", "nf4").
        double_quant: the scales of "nf4" in 8 bits, which saves 0.37 bits a weight.
    """

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    targets: tuple[str, ...] = ()
    base: Literal["float", "int4", "nf4"] = "float"
    double_quant: bool = False

    def __post_init__(self) -> None:
        _expect("lora", self, "at least 1", "rank")
        _expect("lora", self, "a number above 0", "alpha")
        _expect("lora", self, "at least 0 and below 1", "dropout")
        if self.double_quant and self.base != "nf4":
            raise ConfigError(
                f"lora.double_quant rounds the scales of nf4, and lora.base is {self.base!r}: set "
                'lora.base = "nf4"'
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseRecipe:
    """NEFTune: uniform noise while training, never in evaluation.

    Attributes:
        alpha: size; 0: none.
        on: "image": the projected features of every picture; "all": every embedding.

    Source: Jain et al. 2023 (all); TinyChat's training (image).
    """

    alpha: float = 0.0
    on: Literal["image", "all"] = "all"

    def __post_init__(self) -> None:
        _expect("noise", self, "0 or more", "alpha")


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillRecipe:
    """A teacher whose answers are imitated.

    Attributes:
        teacher: a checkpoint with the same vocabulary.
        temperature: of both distributions.
        weight: of the teacher's distribution; the rest is the data's own loss.
        hidden_weight: of the distance between last hidden states (through a fresh linear map
            where the widths differ); 0: none.
    """

    teacher: str
    temperature: float = 1.0
    weight: float = 0.5
    hidden_weight: float = 0.0

    def __post_init__(self) -> None:
        _expect("distill", self, "above 0", "temperature")
        _expect("distill", self, "0 to 1", "weight")
        _expect("distill", self, "0 or more", "hidden_weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Weights of the parts of a ranker's loss from one step on, see `lapilli.rank.mixlm`.

    Attributes:
        start: share of the steps that are done when it begins, 0 to 1.
        distill: of KL(teacher || p).
        align: of KL(p~ || p) and of the distance between hidden states.
        hidden: of 1 - cos(h, h~), beside KL(p~ || p).
        text: of KL(label || p~), which keeps what is read of texts where vectors are learned.

    Raises:
        ConfigError: a weight below 0, or a start that no step of a run has.
    """

    start: float = 0.0
    distill: float = 1.0
    align: float = 1.0
    hidden: float = 1.0
    text: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1:
            raise ConfigError(f"a phase starts at {self.start}: expected a share of the steps")
        for name in ("distill", "align", "hidden", "text"):
            value = getattr(self, name)
            if not 0 <= value < inf:
                raise ConfigError(f"the weight {name} of a phase is {value}: expected 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingRecipe:
    """An objective: a ranker learns from rows with `query`, `item` and `label`, see MixLM.

    Attributes:
        reads: "text": items as texts; "mixed": as vectors of the modality `encoder`.
        encoder: name of the modality that makes vectors of a text.
        teacher: a text ranker, a checkpoint, that is asked before the run; None: rows have what it
            said as `teacher`.
        curriculum: phases of the mixed stage; empty: those of `lapilli.rank.mixlm`.
    """

    reads: Literal["text", "mixed"] = "text"
    encoder: str = "item"
    teacher: str | None = None
    curriculum: tuple[Phase, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NextItemRecipe:
    """An objective: the next item of a history among those of a catalogue, see HLLM.

    Attributes:
        catalogue: a file with ids and texts of the items; rows have a `history` of ids.
        modality: name of the one that makes vectors of items.
        negatives: items that are drawn for every micro-batch, beside those of its histories.
        max_items: that the language model reads of a history; longer ones are learned in pieces.
        temperature: that cosines are divided by.
    """

    catalogue: str
    modality: str = "item"
    negatives: int = 0
    max_items: int = MAX_ITEMS
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        _expect("next_item", self, "0 or more", "negatives")
        _expect("next_item", self, "at least 1", "max_items")
        _expect("next_item", self, "a number above 0", "temperature")


@dataclass(frozen=True, slots=True, kw_only=True)
class NextEventRecipe:
    """An objective: an encoder of events predicts the next one; rows have a `history` of events.

    Attributes:
        modality: name of the one of kind `events` whose encoder learns.
    """

    modality: str = "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveRecipe:
    """The form of the results.

    Attributes:
        layout: "llava": the original's; "huggingface": LlavaForConditionalGeneration.
        merge: fold a LoRA into the weights instead of saving it beside them.
        dtype: of the stored weights; None: as the checkpoint's.
    """

    layout: Layout = "llava"
    merge: bool = False
    dtype: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(TrainerRecipe):
    """One run of `lapilli train`: a whole model that learns from files of samples.

    The samples are conversations, or with one of the objectives its rows. `stage` says what learns
    in either case.
    """

    stage: Stage
    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    lora: LoraRecipe | None = None
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    distill: DistillRecipe | None = None
    ranking: RankingRecipe | None = None
    next_item: NextItemRecipe | None = None
    next_event: NextEventRecipe | None = None
    save: SaveRecipe = field(default_factory=SaveRecipe)

    def __post_init__(self) -> None:
        given = [name for name in OBJECTIVES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(
                f"a run has one objective, and the recipe has [{'] and ['.join(given)}]: leave all "
                "but one out"
            )
        if self.stage == "align" and self.lora is not None:
            raise ConfigError(
                "[lora] lies beside the language model, and stage 'align' trains the projector "
                'alone: leave [lora] out, or set stage = "instruct"'
            )
        if self.optim.tower_lr is not None and not self.model.tune_tower:
            raise ConfigError(
                "optim.tower_lr is set, and the tower does not learn: set model.tune_tower = true, "
                "or leave optim.tower_lr out"
            )

    @property
    def objective(self) -> str | None:
        """Return the name of its objective's section; None: it learns from conversations."""
        return next((name for name in OBJECTIVES if getattr(self, name) is not None), None)

    @property
    def saves_frozen(self) -> bool:
        """Return whether weights that it does not train are part of its result."""
        if self.lora is not None:
            return self.save.merge
        return self.stage == "instruct" or self.save.layout == "huggingface"
