"""The parsed JSON files of a checkpoint, gathered by whoever reads the disk."""

from dataclasses import dataclass, field

from lapilli.config.reader import JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfigFiles:
    """Everything that a configuration is parsed from.

    Args:
        config: config.json.
        tower: config.json of the vision tower that `mm_vision_tower` names.
        preprocessor: preprocessor_config.json: the tower's (original) or the checkpoint's.
        generation: generation_config.json, empty when there is none.
        weight_names: names of the tensors in the checkpoint, where they are known cheaply.
    """

    config: JsonObject
    tower: JsonObject | None = None
    preprocessor: JsonObject | None = None
    generation: JsonObject = field(default_factory=dict)
    weight_names: frozenset[str] = frozenset()
