"""Vision transformer of CLIP and SigLIP, with their parameter names.

    pixel_values [N, 3, H, W] -> patches (+ class token) + positions -> layers -> features [N, P, E]

Only the layers up to the selected hidden state are computed; the others are kept, so that a
checkpoint is saved as it was loaded.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lapilli.config.model import VisionConfig
from lapilli.errors import ConfigError
from lapilli.nn.attention import attend_all
from lapilli.nn.mlp import MLP
from lapilli.shapes import Float, Tensor


class VisionEmbeddings(nn.Module):
    """Patches as vectors, with positions, and CLIP's class token in front."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width, clip = config.hidden_size, config.family == "clip"
        patches = config.grid.rows * config.grid.columns
        if clip:
            self.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, config.patch_size, config.patch_size, bias=not clip
        )
        self.position_embedding = nn.Embedding(patches + int(clip), width)
        self.has_class_token = clip

    def forward(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P E"]:
        """Return the input of the first layer."""
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        x = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [N, P, E]
        if self.has_class_token:
            token = self.class_embedding.to(x.dtype).expand(len(x), 1, -1)
            x = torch.cat((token, x), dim=1)
        out: Tensor = x + self.position_embedding.weight
        return out


class VisionAttention(nn.Module):
    """Attention of every patch to every patch of its tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self.num_heads = config.num_heads

    def forward(self, x: Float[Tensor, "N P E"]) -> Float[Tensor, "N P E"]:
        """Return the block's update, without the residual."""
        q, k, v = (
            project(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(attend_all(q, k, v).transpose(1, 2).flatten(2))
        return out


class VisionLayer(nn.Module):
    """Attention and MLP, each with its norm before and its residual around."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.intermediate_size, activation=config.activation)

    def forward(self, x: Float[Tensor, "N P E"]) -> Float[Tensor, "N P E"]:
        """Return the hidden states after this layer."""
        x = x + self.self_attn(self.layer_norm1(x))
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class VisionEncoder(nn.Module):
    """The layers, which the files call `encoder`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_layers))


class VisionStack(nn.Module):
    """The module that the files call `vision_model`; `pre_layrnorm` is CLIP's own spelling."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        if config.family == "clip":
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class VisionTransformer(nn.Module):
    """A tower that returns one hidden state of the patches.

    `feature_layer` counts hidden states as LLaVA does: 0 is the input of the first layer, i the
    output of layer i, negative numbers from the end; `post_layernorm` is never applied, because
    hidden states are taken before it.

    Source: LLaVA clip_encoder.py feature_select; Hugging Face CLIPVisionModel and
    SiglipVisionModel with output_hidden_states.

    Raises:
        ConfigError: heads that do not divide the width, or no such hidden state.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.hidden_size % config.num_heads:
            raise ConfigError(
                f"vision hidden_size {config.hidden_size} is not a multiple of "
                f"num_heads {config.num_heads}"
            )
        states = config.num_layers + 1
        if not -states <= config.feature_layer < states:
            raise ConfigError(
                f"feature_layer {config.feature_layer} does not exist: a tower of "
                f"{config.num_layers} layers has hidden states 0 to {config.num_layers}, "
                f"or {-states} to -1"
            )
        self.config = config
        self.vision_model = VisionStack(config)
        self.gradient_checkpointing = False

    @property
    def num_used_layers(self) -> int:
        """Return the number of layers that the selected hidden state needs."""
        return self.config.feature_layer % (self.config.num_layers + 1)

    def forward(self, pixel_values: Float[Tensor, "N C H W"]) -> Float[Tensor, "N P E"]:
        """Return the features of every tile, [N, VisionConfig.num_patches, E].

        Raises:
            ConfigError: tiles of another size than the tower was made for.
        """
        side = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (side, side):
            height, width = pixel_values.shape[-2:]
            raise ConfigError(
                f"the vision tower reads tiles of {side}x{side} pixels, found {width}x{height}"
            )
        stack = self.vision_model
        x: Tensor = stack.embeddings(pixel_values)
        if self.config.family == "clip":
            x = stack.pre_layrnorm(x)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for layer in stack.encoder.layers[: self.num_used_layers]:
            x = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        drops_class_token = self.config.family == "clip" and self.config.feature_select == "patch"
        if drops_class_token or self.config.feature_select == "drop_first":
            x = x[:, 1:]
        return x
