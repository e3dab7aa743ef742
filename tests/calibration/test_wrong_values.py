"""Values that no type checker would pass: each ends at once in one error of lapilli's own.

They are given in a process of their own, because in this one the types of arguments are checked.
"""

import json
import re
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys
import torch
import lapilli
from lapilli.calibration import CalibrationOptions, quantize_from_samples
from lapilli.quant import QuantConfig, quantize

def run(source="none", target="q", config=QuantConfig(), options=CalibrationOptions(), **more):
    quantize_from_samples(source, target, config, options, **more)

linear = torch.nn.Linear(32, 32)
found = {}
for text in json.load(sys.stdin):
    try:
        exec(text)
        found[text] = ["nothing", ""]
    except Exception as error:
        kind = type(error).__name__
        own = isinstance(error, lapilli.LapilliError)
        found[text] = [kind if own else f"bare {kind}", str(error)]
print(json.dumps(found))
"""

WRONG = {
    "CalibrationOptions(samples=5)": "samples must be a text or a Path, got 5",
    "CalibrationOptions(samples=None)": "samples must be a text or a Path, got None",
    "CalibrationOptions(images=5)": "images must be a text or a Path or None, got 5",
    "CalibrationOptions(number=1.5)": r"number must be a whole number, got 1\.5",
    "CalibrationOptions(number=True)": "number must be a whole number, got True",
    "CalibrationOptions(rotate='no')": "rotate must be True or False, got 'no'",
    "CalibrationOptions(bits='4')": "bits must be a whole number, got '4'",
    "CalibrationOptions(method=None)": "method must be a text, got None",
    "CalibrationOptions(method=['awq'])": r"method must be a text, got \['awq'\]",
    "CalibrationOptions(form=3)": "form must be a text, got 3",
    "CalibrationOptions(device=torch.device('cpu'))": "device must be a text, got device",
    "QuantConfig(bits=4.0)": r"bits must be a whole number, got 4\.0",
    "QuantConfig(bits=True)": "bits must be a whole number, got True",
    "QuantConfig(levels=['zeros'])": r"levels must be a text, got \['zeros'\]",
    "QuantConfig(mode=None)": "mode must be a text, got None",
    "QuantConfig(head_bits='8')": "head_bits must be a whole number or None, got '8'",
    "QuantConfig(quantize_tower='no')": "quantize_tower must be True or False, got 'no'",
    "quantize(linear, 'int4')": "config must be a QuantConfig, got 'int4'",
    "quantize(linear, None)": "config must be a QuantConfig, got None",
    "run(target=5)": "target must be a text or a Path, got 5",
    "run(config=None)": "config must be a QuantConfig, got None",
    "run(config='int4')": "config must be a QuantConfig, got 'int4'",
    "run(options='awq')": "options must be a CalibrationOptions, got 'awq'",
    "run(overwrite='no')": "overwrite must be True or False, got 'no'",
    "run(source=5)": "a checkpoint must be a directory, a hub id or 'pebble', got 5",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(list(WRONG)),
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path_factory.mktemp("wrong"),
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("text", list(WRONG))
def test_a_wrong_value_ends_in_one_error(found, text):
    kind, message = found[text]
    assert kind == ("CheckpointError" if "source" in text else "ConfigError")
    assert re.search(WRONG[text], message), message
