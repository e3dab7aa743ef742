"""Export between layouts keeps a checkpoint the same."""

import pytest
import torch
from safetensors import safe_open

from lapilli.checkpoint.export import export_checkpoint
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.out_of_distribution import load_detector
from lapilli.checkpoint.source import resolve
from lapilli.checkpoint.write.llava import save_llava
from lapilli.errors import ConfigError, UnsupportedModelError
from lapilli.quant import QuantConfig

pytestmark = pytest.mark.slow


def state_of(path, **options):
    loaded = load_checkpoint(path, device="cpu", dtype="float32", **options)
    return loaded, loaded.model.state_dict()


def test_an_export_to_hugging_face_and_back_changes_nothing(golden, tmp_path):
    _, built, _ = golden("llava-v1.5-tiny-pad")
    there, back = tmp_path / "there", tmp_path / "back"
    export_checkpoint(built["model_path"], there, layout="huggingface", dtype="float32")
    stored = export_checkpoint(str(there), back)
    first, one = state_of(built["model_path"])
    last, two = state_of(back)
    assert stored == last.config.torch_dtype == "float32"
    assert last.config.layout == "llava"
    assert last.template.template == first.template.template
    assert one.keys() == two.keys()
    for name, tensor in one.items():  # the image token stays in the vocabulary
        assert torch.equal(tensor, two[name][: len(tensor)]), name


def stored_dtypes(folder, part):
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found |= {shard.get_slice(name).get_dtype() for name in shard.keys() if part in name}  # noqa: SIM118  no mapping
    return found


def test_each_tensor_is_exported_in_the_format_of_its_file(golden, tmp_path):
    """The original's towers lie in float32 beside a language model in float16."""
    _, built, _ = golden("llava-v1.5-tiny-pad")
    export_checkpoint(built["model_path"], tmp_path / "out", layout="huggingface")
    assert stored_dtypes(tmp_path / "out", "vision_tower") == {"F32"}
    assert stored_dtypes(tmp_path / "out", "layers.0.mlp") - {"F32"} == {"F16"}


def test_an_adapter_is_folded_in(golden, tmp_path):
    _, built, _ = golden("llava-v1.5-tiny-lora")
    base = built["model_base"]
    export_checkpoint(built["model_path"], tmp_path / "out", base=base, dtype="float32")
    _, merged = state_of(tmp_path / "out")
    _, expected = state_of(built["model_path"], base=base)
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", ["llava", "huggingface"])
def test_an_exported_pebble_keeps_its_detector(tmp_path, layout):
    export_checkpoint("pebble", tmp_path / "out", layout=layout)
    before, after = (load_detector(resolve(place)) for place in ("pebble", str(tmp_path / "out")))
    assert after.knows == before.knows
    assert torch.equal(after.whitening, before.whitening)


def test_what_cannot_be_exported_is_refused(golden, tmp_path):
    _, built, _ = golden("llava-mpt-tiny")
    with pytest.raises(ConfigError, match="layout 'onnx' is unknown: choose from llava, huggingf"):
        export_checkpoint(built["model_path"], tmp_path / "out", layout="onnx")
    with pytest.raises(UnsupportedModelError, match="no mpt language model"):
        export_checkpoint(built["model_path"], tmp_path / "out", layout="huggingface")
    with pytest.raises(ConfigError, match="dtype 'int8' is unknown"):
        export_checkpoint(built["model_path"], tmp_path / "out", dtype="int8")
    loaded = load_checkpoint(
        "pebble", device="cpu", quantization=QuantConfig(bits=8, group_size=32)
    )
    packed = tmp_path / "packed"
    save_llava(
        packed,
        loaded.model,
        loaded.config,
        tokenizer_path=loaded.tokenizer_path,
        quantization=loaded.quantization,
    )
    with pytest.raises(ConfigError, match="packed is quantized: export the checkpoint"):
        export_checkpoint(str(packed), tmp_path / "out")
