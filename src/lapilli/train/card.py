"""Model card of a run: what was trained on what, how it went, and how to use it.

README.md with the header that the hub reads, the loss curve as a picture, and the recipe as it ran.
Knows recipes, logs and files; no models.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from lapilli.checkpoint.source import HUB_ID, is_local, read_optional_text
from lapilli.train.data.dataset import DataFile, data_file, together
from lapilli.train.data.source import expand
from lapilli.train.recipe import Recipe
from lapilli.train.recipe.file import recipe_text
from lapilli.train.results import FIGURE as EXACT_MATCH
from lapilli.train.results import Results
from lapilli.train.trainer.metrics import LOWEST, RISEN, RunLog
from lapilli.train.trainer.task import Record

CURVE = "loss.png"
RECIPE = "recipe.toml"
# Of larger files pieces are read: the whole would take minutes.
_HASHED_BYTES = 4_000_000_000
_LICENSE = re.compile(r"^license:\s*(\S+)\s*$", re.MULTILINE)
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def model_card(
    results: Results,
    folder: Path,
    *,
    facts: Mapping[str, str] | None = None,
) -> dict[str, str | bytes]:
    """Return the files that stand beside the results of a run: `extra` of `save_results`."""
    recipe = results.recipe
    records = RunLog(folder).records()
    files: dict[str, str | bytes] = {RECIPE: recipe_text(recipe)}
    if (folder / CURVE).is_file():
        files[CURVE] = (folder / CURVE).read_bytes()
    parts = [
        _front(results),
        _title(results, folder),
        _use(results),
        _course(records, facts or {}, has_curve=CURVE in files),
        _evaluation(records),
        _data(recipe),
        _recipe(recipe),
    ]
    text = "\n".join(part for part in parts if part)
    # A folder may be called \xff.
    files["README.md"] = text.encode(errors="backslashreplace").decode()
    return files


def add_card(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Add the files of a card to results that are saved already, each in one step."""
    for name, content in files.items():
        staged = folder / f"{name}.part"
        staged.write_bytes(content.encode() if isinstance(content, str) else content)
        staged.replace(folder / name)


def data_files(recipe: Recipe) -> list[DataFile]:
    """Return every file of samples that a recipe reads, with what tells it from another."""
    sources = (*recipe.data.sources, *recipe.data.evaluation)
    paths = dict.fromkeys(path for source in sources for path in expand(source.path))
    return [data_file(path, whole_bytes=_HASHED_BYTES) for path in paths]


def _front(results: Results) -> str:
    """Return the header; a base that is no hub id would be refused by the hub and is left out."""
    recipe = results.recipe
    base = recipe.model.checkpoint or ""
    is_adapter = results.is_adapter
    is_on_hub = HUB_ID.fullmatch(base) and "/" in base and not is_local(base)
    relation = "adapter" if is_adapter else "finetune"
    front = ModelCardData(
        license=_license(results),
        library_name="transformers" if recipe.save.layout == "huggingface" else "lapilli",
        pipeline_tag="image-text-to-text",
        tags=["llava", "lapilli", *(["lora", "peft"] if is_adapter else [])],
        base_model=base.partition("@")[0] if is_on_hub else None,
        base_model_relation=relation if is_on_hub else None,
    )
    return f"---\n{front.to_yaml()}\n---\n"


def _license(results: Results) -> str:
    """Return what the card of the checkpoint below says, for it binds what is made from it."""
    front = _FRONT.match(read_optional_text(results.loaded.path / "README.md") or "")
    found = _LICENSE.search(front[1]) if front else None
    return found[1] if found else "other"


def _title(results: Results, folder: Path) -> str:
    recipe = results.recipe
    what = {
        "align": "The projector of a LLaVA, trained alone on captions.",
        "instruct": "A LLaVA, trained on conversations.",
    }.get(recipe.stage, "A part of a LLaVA.")
    if recipe.lora is not None:
        what = "A LLaVA whose LoRA is folded in." if recipe.save.merge else "A LoRA for a LLaVA."
    base = recipe.model.checkpoint or results.loaded.path.name
    shown = base if not is_local(base) else Path(base).name
    return f"# {folder.resolve().name}\n\n{what} It started from `{shown}`.\n"


def _use(results: Results) -> str:
    template = f"The conversation template is `{results.template.name}`.\n"
    elsewhere = ""
    if results.recipe.save.layout == "huggingface":
        program, call = "transformers reads it", "AutoModelForImageTextToText.from_pretrained("
        if results.is_adapter:
            program, call = "peft lays it over the base", "PeftModel.from_pretrained(model, "
        elsewhere = f'{program}: `{call}"FOLDER")`.\n'
    return (
        "## Use\n\n"
        "```\n"
        'lapilli ask "What is in this picture?" picture.png --model FOLDER\n'
        "```\n\n"
        '`lapilli.load("FOLDER")` gives the same in Python. FOLDER holds this file.\n'
        f"{elsewhere}{template}"
    )


def _course(records: Sequence[Record], facts: Mapping[str, str], *, has_curve: bool) -> str:
    losses = [record for record in records if "loss" in record]
    if not losses:
        return ""
    first, last = losses[0], losses[-1]
    tail = losses[-max(len(losses) // 10, 1) :]
    mean = sum(record["loss"] for record in tail) / len(tail)
    skipped = last.get("skipped", 0)
    shown = {
        **facts,
        **({"samples that could not be read": f"{int(skipped):,}"} if skipped else {}),
        "steps": f"{last['step']}",
        f"loss of step {first['step']}": f"{first['loss']:.4f}",
        "mean loss of the last tenth": f"{mean:.4f}",
    }
    if rise := next((record for record in records if RISEN in record), None):
        what = f"from {rise[LOWEST]:.4f} to {rise[RISEN]:.4f} by step {rise['step']}"
        shown["the loss rose"] = what
    curve = f"\n![loss over steps]({CURVE})\n" if has_curve else ""
    return f"## Training\n\n{_table(shown)}{curve}"


def _table(shown: Mapping[str, str]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {one} |\n" for name, one in shown.items())


def _recipe(recipe: Recipe) -> str:
    """Return what differs from the defaults of today; the file beside has every value."""
    return (
        f"## Recipe\n\n```toml\n{recipe_text(recipe, defaults=False)}```\n\n"
        f"`{RECIPE}` has every other value as it was.\n"
    )


def _evaluation(records: Sequence[Record]) -> str:
    """Return the last metrics on held-out data, and the best loss there was."""
    evaluations = [record for record in records if "eval_loss" in record]
    if not evaluations:
        return ""
    last = evaluations[-1]
    best = min(evaluations, key=lambda record: record["eval_loss"])
    exam = next((record for record in reversed(records) if EXACT_MATCH in record), {})
    shown = {name: _shown(value) for name, value in {**last, **exam}.items() if name != "step"}
    told = (
        " exact_match is the share of the answers given greedily that were equal to those of the "
        "data."
    )
    return (
        f"## Evaluation\n\nOn samples that were held out, after step {last['step']}; the lowest "
        f"eval_loss was {best['eval_loss']:.4f}, after step {best['step']}.{told if exam else ''}"
        f"\n\n{_table(shown)}"
    )


def _shown(figure: int | float) -> str:
    """Return a loss or a share with its decimals, a count without."""
    return f"{int(figure):,}" if float(figure).is_integer() else f"{figure:.4f}"


def _data(recipe: Recipe) -> str:
    files = data_files(recipe)
    if not files:
        return ""
    rows = "".join(f"| {file.name} | {file.num_bytes} | {file.digest} |\n" for file in files)
    return (
        f"## Data\n\nTogether: {together(files)}. Pictures outside of these files are not counted."
        f"\n\n| file | bytes | digest |\n|---|---|---|\n{rows}"
    )
