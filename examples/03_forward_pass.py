"""One forward pass of LLaVA 1.5, step by step: words and pixels become one row of vectors.

The widths are those of llava-1.5-7b, so every shape is the published model's. The weights are
random and the layers few, so it runs in seconds; what comes out means nothing.

python examples/03_forward_pass.py
"""

import torch
from PIL import Image, ImageDraw

from lapilli.config.model import (
    DecoderConfig,
    ImageConfig,
    PixelConfig,
    ProjectorConfig,
    VisionConfig,
)
from lapilli.geometry import ImageSize
from lapilli.lm.decoder import Decoder
from lapilli.modality.image.image import ImageModality
from lapilli.model import VisionLanguageModel, fuse
from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span

# What the published tokenizer makes of
#   USER: <image>\nWhat is shown in this image? ASSISTANT:
BEFORE = [1, 3148, 1001, 29901, 29871]
AFTER = [29871, 13, 5618, 338, 4318, 297, 445, 1967, 29973, 319, 1799, 9047, 13566, 29901]


def build_model() -> VisionLanguageModel:
    """The widths of llava-1.5-7b, but few layers and a narrow MLP."""
    decoder = DecoderConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=1024,
        num_layers=1,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=4096,
        tie_embeddings=True,
    )
    vision = VisionConfig(
        image_size=336,
        patch_size=14,
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=2,
        num_heads=16,
        feature_layer=-1,
    )
    projector = ProjectorConfig(kind="mlp", vision_size=1024, hidden_size=4096, depth=2)
    image = ImageConfig(pixels=PixelConfig(crop_size=ImageSize(336, 336), shortest_edge=336))
    modality = ImageModality(image, vision, projector)
    return VisionLanguageModel(Decoder(decoder), {"image": modality}).eval()


def draw_picture() -> Image.Image:
    """Something to look at, 640 x 480."""
    picture = Image.new("RGB", (640, 480), "steelblue")
    ImageDraw.Draw(picture).ellipse((220, 140, 420, 340), fill="gold")
    return picture


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = build_model()
    image = model.modality("image")

    # The picture becomes pixels, and its size says how many positions it takes in the prompt.
    prepared = image.prepare(draw_picture())
    span = Span(row=0, start=len(BEFORE), length=image.num_tokens(prepared))
    prompt = EncodedPrompt(
        input_ids=[*BEFORE, *[PLACEHOLDER] * span.length, *AFTER],
        loss_mask=[False] * (len(BEFORE) + span.length + len(AFTER)),
        spans=(span,),
    )
    input_ids = torch.tensor([prompt.input_ids])
    print("input_ids           ", input_ids.shape)
    print("pixel_values        ", prepared.pixel_values.shape)

    # The word embedding; what it says under the span will be overwritten.
    text = model.language_model.embed(input_ids)
    print("inputs_embeds       ", text.shape)

    # The vision tower reads 24 x 24 patches; the class token is left out.
    features = image.vision_tower(prepared.pixel_values)
    print("image features      ", features.shape)

    # The projector takes them to the width of the language model.
    print(image.projector)
    projected = image.projector(features)
    print("projected features  ", projected.shape)

    # The span, as a mask over the vectors.
    mask = torch.zeros_like(text, dtype=torch.bool)
    mask[:, span.start : span.start + span.length] = True
    print("special_image_mask  ", mask.shape)

    # Counted fusion: every picture goes over its own span, and has to fit it.
    fused = fuse(text, [projected[0]], prompt.spans)
    print("fused inputs_embeds ", fused.shape)

    # From here on a language model reads vectors and does not care where they came from.
    positions = torch.arange(fused.shape[1]).unsqueeze(0)
    hidden = model.language_model.forward(fused, position_ids=positions)
    print("last_hidden_state   ", hidden.shape)

    # The same in two calls.
    batch = model.embed_prompts([prompt], [[prepared]])
    print("as model(batch)     ", torch.allclose(model(batch), hidden, atol=1e-4))


if __name__ == "__main__":
    main()
