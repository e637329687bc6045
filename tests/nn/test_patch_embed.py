from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ait.nn.patch_embed import PatchEmbed
from tests.gradients import assert_close_with_gradients


def test_patches_come_row_by_row_and_flatten_row_column_channel() -> None:
    embed = PatchEmbed(img_size=(4, 6), patch_size=2, in_chans=3, embed_dim=8)
    embed.proj = torch.nn.Identity()
    embed._check = lambda images: None
    # The pixel at (row, column, channel) holds 100 * row + 10 * column + channel.
    row, column, channel = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(3), indexing="ij")
    images = (100 * row + 10 * column + channel).permute(2, 0, 1).unsqueeze(0).float()
    patches = embed(images)
    assert patches.shape == (1, 6, 12)
    assert patches[0, 0].tolist() == [0, 1, 2, 10, 11, 12, 100, 101, 102, 110, 111, 112]
    assert patches[0, :, 0].tolist() == [0, 20, 40, 200, 220, 240]


def test_embedding_is_norm_linear_norm_with_gradients() -> None:
    torch.manual_seed(0)
    embed = PatchEmbed(img_size=4, patch_size=2, in_chans=1, embed_dim=8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in embed.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    pixels = torch.stack([images[:, 0, r : r + 2, c : c + 2].flatten(1) for r in (0, 2) for c in (0, 2)], dim=1)
    first, linear, last = embed.proj.norm_in, embed.proj.linear, embed.proj.norm_out
    hidden = F.layer_norm(pixels, (4,), first.weight, first.bias, 1e-5) @ linear.weight.T + linear.bias
    expected = F.layer_norm(hidden, (8,), last.weight, last.bias, 1e-5)
    assert_close_with_gradients(embed(images), expected, {"images": images, **dict(embed.named_parameters())})


def test_channels_last_and_strided_images_give_the_same_tokens() -> None:
    torch.manual_seed(0)
    embed, images = PatchEmbed(embed_dim=16), torch.randn(2, 3, 32, 64)[..., ::2]
    expected = embed(images.contiguous())
    assert torch.equal(embed(images), expected)
    assert torch.equal(embed(images.contiguous(memory_format=torch.channels_last)), expected)


def test_img_size_may_be_a_pair() -> None:
    embed = PatchEmbed(img_size=(8, 12), patch_size=4, in_chans=1, embed_dim=16)
    assert (embed.grid_size, embed.num_patches) == ((2, 3), 6)
    assert embed(torch.zeros(0, 1, 8, 12)).shape == (0, 6, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"img_size": 30}, r"expected img_size divisible by patch_size=4, got \(30, 30\)"),
        ({"img_size": (32, 30)}, r"expected img_size divisible by patch_size=4, got \(32, 30\)"),
        ({"img_size": (32, 32, 3)}, r"expected img_size as one number or \(height, width\), got \(32, 32, 3\)"),
        ({"img_size": 32.0}, r"expected img_size to be an integer, got 32.0"),
        ({"img_size": 0}, r"expected img_size >= 1, got 0"),
        ({"patch_size": 0}, r"expected patch_size >= 1, got 0"),
        ({"patch_size": (4, 4)}, r"expected patch_size to be an integer, got \(4, 4\)"),
        ({"in_chans": True}, r"expected in_chans to be an integer, got True"),
        ({"embed_dim": -1}, r"expected embed_dim >= 1, got -1"),
    ],
)
def test_bad_sizes_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match="PatchEmbed: " + message):
        PatchEmbed(**arguments)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"images of shape \(B, 3, 32, 32\), got \(3, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32), r"images of shape \(B, 3, 32, 32\), got \(2, 1, 32, 32\)"),
        (torch.zeros(2, 3, 32, 28), r"images of shape \(B, 3, 32, 32\), got \(2, 3, 32, 28\)"),
        (torch.zeros(2, 32, 32, 3), r"images of shape \(B, 3, 32, 32\), got \(2, 32, 32, 3\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"normalised floating-point images .*, got torch.uint8"),
        (
            torch.zeros(2, 3, 32, 32, dtype=torch.float64),
            r"images of the model's dtype, torch.float32, got .*64",
        ),
        (torch.zeros(2, 3, 32, 32, device="meta"), r"images on the model's device, cpu, got .*meta"),
    ],
)
def test_images_of_another_kind_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match="PatchEmbed: expected " + message):
        PatchEmbed(embed_dim=16)(images)


def test_something_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected images as a torch.Tensor, got list"):
        PatchEmbed(embed_dim=16)([[0.0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_takes_the_dtypes_that_it_casts_and_refuses_the_rest(dtype: torch.dtype) -> None:
    embed = PatchEmbed(embed_dim=16)
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(torch.zeros(2, 3, 32, 32, dtype=dtype)).shape == (2, 64, 16)
        with pytest.raises(ValueError, match="images of the model's dtype"):
            embed(torch.zeros(2, 3, 32, 32, dtype=torch.float64))
