"""Objectives of `lapilli train` beside conversations: a section of the recipe and rows of its own.

    [ranking]      {"query": .., "item": .., "label": 0..1}      a ranker (mixlm.py)
    [next_item]    {"history": [ids]} over a file of items       a user model (next_item.py)
    [next_event]   {"history": {features}}                       an encoder (train/next_event.py)

`data.sources` names the rows, `stage` and [model] what learns, as for conversations; the run is
launched, stopped, continued and saved in the same way. Rows are in memory as a whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import numpy as np

import lapilli
from lapilli.checkpoint.load import Loaded
from lapilli.config.reader import shown
from lapilli.datasets.texts import TextFile
from lapilli.errors import ConfigError, DataError, MediaError
from lapilli.modality.events import EventsModality
from lapilli.pipeline import Chat
from lapilli.rank.mixlm import CURRICULUM, RankingExample, RankingTask, with_teacher
from lapilli.rank.next_item import NextItemTask
from lapilli.rank.ranker import Ranker
from lapilli.train.data.dataset import fingerprint_of, open_source
from lapilli.train.distributed import ParallelContext
from lapilli.train.launch import check_sharding
from lapilli.train.next_event import NextEventTask
from lapilli.train.recipe import Recipe, SourceRecipe
from lapilli.train.recipe.file import check_idle_keys
from lapilli.train.stages import choose_trainable, load_start, set_up_layers
from lapilli.train.trainer.task import Loss, Plain

Made = RankingTask | NextItemTask | NextEventTask
Make = Callable[[Chat], Made]
"""Makes the task, of rows that were read before the model was loaded."""
_SPLIT: Final = 61  # stream of random numbers that decides what is held out


@dataclass(frozen=True, slots=True)
class Row:
    """A record of a file.

    Attributes:
        where: file and line, for messages.
        values: by name.
    """

    where: str
    values: Mapping[str, Any]

    def get(self, name: str) -> Any:  # noqa: ANN401  whatever the file holds
        """Return a value that has to be there.

        Raises:
            DataError: it is not.
        """
        if self.values.get(name) is None:
            raise DataError(
                f"{self.where} has no {name!r}: expected it beside "
                f"{', '.join(map(repr, self.values)) or 'nothing'}"
            )
        return self.values[name]

    def text(self, name: str) -> str:
        """Return a text; see `get`."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: {name} is {shown(value)}: expected a text")
        return value

    def probability(self, name: str) -> float:
        """Return a number from 0 to 1, which CSV has as a text; see `get`."""
        value = self.get(name)
        try:
            number = -1.0 if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = -1.0
        if not 0 <= number <= 1:
            raise DataError(
                f"{self.where}: {name} is {shown(value)}: expected a probability, 0 to 1"
            )
        return number


@dataclass
class ObjectiveTask:
    """An objective as `lapilli.train.launch.launch` runs it.

    Attributes:
        made: what knows its batches and its loss.
        loaded: the checkpoint that it came from.
        counts: rows of every source.
        held_out: what evaluation reads; None: there is nothing.
        skipped: nothing: a row that cannot be read ends a run before its first step.
    """

    made: Made
    loaded: Loaded
    recipe: Recipe
    parallel: ParallelContext
    counts: Sequence[int]
    held_out: Sequence[object] | None
    skipped: list[str] = field(default_factory=list)

    @property
    def model(self) -> Any:  # noqa: ANN401  of the objective
        """Return what learns."""
        return self.made.model

    @property
    def num_samples(self) -> int:
        """Return the samples of one epoch."""
        return self.made.num_samples

    def fingerprint(self) -> Mapping[str, Plain]:
        """Return what decides the batches and what rests; files are read for their digests."""
        weights = {"model.checkpoint": self.loaded.weight_files}
        template = self.loaded.template.template.name
        of_files = fingerprint_of(self.recipe, template, self.counts, weights)
        return {**of_files, "objective": self.recipe.objective or "", **self.made.fingerprint()}

    def names(self, step: int, micro: int) -> list[str]:
        """Return how messages name the samples of a micro-batch."""
        return self.made.names(step, micro) if isinstance(self.made, RankingTask) else []

    def batch(self, step: int, micro: int) -> tuple[Any, int]:
        """Return a micro-batch and how many things it learns."""
        return self.made.batch(step, micro)

    def loss(self, batch: Any) -> Loss:  # noqa: ANN401  of the objective
        """Return the summed loss."""
        return self.made.loss(batch)

    def evaluate(self) -> Mapping[str, float]:
        """Return metrics of what is held out."""
        return self.made.evaluate()


def build_objective(recipe: Recipe, parallel: ParallelContext) -> ObjectiveTask:
    """Build the task of a recipe with an objective.

    Raises:
        ConfigError: the recipe names no checkpoint or no rows, or parts do not go together.
        CheckpointError: a checkpoint cannot be read.
        DataError: a row cannot be read; the message names it.
        UnknownKeyError: a key that nothing would read.
    """
    check_idle_keys(recipe)
    name = recipe.objective
    if name is None:
        raise ConfigError("the recipe has no objective: add [ranking], [next_item] or [next_event]")
    rows, counts = _rows_of(recipe.data.sources, name)
    make = _MAKERS[name](recipe, *_split(recipe, rows))
    loaded = load_start(recipe)
    if parallel.is_sharded:
        check_sharding(loaded)
    choose_trainable(loaded.model, recipe)
    set_up_layers(loaded.model, recipe.run)
    made = make(Chat(loaded))
    parallel.wrap(made.model, precision=recipe.run.precision)
    return ObjectiveTask(
        made=made,
        loaded=loaded,
        recipe=recipe,
        parallel=parallel,
        counts=counts,
        held_out=made.held_out or None,
    )


def _ranking(recipe: Recipe, kept: list[Row], held: list[Row]) -> Make:
    asked = recipe.ranking
    assert asked is not None  # noqa: S101  its section chose this function
    examples, held_out = ([_example(row) for row in rows] for rows in (kept, held))

    def make(chat: Chat) -> RankingTask:
        taught = examples
        if asked.teacher is not None and asked.reads == "mixed":
            device = str(chat.model.device)
            taught = with_teacher(
                examples, Ranker(lapilli.load(asked.teacher, device=device, dtype="float32"))
            )
        return RankingTask(
            chat,
            taught,
            recipe.run,
            reads=asked.reads,
            held_out=held_out,
            encoder=asked.encoder,
            curriculum=asked.curriculum or CURRICULUM,
        )

    return make


def _example(row: Row) -> RankingExample:
    teacher = None if row.values.get("teacher") is None else row.probability("teacher")
    return RankingExample(row.text("query"), row.text("item"), row.probability("label"), teacher)


def _next_item(recipe: Recipe, kept: list[Row], held: list[Row]) -> Make:
    asked = recipe.next_item
    assert asked is not None  # noqa: S101  its section chose this function
    items = list(TextFile(asked.catalogue))
    places = {str(one): place for place, (one, _) in enumerate(items)}

    def history(row: Row) -> list[int]:
        ids = row.get("history")
        if not isinstance(ids, list):
            raise DataError(f"{row.where}: history is {shown(ids)}: expected a list of ids")
        for one in ids:
            if str(one) not in places:
                raise DataError(
                    f"{row.where}: {shown(one)} is none of the {len(items)} items of "
                    f"{asked.catalogue}"
                )
        if len(ids) < 2:
            raise DataError(f"{row.where}: a history of {len(ids)} items has no next one")
        return [places[str(one)] for one in ids]

    histories, held_out = ([history(row) for row in rows] for rows in (kept, held))
    return lambda chat: NextItemTask(
        chat,
        [text for _, text in items],
        histories,
        recipe.run,
        modality=asked.modality,
        negatives=asked.negatives,
        max_items=asked.max_items,
        temperature=asked.temperature,
        held_out=held_out,
    )


def _next_event(recipe: Recipe, kept: list[Row], held: list[Row]) -> Make:
    asked = recipe.next_event
    assert asked is not None  # noqa: S101  its section chose this function
    name = asked.modality
    histories, held_out = ([(row, row.get("history")) for row in rows] for rows in (kept, held))

    def make(chat: Chat) -> NextEventTask:
        modality = chat.model.modality(name)
        if isinstance(modality, EventsModality):  # else the task says what it is
            for row, history in (*histories, *held_out):
                _check_events(row, modality, history)
        learned, predicted = ([one for _, one in rows] for rows in (histories, held_out))
        return NextEventTask(modality, learned, recipe.run, predicted)

    return make


def _check_events(row: Row, modality: EventsModality, history: object) -> None:
    """Refuse a history that cannot be read, or predicts nothing."""
    try:
        pieces = modality.windows(history)
    except MediaError as error:
        raise DataError(f"{row.where}: {error}") from error
    if not pieces:
        raise DataError(f"{row.where}: a history of one event has no next one")


_MAKERS: Final[Mapping[str, Callable[[Recipe, list[Row], list[Row]], Make]]] = {
    "ranking": _ranking,
    "next_item": _next_item,
    "next_event": _next_event,
}


def _rows_of(sources: Sequence[SourceRecipe], objective: str) -> tuple[list[Row], list[int]]:
    """Return all rows, and how many every source has."""
    if not sources:
        raise ConfigError(
            f"recipe key data.sources is empty: name a file with the rows of [{objective}], for "
            "instance --data.sources '[{path = \"train.jsonl\"}]'"
        )
    found: list[Row] = []
    counts = []
    for source in sources:
        if source.weight != 1:
            raise ConfigError(
                f"data.sources weighs {source.path} with {source.weight}, and rows of "
                f"[{objective}] are each taken once an epoch: leave weight out"
            )
        before = len(found)
        found += _rows(source)
        counts.append(len(found) - before)
    return found, counts


def _rows(source: SourceRecipe) -> Iterator[Row]:
    opened = open_source(source)
    for index in range(len(opened)):
        record, where = opened.record(index), opened.where(index)
        if not isinstance(record, Mapping):
            raise DataError(f"{where} is {shown(record)}: expected an object with names and values")
        yield Row(where, cast("Mapping[str, Any]", record))


def _split(recipe: Recipe, rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Return what is learned from, and what evaluation reads.

    A query is held out with all of its rows: a ranker that knows a query from other items has seen
    half of the question.
    """
    data, objective = recipe.data, recipe.objective or ""
    if data.evaluation:
        return rows, _rows_of(data.evaluation, objective)[0]
    if not data.held_out:
        return rows, []
    keys = [row.text("query") if objective == "ranking" else str(i) for i, row in enumerate(rows)]
    names = sorted(set(keys))
    count = max(1, round(len(names) * data.held_out))
    rng = np.random.default_rng([recipe.run.seed, _SPLIT])
    chosen = {names[i] for i in rng.permutation(len(names))[:count]}
    pairs = list(zip(keys, rows, strict=True))
    kept = [row for key, row in pairs if key not in chosen]
    return kept, [row for key, row in pairs if key in chosen]
