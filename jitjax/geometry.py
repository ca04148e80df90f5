"""What fixes the shapes of a JiT: the published sizes by name, and the numbers that a config replaces. Imports no JAX."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from jitjax.errors import UserError
from jitjax.flops import CHANNELS
from jitjax.settings import Model

LARGEST = 1e10  # depth x width^2, nearly a hundred times JiT-G's

# depth, width, heads, bottleneck, context tokens, first block that sees them. B to G are published (arXiv 2511.13720,
# Tables 8 and 9); S and below are ours, for laptops, tests and small data.
SIZES: dict[str, dict[str, int]] = {
    "nano": dict(depth=4, width=96, heads=3, bottleneck=32, context_length=4, context_start=1),
    "Ti": dict(depth=6, width=192, heads=3, bottleneck=64, context_length=8, context_start=2),
    "S": dict(depth=12, width=384, heads=6, bottleneck=128, context_length=32, context_start=4),
    "B": dict(depth=12, width=768, heads=12, bottleneck=128, context_length=32, context_start=4),
    "L": dict(depth=24, width=1024, heads=16, bottleneck=128, context_length=32, context_start=8),
    "H": dict(depth=32, width=1280, heads=16, bottleneck=256, context_length=32, context_start=10),
    "G": dict(depth=40, width=1664, heads=16, bottleneck=256, context_length=32, context_start=10),
}


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Everything that fixes the shapes of a JiT. Sizes in pixels (`image_size`, `patch_size`), tokens or features."""

    image_size: int
    patch_size: int
    depth: int
    width: int
    heads: int
    bottleneck: int
    context_length: int
    context_start: int
    num_classes: int
    mlp_ratio: float = 4.0
    attn_dropout: float = 0.0
    proj_dropout: float = 0.0
    class_start: int = 0  # first block that is conditioned on the class; published: 0, with the auxiliary class loss later
    class_head: bool = False  # what is in front of it tells the class of the image, for that loss: part of a run alone

    def __post_init__(self):
        if self.patch_size <= 0 or self.image_size % self.patch_size:
            raise UserError(
                f"--config.data.image_size={self.image_size} is not a multiple of the patch size {self.patch_size}: "
                f"use {max(1, round(self.image_size / max(1, self.patch_size))) * self.patch_size} or another JiT-*/patch"
            )
        if self.heads <= 0 or self.width % self.heads or self.head_dim % 4:
            raise UserError(
                f"--config.model.width={self.width} with --config.model.heads={self.heads}: the width must be a "
                "multiple of 4 x heads (RoPE rotates pairs along two axes)"
            )
        if self.width % 4:
            raise UserError(f"--config.model.width={self.width} must be a multiple of 4 (sin-cos positions)")
        if self.depth * self.width**2 > LARGEST:
            raise UserError(
                f"--config.model.depth={self.depth} with --config.model.width={self.width} is a model of about "
                f"{18 * self.depth * self.width**2:.1e} parameters, beyond what this trainer is for: use smaller ones"
            )
        if self.mlp_hidden < 1:
            raise UserError(
                f"--config.model.mlp_ratio={self.mlp_ratio} with --config.model.width={self.width} leaves the MLP no hidden "
                "feature: use a larger one, e.g. 4"
            )
        if self.context_length and not 0 <= self.context_start < self.depth:
            raise UserError(
                f"--config.model.context_start={self.context_start} must lie in [0, depth={self.depth}): it is the first "
                "block that sees the in-context class tokens"
            )
        if self.context_length and self.context_start < self.class_start:
            raise UserError(
                f"class_start={self.class_start}: context tokens show the class from block {self.context_start} on already"
            )

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Image tokens (context tokens not counted): what "tokens per second" counts."""
        return self.grid**2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mlp_hidden(self) -> int:
        """SwiGLU hidden width, truncated as published: int(int(width * ratio) * 2 / 3), e.g. 2730 for JiT-L."""
        return int(int(self.width * self.mlp_ratio) * 2 / 3)

    @property
    def patch_values(self) -> int:
        return self.patch_size**2 * CHANNELS


def make_geometry(name: str, image_size: int, num_classes: int, **overrides: Any) -> Geometry:
    """The geometry of a model by name, e.g. "JiT-B/4"; `overrides` replace single numbers (None leaves them).

    Raises:
      UserError: unknown name, unknown override, or numbers that do not fit each other.
    """
    match = re.fullmatch(r"JiT-([A-Za-z]+)/(\d+)", name)
    if not match or match[1] not in SIZES:
        known = ", ".join(f"JiT-{size}/<patch>" for size in SIZES)
        raise UserError(f"--config.model.name={name!r} is unknown: use one of {known}, e.g. JiT-B/4")
    numbers = dict(SIZES[match[1]], patch_size=int(match[2]), image_size=image_size, num_classes=num_classes)
    fields = {field.name for field in dataclasses.fields(Geometry)}
    for key, value in overrides.items():
        if key not in fields:
            raise UserError(f"unknown geometry {key!r}: known are {', '.join(sorted(fields))}")
        if value is not None:
            numbers[key] = value
    return Geometry(**numbers)


def geometry_of(model: Model, image_size: int, num_classes: int) -> Geometry:
    """The geometry that the model's settings describe, for images of `image_size` pixels and so many classes.

    Raises:
      UserError: see `make_geometry`; a class loss without labels or without a block in front of the class.
    """
    fields = {field.name for field in dataclasses.fields(Geometry)} - {"num_classes"}
    overrides = {name: value for name, value in dataclasses.asdict(model).items() if name in fields}
    geometry = make_geometry(model.name, image_size, num_classes, **overrides)
    if not model.class_loss:
        return geometry
    if not model.class_conditional or not 0 < geometry.context_start < geometry.depth:
        starts = f"from 1 to {geometry.depth - 1}" if geometry.depth > 1 else "from 1 on, so --config.model.depth of 2 or more"
        raise UserError(
            f"--config.model.class_loss={model.class_loss:g} needs --config.model.class_conditional=True and "
            f"--config.model.context_start {starts}: the blocks in front of it learn to tell the class"
        )
    return dataclasses.replace(geometry, class_start=geometry.context_start, class_head=True)
