"""Run fingerprint: what makes another run, from the recipe and the digests of its files.

    recipe, template, files --> {"run.seed": 0, "data.sources[0].content": "sha256:...", ...}

A checkpoint of the trainer keeps it, and is refused where a recipe says something else. What may
change while a run goes on (steps, rates, precision, workers, processes, on_bad_sample, evaluation)
is not in it, nor are the folders that data and models lie in. Pictures outside of the files of
samples are not read. Digests of files:

    up to whole_bytes     sha256 of the content, as sha256sum prints it
    larger                sha256 of its size and of pieces spread evenly over it, 16 MiB in all
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

from lapilli.train.data.source import expand
from lapilli.train.recipe import Recipe, SourceRecipe
from lapilli.train.trainer.contract import Plain

_PIECE: Final = 1 << 18
_PIECES: Final = 64
SAMPLED_BYTES: Final = _PIECE * _PIECES
"""What is read of a large file; those that are not larger are read whole."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file of samples.

    Attributes:
        name: without its folder, which says something about one machine alone.
        num_bytes: its size.
        digest: "sha256:..." of its content, or "in pieces, sha256:...".
    """

    name: str
    num_bytes: int
    digest: str


def data_file(path: Path, *, whole_bytes: int = SAMPLED_BYTES) -> DataFile:
    """Return name, size and digest of a file; neither its folder nor its time counts.

    Args:
        path: of the file.
        whole_bytes: files up to this size are read whole. In larger ones a change that keeps the
            size and lies between the pieces is not seen.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= max(whole_bytes, SAMPLED_BYTES):
            return DataFile(path.name, size, _sha256(iter(lambda: file.read(_PIECE), b"")))
        return DataFile(path.name, size, f"in pieces, {_sha256(_sample(file, size))}")


def together(files: Sequence[DataFile]) -> str:
    """Return one digest of several files, in their order."""
    return _sha256(["\n".join(file.digest for file in files).encode()])


def _sample(file: BufferedReader, size: int) -> Iterator[bytes]:
    """Yield the size, and pieces from the first byte to the last."""
    yield str(size).encode()
    for number in range(_PIECES):
        file.seek(number * (size - _PIECE) // (_PIECES - 1))
        yield file.read(_PIECE)


def _sha256(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return f"sha256:{digest.hexdigest()}"


def fingerprint_of(
    recipe: Recipe,
    template: str,
    counts: Sequence[int],
    weights: Mapping[str, Sequence[Path]],
) -> dict[str, Plain]:
    """Return the fingerprint of a run: names of recipe keys, and what they stand for.

    Args:
        recipe: of the run.
        template: name of the template of the samples.
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
        "run.gradient_accumulation_steps": run.gradient_accumulation_steps,
        "data.held_out": 0.0 if data.evaluation else data.held_out,
        "data.template": template,
        "data.max_length": data.max_length,
        "data.group": data.group,
        "data.pack": data.pack,
        "data.placement": data.placement,
        **({"data.alpha": data.alpha} if data.alpha != "drop" else {}),  # as runs from before it
    }
    if recipe.model.freeze:
        found["model.freeze"] = ", ".join(recipe.model.freeze)
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
    """Return name and digest of a source's files; what is held out depends on the name."""
    digests = [data_file(path) for path in expand(source.path)]
    name = source.path.replace("\\", "/").rpartition("/")[2]
    return {"path": name, "content": together(digests)}
