"""From images to tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ait.ops._checks import check_positive_int, op_error


class TokenEmbed(nn.Module):
    """``LN(in_features) -> Linear -> LN(dim)``: how patches and questions become tokens; LayerNorm eps 1e-5.

    Args:
        in_features: width of what is embedded.
        dim: width ``E`` of a token.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(in_features, device=device, dtype=dtype)
        self.linear = nn.Linear(in_features, dim, device=device, dtype=dtype)
        self.norm_out = nn.LayerNorm(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., E)``."""
        tokens: Tensor = self.norm_out(self.linear(self.norm_in(x)))
        return tokens


class PatchEmbed(nn.Module):
    """Cuts images into square patches and embeds each with :class:`TokenEmbed`.

    Patches come row by row. A patch is flattened ``(row, column, channel)``, channel fastest. No positional
    embedding: what follows tells positions apart by the place in the flattened head.

    Args:
        img_size: height and width in pixels, or one number for both; each a multiple of ``patch_size``.
        patch_size: side ``p`` of a patch in pixels.
        in_chans: channels ``C``.
        embed_dim: width ``E`` of a token.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: a size is no positive integer, or ``patch_size`` does not divide ``img_size``.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 32,
        patch_size: int = 4,
        in_chans: int = 3,
        embed_dim: int = 768,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        height, width = _pair(img_size)
        for argument, value in dict(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim).items():
            check_positive_int("PatchEmbed", argument, value)
        if height % patch_size or width % patch_size:
            raise op_error("PatchEmbed", f"img_size divisible by patch_size={patch_size}", (height, width))
        self.img_size = (height, width)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid_size = (height // patch_size, width // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = TokenEmbed(patch_size * patch_size * in_chans, embed_dim, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Embeds a batch.

        Args:
            images: ``(B, C, H, W)``, normalised, in the dtype of the parameters (any float dtype under autocast).

        Returns:
            ``(B, N, E)``, ``N`` patches an image.

        Raises:
            TypeError: ``images`` is no tensor.
            ValueError: ``images`` has another shape, dtype or device.
        """
        self._check(images)
        batch, side, (rows, columns) = images.shape[0], self.patch_size, self.grid_size
        grid = images.reshape(batch, self.in_chans, rows, side, columns, side)
        patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, side * side * self.in_chans)
        tokens: Tensor = self.proj(patches)
        return tokens

    def extra_repr(self) -> str:
        return f"img_size={self.img_size}, patch_size={self.patch_size}, in_chans={self.in_chans}"

    def _check(self, images: Tensor) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"PatchEmbed: expected images as a torch.Tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1:] != (self.in_chans, *self.img_size):
            shape = f"(B, {self.in_chans}, {self.img_size[0]}, {self.img_size[1]})"
            raise op_error("PatchEmbed", f"images of shape {shape}", tuple(images.shape))
        if not images.is_floating_point():
            expected = "normalised floating-point images (of uint8 pixels: divide by 255, less the mean, over the std)"
            raise op_error("PatchEmbed", expected, images.dtype)
        check_like_parameters("PatchEmbed", "images", images, self.proj.linear.weight)


def check_like_parameters(name: str, argument: str, value: Tensor, weight: Tensor) -> None:
    """Checks that an input has the device and the dtype of the parameters; autocast takes any dtype that it casts."""
    if value.device != weight.device:
        raise op_error(name, f"{argument} on the model's device, {weight.device}", value.device)
    castable = value.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if value.dtype != weight.dtype and not (castable and torch.is_autocast_enabled(weight.device.type)):
        raise op_error(name, f"{argument} of the model's dtype, {weight.dtype}", value.dtype)


def _pair(img_size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(img_size) if isinstance(img_size, (tuple, list)) else (img_size, img_size)
    if len(pair) != 2:
        raise op_error("PatchEmbed", "img_size as one number or (height, width)", img_size)
    for value in pair:
        check_positive_int("PatchEmbed", "img_size", value)
    return pair
