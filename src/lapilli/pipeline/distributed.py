"""Answers from several processes or machines: Ray Data hands out lines, one process writes.

    lines --tables of a few--> Ray's actors, an engine each --results--> the process that asked

An actor that dies is started again and its table is asked once more; nothing of it was handed over
before, since a table's results come as a whole. What is written already is the caller's: another
run asks only what is missing. Needs the extra "ray".

Knows lines by number and content; must not know what they mean, which is the caller's function.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lapilli.cluster import Share
from lapilli.errors import GenerationError, LapilliError

Row = Any
"""What the caller's function answers; it is sent to other processes, and has a `number`."""
Answer = Callable[[Sequence[Row]], Iterable[dict[str, Any]]]
Columns = dict[str, Any]


def answer_distributed(
    ray: Any,  # noqa: ANN401 - a module
    rows: Sequence[Row],
    make: Callable[[], Answer],
    *,
    workers: int,
    share: Share,
    at_once: int,
) -> Iterator[dict[str, Any]]:
    """Yield a result for every row, once, in the order in which tables are finished.

    Args:
        ray: what `lapilli.cluster.connect` returned.
        rows: what is asked.
        make: makes the same in every worker: what answers rows with a result each, whose "line" is
            the row's number.
        workers: processes.
        share: of the cluster, for each.
        at_once: rows that a worker gets, and that its death costs.

    Raises:
        GenerationError: a worker cannot load its engine, or Ray gives up.
    """
    import pyarrow
    from ray import cloudpickle as pickled  # it has no types

    cloudpickle: Any = pickled
    size = max(1, min(at_once, -(-len(rows) // workers)))
    refs = [
        ray.put(pyarrow.table({"rows": [cloudpickle.dumps(list(rows[at : at + size]))]}))
        for at in range(0, len(rows), size)
    ]
    answered = ray.data.from_arrow_refs(refs).map_batches(
        _Worker,
        fn_constructor_args=(make, share.cpus),
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(refs))),
        batch_size=1,
        num_cpus=share.cpus,
        num_gpus=share.gpus,
    )
    left = {row.number for row in rows}
    try:
        for batch in answered.iter_batches(batch_size=None, batch_format="numpy"):
            for result in _results(batch):
                if result["line"] in left:
                    left.remove(result["line"])
                    yield result
    except ray.exceptions.RayError as error:
        said = " ".join(str(error).split())[-300:]
        raise GenerationError(
            f"Ray gave up with {len(left)} of {len(rows)} rows to go: {said}; the answers so far "
            "are kept, start the same command again"
        ) from error
    if left:
        raise GenerationError(
            f"{len(left)} of {len(rows)} rows came back without a result, the first is "
            f"{min(left)}: start the same command again"
        )


def _results(batch: Columns) -> Iterator[dict[str, Any]]:
    """Yield what workers handed over.

    Raises:
        GenerationError: a worker has no engine.
    """
    for told in batch["results"]:
        found = json.loads(told)
        if isinstance(found, dict):
            raise GenerationError(f"a worker of Ray has no engine: {found['wrong']}")
        yield from found


class _Worker:
    """An engine in a process of Ray's."""

    def __init__(self, make: Callable[[], Answer], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._wrong = ""
        try:
            self._answer = make()
        except LapilliError as error:
            self._wrong = str(error)

    def __call__(self, batch: Columns) -> Columns:
        """Return the results of tables of rows, as JSON, or why there is no engine.

        What is wrong is handed over as text: Ray would wrap an exception in its own, with the
        worker's traceback, and start the worker again.
        """
        from ray import cloudpickle

        if self._wrong:
            return {"results": [json.dumps({"wrong": self._wrong}).encode()]}
        results = [list(self._answer(cloudpickle.loads(rows))) for rows in batch["rows"]]
        return {"results": [json.dumps(each).encode() for each in results]}
