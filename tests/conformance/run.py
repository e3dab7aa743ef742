"""Runs the golden cases of a directory and gathers what became of them."""

import time
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch

from tests.conformance.cases import Case, Variant, find_variants
from tests.conformance.checkpoints import Workshop, load_maker
from tests.conformance.compare import Check, NotTheSame, SkipCase
from tests.conformance.ops import Run, build_registry
from tests.conformance.table import Result


@dataclass(frozen=True)
class Selection:
    """Which cases to run; None: all of them."""

    sets: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()

    def takes(self, variant: Variant) -> bool:
        return _in(variant.set, self.sets) and _in(variant.name, self.variants)

    def takes_case(self, case: Case) -> bool:
        return _in(case.op, self.ops) and _in(case.id, self.ids)


def _in(name: str, chosen: tuple[str, ...]) -> bool:
    return not chosen or name in chosen


def run_directory(
    root: Path, scratch: Path, selection: Selection, processes: int = 1
) -> Iterator[Result]:
    """Yield the results of every chosen case under `root`, through every path that its op has.

    Variants share nothing, so several processes take them in turn; the order of the results is that
    of the variants, however many processes there are.
    """
    chosen = [variant for variant in find_variants(root) if selection.takes(variant)]
    run = partial(run_alone, root=root, scratch=scratch, selection=selection)
    if processes == 1:
        yield from chain.from_iterable(map(run, chosen))
        return
    with ProcessPoolExecutor(
        processes, get_context("spawn"), _begin, (torch.get_num_threads(),)
    ) as pool:
        yield from chain.from_iterable(pool.map(run, chosen))


def _begin(threads: int) -> None:
    """Set up a process that was started for a share of the variants."""
    torch.set_num_threads(threads)


def run_alone(variant: Variant, root: Path, scratch: Path, selection: Selection) -> list[Result]:
    """Return the results of one variant, with checkpoints and runners of its own."""
    workshop = Workshop(variant, load_maker(root), scratch)
    return list(run_variant(variant, workshop, build_registry(), selection))


def run_variant(
    variant: Variant,
    workshop: Workshop,
    registry: Mapping[str, Mapping[str, Run]],
    selection: Selection,
) -> Iterator[Result]:
    """The chosen cases of one variant, op by op."""
    chosen = [case for case in variant.cases if selection.takes_case(case)]
    for op in sorted({case.op for case in chosen}, key=[c.op for c in chosen].index):
        paths = registry.get(op)
        for case in (c for c in chosen if c.op == op):
            if paths is None:
                yield _unknown(variant, case)
                continue
            for path, run in paths.items():
                result = run_case(variant, workshop, case, path, run)
                if result is not None:
                    yield result


def run_case(
    variant: Variant, workshop: Workshop, case: Case, path: str, run: Run
) -> Result | None:
    """One case through one path; whatever is raised becomes its reason."""
    check, started = Check(), time.monotonic()
    status, reasons = "passed", check.failures
    # The original drew random rows for new tokens from this seed; ours never draws.
    torch.manual_seed(0)
    try:
        with workshop.at_home():
            run(case, workshop, check)
    except NotTheSame:
        return None
    except SkipCase as reason:
        status, reasons = "skipped", [str(reason)]
    except Exception as error:  # noqa: BLE001  a case must not end the run
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        check.failures.append(f"{type(error).__name__} at {where}: {error}")
    if status == "passed" and (check.failures or not check.compared):
        status = "failed"
        check.failures = check.failures or ["nothing was compared"]
        reasons = check.failures
    return Result(
        set=variant.set,
        variant=variant.name,
        op=case.op,
        path=path,
        case=case.id,
        status=status,
        reasons=reasons,
        worst=check.worst,
        worst_of_tolerance=check.worst_of_tolerance,
        worst_name=check.worst_name,
        seconds=time.monotonic() - started,
        differs=check.differs,
    )


def _unknown(variant: Variant, case: Case) -> Result:
    return Result(
        variant.set,
        variant.name,
        case.op,
        "-",
        case.id,
        "failed",
        [f"no runner for op {case.op!r}"],
    )
