"""Cost of a training run on paper: operations, memory and time, without any tensor.

    recipe, sizes of the model, what the samples are like, a GPU  ->  Plan  ->  a table

Every number is a formula over sizes. What is assumed (how busy a GPU is, how fast links are, how
long samples are) stands in Gpu and Work.
"""

from dataclasses import astuple, dataclass, replace
from math import ceil
from typing import Final

from lapilli.config.model import (
    DecoderConfig,
    ModelConfig,
    ProjectorConfig,
    TextConfig,
    VisionConfig,
)
from lapilli.errors import ConfigError
from lapilli.geometry import ImageSize
from lapilli.modality.image.modes import mode_of, num_tokens
from lapilli.plan.flops import (
    SampleFlops,
    Sizes,
    num_adapter_parameters,
    sample_flops,
    sizes,
)
from lapilli.train.recipe import Recipe

GIB: Final = float(2**30)
_PACKED: Final = 0.5625  # bytes of a weight in 4 bits with its share of a scale
_TWICE_PACKED: Final = 0.515869140625  # with scales in 8 bits: 1/2 + 1/64 + 4/(64 x 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The size of a data set's samples; `lapilli data check` measures it.

    Attributes:
        samples: of an epoch.
        positions: of a sample in the mean, image positions included.
        tiles: of a sample in the mean, that the tower sees.
        supervised: of the positions, those that predict something.
        longest: positions of the longest sequence, which memory has to hold.
    """

    samples: int
    positions: float
    tiles: float
    supervised: float
    longest: int


MIX_665K: Final = Work(samples=665_298, positions=1100.0, tiles=1.0, supervised=220.0, longest=2048)
"""LLaVA 1.5's instruction data; its lengths are our assumption (docs/guide/cluster.md)."""
CAPTIONS_558K: Final = Work(
    samples=558_128, positions=610.0, tiles=1.0, supervised=32.0, longest=768
)
"""The captions of its first stage; the same."""


_IN_ONE_TILE: Final = 576  # positions of a picture in both
_PICTURE: Final = ImageSize(480, 640)  # most of COCO's, which are most of the pictures of both


def usual_work(recipe: Recipe, config: ModelConfig) -> Work:
    """Return what LLaVA 1.5 trained this stage on, its pictures in this model's positions.

    Sequences are no longer than the recipe's `data.max_length`. Where the model cuts pictures into
    tiles, each of them has 640 x 480 pixels.
    """
    is_align = recipe.stage == "align"
    work = CAPTIONS_558K if is_align else replace(MIX_665K, longest=recipe.data.max_length)
    image, vision = config.image, config.vision
    if image is not None and vision is not None:
        seen = num_tokens(_PICTURE, config)
        most = max(num_tokens(size, config) for size in (_PICTURE, *image.pinpoints))
        work = replace(
            work,
            positions=work.positions - _IN_ONE_TILE + seen,
            tiles=float(mode_of(image).num_tiles(_PICTURE, image, vision.image_size)),
            longest=work.longest - _IN_ONE_TILE + most if is_align else work.longest,
        )
    return replace(work, longest=min(work.longest, recipe.data.max_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """A device and what is assumed about it.

    Attributes:
        peak: bfloat16 operations a second without sparsity.
        memory: bytes.
        mfu: share of the peak that the model's operations reach, without recomputation.
        near: bytes a second to the GPUs of the same machine, as collective operations see it.
        far: the same to other machines, for each GPU.
    """

    name: str
    peak: float
    memory: float
    mfu: float
    near: float
    far: float


A100: Final = Gpu(name="A100-80G", peak=312e12, memory=80e9, mfu=0.35, near=200e9, far=20e9)
H100: Final = Gpu(name="H100-80G", peak=989e12, memory=80e9, mfu=0.35, near=300e9, far=40e9)
RTX4090: Final = Gpu(name="RTX4090-24G", peak=165e12, memory=24e9, mfu=0.35, near=10e9, far=3e9)
GPUS_OF_A_MACHINE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        weights: as they are kept: float32 where they learn.
        copies: bfloat16 copies of what learns, or the layers that are put together at a time.
        gradients: of what learns.
        moments: both of AdamW, and the average where there is one.
        activations: of one micro-batch of the longest sequences.
        logits: scores and their gradients, where something is predicted.
    """

    weights: float
    copies: float
    gradients: float
    moments: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Return their sum, without the allocator's waste (count on a tenth more)."""
        return float(sum(astuple(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The estimated cost of a run.

    Attributes:
        sharding: "ddp" or "fsdp".
        batch_size: samples of a micro-batch.
        turns: micro-batches of a step that one GPU computes.
        steps: optimizer steps.
        flops: of one mean sample.
        compute_s: of a step, arithmetic alone.
        exchange_s: of a step, weights and gradients over the links.
    """

    gpus: int
    gpu: Gpu
    sharding: str
    batch_size: int
    turns: int
    steps: int
    flops: SampleFlops
    memory: Memory
    compute_s: float
    exchange_s: float

    @property
    def fits(self) -> bool:
        """Return whether it goes into the memory, a tenth left free."""
        return self.memory.total < 0.9 * self.gpu.memory

    @property
    def step_s(self) -> float:
        """Return the seconds of a step.

        Pieces are exchanged while layers compute; whole gradients afterwards.
        """
        if self.sharding == "fsdp":
            return max(self.compute_s, self.exchange_s)
        return self.compute_s + self.exchange_s

    @property
    def hours(self) -> float:
        """Return the estimated hours of the whole run."""
        return self.steps * self.step_s / 3600

    def table(self) -> str:
        """Return the plan for people."""
        memory = self.memory
        parts = ("weights", "copies", "gradients", "moments", "activations", "logits")
        held = "".join(f"  {name:<22}{getattr(memory, name) / GIB:9.1f} GiB\n" for name in parts)
        fits = "fits" if self.fits else "does not fit"
        return (
            f"{self.gpus} x {self.gpu.name}, {self.sharding}, {self.turns} x {self.batch_size} "
            f"rows on each GPU, {self.steps:,} steps\n"
            f"  operations of a sample{self.flops.model / 1e12:9.1f} T"
            f" (computed: {self.flops.computed / 1e12:.1f} T)\n"
            f"{held}"
            f"  together              {memory.total / GIB:9.1f} GiB of "
            f"{self.gpu.memory / GIB:.1f}: {fits}\n"
            f"  arithmetic            {self.compute_s:9.2f} s a step, at {self.gpu.mfu:.0%} MFU\n"
            f"  exchange              {self.exchange_s:9.2f} s a step\n"
            f"  time                  {self.hours:9.1f} h, "
            f"{self.hours * self.gpus:,.0f} GPU hours\n"
        )


def plan(
    recipe: Recipe, config: ModelConfig, gpus: int, *, gpu: Gpu = A100, work: Work = MIX_665K
) -> Plan:
    """Estimate what the recipe costs on this many GPUs.

    Of the recipe its stage, run and lora count; every GPU has one process.

    Raises:
        ConfigError: a model without tower, or a step that does not divide over the GPUs.
    """
    if config.vision is None or config.projector is None:
        raise ConfigError("a plan needs a model with a tower and a projector: this one reads text")
    run = recipe.run
    if run.gradient_accumulation_steps % gpus:
        raise ConfigError(
            f"run.gradient_accumulation_steps is {run.gradient_accumulation_steps}, and {gpus} "
            f"GPUs share its micro-batches: set it to a multiple of {gpus}, and run.batch_size so "
            "that their product stays"
        )
    parts = config.text, config.vision, config.projector
    size = sizes(*parts)
    flops = flops_of(recipe, parts, work)
    rows = run.batch_size * run.gradient_accumulation_steps
    steps = run.steps or ceil(run.epochs * work.samples / rows)
    is_sharded = run.sharding == "fsdp" and gpus > 1
    turns = run.gradient_accumulation_steps // gpus
    speed = gpu.peak * gpu.mfu
    sent = _sent(recipe, config.text, size, gpus=gpus, turns=turns, is_sharded=is_sharded)
    link = gpu.near if gpus <= GPUS_OF_A_MACHINE else gpu.far
    return Plan(
        gpus=gpus,
        gpu=gpu,
        sharding="fsdp" if is_sharded else "ddp",
        batch_size=run.batch_size,
        turns=turns,
        steps=steps,
        flops=flops,
        memory=_memory(recipe, parts, work, gpus=gpus, is_sharded=is_sharded),
        compute_s=turns * run.batch_size * flops.model / speed,
        exchange_s=sent / link,
    )


Parts = tuple[TextConfig, VisionConfig, ProjectorConfig]


def flops_of(recipe: Recipe, parts: Parts, work: Work) -> SampleFlops:
    """Return the operations of a mean sample in the recipe's stage."""
    is_full = recipe.stage == "instruct" and recipe.lora is None
    has_adapter = recipe.stage == "instruct" and recipe.lora is not None
    return sample_flops(
        parts,
        positions=work.positions,
        tiles=work.tiles,
        supervised=work.supervised,
        trains_layers=is_full,
        trains_tower=recipe.model.tune_tower,
        lora_rank=recipe.lora.rank if has_adapter and recipe.lora else 0,
        recomputes=recipe.run.gradient_checkpointing,
    )


def num_trainable(recipe: Recipe, text: TextConfig, size: Sizes) -> int:
    """Return the number of trainable parameters."""
    trained = size.projector + (size.tower if recipe.model.tune_tower else 0)
    if recipe.stage == "instruct":
        lora = recipe.lora
        trained += num_adapter_parameters(text, lora.rank) if lora else size.language_model
    return trained


def _num_frozen(recipe: Recipe, size: Sizes) -> int:
    rests_tower = 0 if recipe.model.tune_tower else size.tower
    is_full = recipe.stage == "instruct" and recipe.lora is None
    return rests_tower + (0 if is_full else size.language_model)


def _memory(recipe: Recipe, parts: Parts, work: Work, *, gpus: int, is_sharded: bool) -> Memory:
    text, run = parts[0], recipe.run
    size = sizes(*parts)
    trained, frozen = num_trainable(recipe, text, size), _num_frozen(recipe, size)
    cut = gpus if is_sharded else 1
    is_half = run.precision == "bfloat16"
    # Frozen weights that will be saved stay as they are (train/stages.py).
    frozen_bytes = 2 if is_half and not recipe.saves_frozen else 4
    packed = size.layers if recipe.lora is not None and recipe.lora.base != "float" else 0
    packed_bytes = _TWICE_PACKED if recipe.lora and recipe.lora.double_quant else _PACKED
    width = 2 if is_half else 4
    together = 2 * (size.layers // text.num_layers) + size.embedding + size.head + size.projector
    if is_sharded:
        copies = float(width * together)
    else:
        copies = 2.0 * (trained - (size.embedding if not recipe.lora else 0)) if is_half else 0.0
    if packed:  # one matrix is made floats at a time
        copies += width * max(a * b for a, b in text.linear_widths)
    moments = (8 if recipe.optim.name == "adamw" else 0) + (4 if recipe.optim.ema else 0)
    share = work.supervised / work.positions
    return Memory(
        # FSDP cuts parameters, not weights in 4 bits, which are buffers.
        weights=(4 * trained + frozen_bytes * (frozen - packed)) / cut + packed_bytes * packed,
        copies=max(copies, 0.0),
        gradients=4.0 * trained / cut,
        moments=moments * trained / cut,
        activations=run.batch_size * work.longest * activation_bytes(recipe, text),
        logits=run.batch_size * work.longest * share * text.vocab_size * (width + 8),
    )


def layer_bytes(text: TextConfig, *, is_half: bool) -> float:
    """Return the bytes that a decoder layer keeps of a position for its backward pass.

    Note:
        Counted in our own layer by what autograd saves (tests/plan/test_plan.py); MPT's layers,
        which are not measured, count as if they were Llama's with the same widths.
    """
    width = text.hidden_size
    gated = isinstance(text, DecoderConfig)
    inner = text.intermediate_size
    groups = text.num_kv_heads * text.head_dim
    saved_inner = (4 if gated else 2) * inner
    if is_half:
        return 26.0 * width + 4 * groups + 2 * saved_inner + 4 * text.num_heads + 8
    return 32.0 * width + 8 * groups + 4 * saved_inner + 4 * text.num_heads + 8


def activation_bytes(recipe: Recipe, text: TextConfig) -> float:
    """Return the bytes of a position that wait for the backward pass, in all layers."""
    is_half = recipe.run.precision == "bfloat16"
    width = 2 if is_half else 4
    layer = layer_bytes(text, is_half=is_half)
    if recipe.lora is not None:  # the masks of its dropout, and what is between A and B
        mask, between = int(recipe.lora.dropout > 0), width * recipe.lora.rank
        layer += sum(mask * a + between for a, _ in text.linear_widths)
    if recipe.run.gradient_checkpointing:
        return text.num_layers * width * text.hidden_size + layer
    return text.num_layers * layer


def _sent(
    recipe: Recipe, text: TextConfig, size: Sizes, *, gpus: int, turns: int, is_sharded: bool
) -> float:
    """Return the bytes that a GPU sends in a step."""
    if gpus == 1:
        return 0.0
    others = (gpus - 1) / gpus
    trained = num_trainable(recipe, text, size)
    if not is_sharded:
        return 2 * others * 4.0 * trained  # a ring: every piece around, twice
    width = 2 if recipe.run.precision == "bfloat16" else 4
    gathered = 2 * width * size.language_model  # forward and backward
    gathered += (2 if recipe.model.tune_tower else 1) * width * size.tower
    return others * turns * (gathered + 4 * trained)
