"""What makes rows for a checkpoint whose weights are not read: sizes, tokenizer, template."""

from dataclasses import dataclass
from pathlib import Path

from lapilli.checkpoint.assemble import build_model
from lapilli.checkpoint.plan import make_plan
from lapilli.checkpoint.template import choose_for
from lapilli.prompt.choose import Template
from lapilli.train.data.encoder import RowMaker


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """A RowMaker without a length limit, and what the checkpoint says about rows."""

    maker: RowMaker
    template: Template
    context_length: int


def plan_rows(
    checkpoint: str | Path, *, base: str | None = None, template: str | None = None
) -> PlannedRows:
    """How a checkpoint reads samples.

    Args:
        checkpoint: a directory, a hub id or "pebble"; only its small files are fetched.
        base: see `load_checkpoint`.
        template: another one than the checkpoint's own.

    Raises:
        CheckpointError: files are missing or damaged.
        ConfigError: config.json cannot be followed.
        PromptError: no template has this name.
    """
    plan = make_plan(checkpoint, base=base, fetch=False)
    chosen = choose_for(plan, template).template
    model, image_id = build_model(plan.config), plan.config.tokens.image_id
    maker = RowMaker(plan.tokenizer, chosen, model, image_id=image_id)
    return PlannedRows(maker, chosen, plan.config.max_length or plan.config.context_length)
