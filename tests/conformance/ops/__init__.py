"""Which function runs an op: through `llava.*`, and through our own API where it has the same."""

from collections.abc import Callable, Mapping

from tests.conformance.cases import Case
from tests.conformance.checkpoints import Workshop
from tests.conformance.compare import Check

Run = Callable[[Case, Workshop, Check], None]


def build_registry() -> Mapping[str, Mapping[str, Run]]:
    """op -> path -> function; installs the names of the original first."""
    from lapilli import compat

    compat.install()
    from tests.conformance.ops import generation, own, pictures, text, training, vision

    return {
        "load": {"llava": vision.load, "lapilli": own.load},
        "prompt": {"llava": text.prompt, "lapilli": own.prompt},
        "pixels": {"llava": pictures.pixels, "lapilli": own.pixels},
        "vision": {"llava": vision.vision, "lapilli": own.vision},
        "sample": {"llava": vision.sample, "lapilli": own.sample},
        "generate": {"llava": generation.generate, "lapilli": own.generate},
        "eval_model": {"llava": generation.eval_model},
        "cli_chat": {"llava": generation.cli_chat},
        "mpt_original_forward": {"llava": generation.mpt_original_forward},
        "train": {"llava": training.train},
        "tokenize": {"llava": text.tokenize},
        "decode": {"llava": text.decode},
        "stopping": {"llava": text.stopping},
        "templates": {"llava": text.templates, "lapilli": own.templates},
        "model_name": {"llava": text.model_name},
        "labels": {"llava": training.labels},
        "dataset": {"llava": training.dataset},
        "sampler": {"llava": training.sampler},
        "process_images": {"llava": pictures.process_images},
        "conv_process_image": {"llava": pictures.conv_process_image},
        "geometry": {"llava": pictures.geometry, "lapilli": own.geometry},
    }
