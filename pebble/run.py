"""pebble's four stages over one work folder, each in several processes.

    work/tokenizer.model, scenes/, crowds/                       prepare.py
    work/1_tower .. 4_instruct/    state.pt, log.jsonl           train/trainer/loop.py
    work/features.npy              float16 [n, P, E]             the finished tower over scenes/

Everything that is finished is left as it is, so the whole run resumes where it stopped. Where the
recipes name a checkpoint, the tower and the last stage go on from an earlier pebble, with its
tokenizer, and the two stages between them are left out. Without a recipe for the tower, the earlier
one is kept; with other sizes in `model.text`, language model and projector grow to them (grow.py).
"""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
from torch import nn

from lapilli.checkpoint.read.plan import Plan, make_plan
from lapilli.config.model import DecoderConfig, ProjectorConfig, VisionConfig
from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.modality.image.image import ImageModality, VisionTransformer
from lapilli.modality.projector import build_projector
from lapilli.model import VisionLanguageModel
from lapilli.pipeline import load
from lapilli.prompt.tokenizer import TokenizerFiles
from lapilli.prompt.tokenizer.sentencepiece import SentencePieceTokenizer
from lapilli.train.distributed import RankInfo, joined
from lapilli.train.recipe.file import build_section
from lapilli.train.trainer.loop import Task, train
from lapilli.train.trainer.step import PlainAttention
from pebble.fit import start_language_model, start_projector, word_vectors
from pebble.grow import SPREAD, Sizes, grow_language_model, grow_projector
from pebble.initialise import initialise
from pebble.pool import PoolSpec
from pebble.prepare import prepare_pool, prepare_tokenizer
from pebble.reader import FeatureReader, freeze
from pebble.recipe import PebbleRecipe, load_recipe
from pebble.regions import LEXICON
from pebble.talk import (
    TalkTask,
    stored_features,
    word_features,
)
from pebble.tower import (
    Joined,
    TowerTask,
    TowerTrainer,
    fit_naming_head,
    normalise,
)

Part = TypeVar("Part")
RECIPES: Final = Path(__file__).parent / "recipes"
STAGES: Final = ("1_tower", "2_language", "3_align", "4_instruct")
_FEATURE_BATCH: Final = 64
_FIRST_CROWD: Final = 100_000_000
_FITTED_TO: Final = 3072  # pictures that a naming head is fitted to


class Workshop:
    """The recipes and the work folder of one pebble."""

    def __init__(self, recipes: Path, work: Path) -> None:
        self._recipes = recipes
        self.work = work
        self.start = load_recipe(recipes / f"{STAGES[-1]}.toml").model.checkpoint
        self.stages = STAGES
        if self.start is not None:
            first = STAGES[:1] if (recipes / f"{STAGES[0]}.toml").exists() else ()
            self.stages = (*first, STAGES[-1])
        self.recipes: Mapping[str, PebbleRecipe] = {
            name: load_recipe(recipes / f"{name}.toml") for name in self.stages
        }

    @cached_property
    def _plan(self) -> Plan | None:
        """The earlier pebble, or None where the run begins from nothing."""
        return None if self.start is None else make_plan(self.start, fetch=False)

    @cached_property
    def _earlier(self) -> VisionLanguageModel:
        """The weights of the earlier pebble, float32."""
        if self.start is None:
            raise ConfigError("model.checkpoint is missing in the recipe of the first stage")
        return load(self.start, device="cpu", dtype="float32").model

    @property
    def vision(self) -> VisionConfig:
        """The tower as LLaVA uses it: patches of the hidden state before the last."""
        if self._plan is not None:
            return _part(self._plan.config.vision, VisionConfig)
        return build_section(VisionConfig, self.recipes["1_tower"].model.vision, "model.vision")

    @property
    def text(self) -> DecoderConfig:
        """The language model."""
        if self._plan is not None:
            earlier = _part(self._plan.config.text, DecoderConfig)
            sizes = self.recipes["4_instruct"].model.text
            if not sizes:
                return earlier
            return replace(earlier, **asdict(build_section(Sizes, sizes, "model.text")))
        return build_section(DecoderConfig, self.recipes["2_language"].model.text, "model.text")

    @property
    def projector(self) -> ProjectorConfig:
        """mlp2x_gelu."""
        return ProjectorConfig(
            kind="mlp",
            depth=2,
            vision_size=self.vision.hidden_size,
            hidden_size=self.text.hidden_size,
        )

    def tokenizer(self) -> SentencePieceTokenizer:
        """Return the trained tokenizer."""
        return SentencePieceTokenizer(
            TokenizerFiles(model=(self.work / "tokenizer.model").read_bytes())
        )

    def prepare(self, processes: int) -> None:
        """Tokenizer and pool, as far as they are missing."""
        if self._plan is None:
            prepare_tokenizer(self.work / "tokenizer.model")
        else:
            self.work.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._plan.path / "tokenizer.model", self.work / "tokenizer.model")
        data, side = self.recipes[self.stages[0]].data, self.vision.image_size
        scenes = PoolSpec(first_seed=0, num_scenes=data.num_pictures, side=side)
        pools = {"scenes": scenes}
        if "1_tower" in self.stages:
            pools["crowds"] = PoolSpec(
                first_seed=_FIRST_CROWD, num_scenes=data.num_crowds, side=side, crowds=True
            )
        for name, spec in pools.items():
            prepare_pool(
                self.work / name,
                spec,
                self.vision.grid.rows,
                tokenizer=self.work / "tokenizer.model",
                workers=processes,
            )

    def is_finished(self, stage: str) -> bool:
        """Whether the stage reached its last step."""
        path = self.work / stage / "state.pt"
        return path.exists() and self.state(stage)["step"] >= self.recipes[stage].run.steps

    def state(self, stage: str) -> dict[str, Any]:
        """Return the checkpoint of a stage.

        Raises:
            ConfigError: the stage has not been run.
        """
        path = self.work / stage / "state.pt"
        if not path.exists():
            raise ConfigError(f"{path} is missing: run stage {stage} first")
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return state

    def tower(self) -> VisionTransformer:
        """Return the trained tower, the earlier pebble's where no stage trains it."""
        tower = VisionTransformer(self.vision)
        if "1_tower" not in self.stages:
            image = cast(ImageModality, self._earlier.modality("image"))
            tower.load_state_dict(image.vision_tower.state_dict())
            return tower.eval()
        _load(tower, self.state("1_tower")["model"], "vision_tower.")
        return tower.eval()

    def reader(self, stage: str) -> FeatureReader:
        """Projector and language model as they stand before (or, with a checkpoint, in) a stage."""
        seed = self.recipes[stage].run.seed
        if self.start is not None:
            return self._earlier_reader(seed)
        language_model = Decoder(self.text)
        if stage == "2_language":
            start_language_model(language_model, seed)
            words = nn.Linear(len(LEXICON), self.text.hidden_size, bias=False)
            embedding = language_model.model.embed_tokens.weight
            with torch.no_grad():
                words.weight.copy_(word_vectors(embedding, self.tokenizer(), seed))
            return FeatureReader(language_model, words)
        language = self.state("2_language")["model"]
        _load(language_model, language, "language_model.")
        projector = cast(nn.Sequential, build_projector(self.projector))
        initialise(projector, seed, depth=1)
        if stage == "3_align":
            head = nn.Linear(self.vision.hidden_size, len(LEXICON))
            _load(head, self.state("1_tower")["model"], "region_head.")
            start_projector(projector, head, language["projector.weight"])
        else:
            _load(projector, self.state("3_align")["model"], "projector.")
        return FeatureReader(language_model, projector)

    def _earlier_reader(self, seed: int) -> FeatureReader:
        """Projector and language model of the earlier pebble, grown where the recipe says so."""
        small = cast(Decoder, self._earlier.language_model)
        seen = cast(ImageModality, self._earlier.modality("image")).projector
        projector = cast(nn.Sequential, build_projector(self.projector))
        grow_projector(cast(nn.Sequential, seen), projector, seed, spread=SPREAD)
        grown = grow_language_model(small, self.text, seed, spread=SPREAD)
        return FeatureReader(grown, projector)

    def finished_reader(self) -> FeatureReader:
        """Projector and language model at the end of everything."""
        reader = self.reader("4_instruct")
        _load(reader, self.state("4_instruct")["model"], "")
        return reader.eval()

    def compute_features(self) -> None:
        """Return what the finished tower makes of every picture of the pool."""
        path = self.work / "features.npy"
        if path.exists():
            return
        number = self.recipes["4_instruct"].data.num_pictures
        pixels = np.load(self.work / "scenes" / "pool" / "pixels.npy", mmap_mode="r")[:number]
        shape = (len(pixels), self.vision.num_patches, self.vision.hidden_size)
        staged = path.with_suffix(".part")
        stored = np.lib.format.open_memmap(staged, mode="w+", dtype=np.float16, shape=shape)
        tower = self.tower()
        with torch.no_grad(), PlainAttention(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(pixels), _FEATURE_BATCH):
                batch = torch.from_numpy(pixels[start : start + _FEATURE_BATCH].copy())
                stored[start : start + len(batch)] = tower(normalise(batch)).float().numpy()
        stored.flush()
        staged.replace(path)

    def task(self, stage: str) -> Task:
        """Return what a stage trains on what."""
        recipe = self.recipes[stage]
        if stage == "1_tower":
            return self._tower_task(recipe)
        reader = self.reader(stage)
        freeze(reader, recipe.stage)
        if stage == "2_language":
            features = word_features(np.load(self.work / "scenes" / "regions.npy"))
        else:
            features = stored_features(np.load(self.work / "features.npy", mmap_mode="r"))
        return TalkTask(
            reader,
            recipe,
            self.tokenizer(),
            features,
            num_pictures=recipe.data.num_pictures,
        )

    def _tower_task(self, recipe: PebbleRecipe) -> TowerTask:
        config = replace(self.vision, feature_select="cls_patch")
        pools = [self.work / "crowds", self.work / "scenes"]
        trainer = TowerTrainer(config, self.text.vocab_size, recipe.run.seed)
        pixels = Joined(*(np.load(p / "pool" / "pixels.npy", mmap_mode="r") for p in pools))
        words = np.concatenate([np.load(pool / "regions.npy") for pool in pools])
        if self.start is not None:
            image = cast(ImageModality, self._earlier.modality("image"))
            trainer.vision_tower.load_state_dict(image.vision_tower.state_dict())
            at = np.arange(len(pixels) - _FITTED_TO, len(pixels))
            if not (self.work / STAGES[0] / "state.pt").exists():  # it holds the head too
                fit_naming_head(trainer, torch.from_numpy(pixels[at]), words[at])
        return TowerTask(
            trainer,
            pixels=pixels,
            words=words,
            captions=np.concatenate([np.load(pool / "captions.npy") for pool in pools]),
            run=recipe.run,
            fresh=self.start is None,
        )

    def train(self, stage: str, *, rank: int, size: int) -> None:
        """Run a stage in this process, one of `size`; all of them start from the lead's weights.

        The first weights come from eigenvectors and orthogonal matrices, whose bits, and signs,
        hang on the number of threads: a run that is killed before its first checkpoint would
        otherwise begin elsewhere when the machine gives it another number.
        """
        recipe = self.recipes[stage]
        if recipe.run.threads is not None:
            torch.set_num_threads(recipe.run.threads)
        place = RankInfo(rank, size, meeting=f"file://{(self.work / 'meeting').resolve()}")
        with joined(place, device="cpu") as parallel:
            task = self.task(stage)
            parallel.wrap(task.model)
            train(task, recipe, self.work / stage, parallel=parallel, echo=parallel.is_main_process)

    def train_together(self, stage: str, processes: int) -> None:
        """Run a stage in several processes, no more than its steps have micro-batches, and wait.

        Raises:
            ConfigError: a process failed; its own message stands on stderr.
        """
        (self.work / "meeting").unlink(missing_ok=True)
        processes = min(processes, self.recipes[stage].run.gradient_accumulation_steps)
        command = [sys.executable, "-m", "pebble", "--recipes", str(self._recipes)]
        command += ["--work", str(self.work), "--stage", stage, "--processes", str(processes)]
        children = [
            subprocess.Popen([*command, "--rank", str(rank)])  # noqa: S603  our own module
            for rank in range(processes)
        ]
        codes = [child.wait() for child in children]
        if any(codes):
            raise ConfigError(f"stage {stage} ended with exit codes {codes}: see above")


def _part(found: object, kind: type[Part]) -> Part:
    """Return the part of an earlier pebble, which must be of pebble's own kind."""
    if not isinstance(found, kind):
        raise ConfigError(f"model.checkpoint has {found}: expected a pebble, with {kind.__name__}")
    return found


def _load(module: nn.Module, tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Load the tensors under a prefix into a module; every parameter must be there."""
    own = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    module.load_state_dict(own, strict=True)
