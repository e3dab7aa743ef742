"""Checkpoints of the golden numbers, made once per session by the program that made them first."""

import json
import os

import pytest


@pytest.fixture(scope="session")
def golden(conformance, maker, tmp_path_factory):
    """golden(variant) -> (spec, paths and hashes, load case); made at the first call."""
    made = {}

    def make(variant: str):
        if variant not in made:
            cases = next((conformance / "cases").glob(f"*/{variant}"))
            spec = json.loads((cases / "spec.json").read_text())
            out = tmp_path_factory.mktemp(variant)
            vision = None
            if spec.get("vision_path") == "relative":
                vision = os.path.relpath(out / spec["vision"]["dir"])
            built = maker.build(spec, str(out), vision, str(conformance / "assets"))
            every = json.loads((cases / "cases.json").read_text())["cases"]
            load = next((case for case in every if case["op"] == "load"), None)
            made[variant] = (spec, built, load)
        return made[variant]

    return make


@pytest.fixture(scope="session")
def llava(tmp_path_factory):
    """Hugging Face LLaVA 1.5, random, with layers of 128 inputs and more."""
    from tests.checkpoint.published import make_llava

    path = tmp_path_factory.mktemp("llava")
    make_llava(path)
    return path


@pytest.fixture(scope="session")
def packed_llava(llava, tmp_path_factory):
    """The same with its language model in AWQ, groups of 64."""
    from tests.checkpoint.published import awq, convert, of_text_layers

    return convert(llava, tmp_path_factory.mktemp("awq"), awq(64), chosen=of_text_layers)[0]
