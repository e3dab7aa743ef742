"""`python -m pebble` in the repository's root: pebble from nothing, resumable at any step.

tokenizer, pictures -> tower -> language -> features -> align -> instruct -> export -> exam

`--recipes pebble/recipes/warm` goes on from the embedded pebble instead:

tokenizer, pictures -> tower -> features -> instruct -> export -> exam

and `--recipes pebble/recipes/larger` grows it to four times its parameters, with its own tower:

tokenizer, pictures -> features -> instruct -> export -> exam
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from lapilli.checkpoint.out_of_distribution import save_detector
from lapilli.train.trainer.metrics import RunLog, loss_curve, plot_losses
from pebble.boundary import boundary_rates, pebble_detector
from pebble.examine import ask_exported
from pebble.export import export_llava
from pebble.run import RECIPES, STAGES, Workshop
from pebble.score import Tally, exam, held_out_digits, score, wider_exam


def main(arguments: list[str] | None = None) -> None:
    """Run every stage that is not finished, then export and examine."""
    parser = argparse.ArgumentParser(prog="python -m pebble", description=__doc__)
    parser.add_argument("--recipes", type=Path, default=RECIPES / "from_nothing")
    parser.add_argument("--work", type=Path, default=Path("build/pebble"))
    parser.add_argument("--out", type=Path, default=Path("src/lapilli/pebble"))
    parser.add_argument("--plot", type=Path, default=Path("docs/assets/pebble-loss.png"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--stage", choices=STAGES, help="only this stage, as one process of many")
    parser.add_argument("--rank", type=int, default=0)
    options = parser.parse_args(arguments)
    shop = Workshop(options.recipes, options.work)
    if options.stage is not None:
        shop.train(options.stage, rank=options.rank, size=options.processes)
        return
    _say("tokenizer and pictures")
    shop.prepare(options.processes)
    for stage in shop.stages:
        if stage != "1_tower":  # which makes the features of all others
            shop.compute_features()
        if not shop.is_finished(stage):
            _say(f"stage {stage}")
            shop.train_together(stage, options.processes)
    export(shop, options.out)
    mark_boundary(options.out)
    curves = {stage: loss_curve(RunLog(options.work / stage).records()) for stage in shop.stages}
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    plot_losses(curves, options.plot)
    report(options.out)


def export(shop: Workshop, folder: Path) -> None:
    """Write the finished model as files in the original layout."""
    reader = shop.finished_reader()
    export_llava(
        folder,
        language_model=reader.language_model,  # type: ignore[arg-type]  # a module by construction
        projector=reader.projector,
        tower=shop.tower(),
        text=shop.text,
        vision=shop.vision,
        tokenizer_model=(shop.work / "tokenizer.model").read_bytes(),
    )


def mark_boundary(folder: Path) -> None:
    """Keep beside the weights what the model knows, and say how well that tells pictures apart."""
    detector = pebble_detector(folder)
    save_detector(detector, folder)
    known, strange = boundary_rates(folder, detector)
    _say(f"{100 * known:.1f} % of fresh scenes lie inside, {100 * strange:.1f} % of others outside")


def report(folder: Path) -> None:
    """Accuracy of the exported model per skill: printed, and kept beside the weights."""
    torch.set_grad_enabled(False)
    ask = ask_exported(folder)
    fresh, digits = score(ask, exam()), score(ask, held_out_digits())
    wider = score(ask, wider_exam())
    del wider["all"]
    figures = {
        "questions": {name: _figures(tally) for name, tally in fresh.items()},
        "held_out_digits": _figures(digits["all"]),
        "wider": {name: _figures(tally) for name, tally in wider.items()},
    }
    (folder / "accuracy.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for name, tally in {**fresh, "held-out digits": digits["all"], **wider}.items():
        _say(
            f"{name:33} {100 * tally.accuracy:6.2f} %   {tally.right} of {tally.total}", sys.stdout
        )


def _figures(tally: Tally) -> Mapping[str, float]:
    return {**asdict(tally), "accuracy": round(tally.accuracy, 4)}


def _say(line: str, stream: object = None) -> None:
    (sys.stderr if stream is None else sys.stdout).write(line + "\n")


if __name__ == "__main__":
    main()
