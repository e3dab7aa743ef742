"""What makes another run: the samples that it reads, their order, and what learns from them.

    recipe, template, files --> {"run.seed": 0, "data.sources[0].content": "sha256:...", ...}

A state keeps it, and is refused where a recipe says something else: state.py. What may change while
a run goes on (steps, rates, precision, workers, processes, on_bad_sample, evaluation) is not in it,
nor are the folders that data and models lie in. Pictures outside of the files of samples are not
read.
Knows recipes and files; no models.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lapilli.train.data.fingerprint import data_file, together
from lapilli.train.data.source import expand
from lapilli.train.recipe import Recipe, SourceRecipe
from lapilli.train.trainer.contract import Plain


def identity_of(
    recipe: Recipe,
    template: str,
    counts: Sequence[int],
    weights: Mapping[str, Sequence[Path]],
) -> dict[str, Plain]:
    """Names of recipe keys, and what they stand for.

    Args:
        recipe: of the run.
        template: name of the one that rows are rendered with.
        counts: records of every source, those that are held out too.
        weights: files of the models that the run begins with, by the keys that name them: what it
            does not train stands in no state.
    """
    run, data = recipe.run, recipe.data
    found: dict[str, Plain] = {
        "stage": recipe.stage,
        "optim.name": recipe.optim.name,
        "run.seed": run.seed,
        "run.batch_size": run.batch_size,
        "run.accumulate": run.accumulate,
        "data.held_out": 0.0 if data.evaluation else data.held_out,
        "data.template": template,
        "data.max_length": data.max_length,
        "data.group": data.group,
        "data.pack": data.pack,
        "data.placement": data.placement,
        **({"data.alpha": data.alpha} if data.alpha != "drop" else {}),  # as runs from before it
    }
    if recipe.lora is not None:
        names = ("rank", "alpha", "base", "double_quant")
        found |= {f"lora.{name}": getattr(recipe.lora, name) for name in names}
    for number, (source, count) in enumerate(zip(data.sources, counts, strict=True)):
        facts = {"samples": count, "weight": source.weight, **_files(source)}
        found |= {f"data.sources[{number}].{key}": value for key, value in facts.items()}
    for key, files in weights.items():
        found[f"{key}.content"] = together([data_file(path) for path in files])
    return found


def _files(source: SourceRecipe) -> dict[str, Plain]:
    """The files without their folder; the name counts, as what is held out depends on it."""
    digests = [data_file(path) for path in expand(source.path)]
    name = source.path.replace("\\", "/").rpartition("/")[2]
    return {"path": name, "content": together(digests)}
