"""The tiny vision transformer of DeiT (Touvron et al., arXiv 2012.12877), with timm's state-dict keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdcompile.core.network import Network
from tdcompile.ir.saved_classes import saved_as
from tdcompile.support.options import Count

IMAGE, PATCH = 224, 16
EPSILON = 1e-6  # of the layer norms, as in DeiT; PyTorch's default is 1e-5


@saved_as("vit-tiny/attention", "tdcompile.models.vit_tiny:Attention")
class Attention(nn.Module):
    """Multi-head self-attention of plain linear layers, so that tracing sees each of them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(N, L, width)`` to tokens of the same shape."""
        qkv = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, L, width / heads)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


@saved_as("vit-tiny/mlp", "tdcompile.models.vit_tiny:Mlp")
class Mlp(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(N, L, width)`` to tokens of the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


@saved_as("vit-tiny/block", "tdcompile.models.vit_tiny:Block")
class Block(nn.Module):
    """Attention and MLP, each with a layer norm before it and a shortcut around it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(N, L, width)`` to tokens of the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


@saved_as("vit-tiny/patch-embed", "tdcompile.models.vit_tiny:PatchEmbed")
class PatchEmbed(nn.Module):
    """Strided convolution that maps square patches to tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, H, W)`` to tokens ``(N, H · W / 256, width)``."""
        tokens: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return tokens


@saved_as("vit-tiny/vision-transformer", "tdcompile.models.vit_tiny:VisionTransformer")
class VisionTransformer(nn.Module):
    """Vision transformer: patches and a class token pass through the blocks, and the class token is classified."""

    def __init__(self, width: int, heads: int, depth: int, num_classes: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (IMAGE // PATCH) ** 2, width))
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, 3, 224, 224)`` to logits ``(N, num_classes)``."""
        tokens = self.patch_embed(x)
        first = self.cls_token.expand(x.shape[0], -1, -1)
        tokens = self.blocks(torch.cat([first, tokens], dim=1) + self.pos_embed)
        logits: Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


@dataclass(frozen=True)
class ViTTiny(Network):
    """DeiT-Ti/16 for ImageNet: 12 blocks, 192 wide, 3 heads, 5.7 M parameters."""

    name: ClassVar[str] = "vit_tiny"
    input_shapes: ClassVar[tuple[tuple[int, ...], ...]] = ((3, IMAGE, IMAGE),)
    num_classes: Count = 1000

    def build(self) -> nn.Module:
        """Return the network in eval mode, randomly initialised."""
        return VisionTransformer(width=192, heads=3, depth=12, num_classes=self.num_classes).eval()
