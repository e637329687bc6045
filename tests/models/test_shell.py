from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ait.models import TransformerShell, VisionTransformer
from ait.nn.patch_embed import TokenEmbed
from tests.gradients import assert_close_with_gradients


def small_model(**options: object) -> VisionTransformer:
    """Two blocks in float64, with every parameter off its initial value (LayerNorms start as the identity)."""
    torch.manual_seed(0)
    sizes = dict(depth=2, embed_dim=12, head_dim=6, img_size=(4, 6), patch_size=2, in_chans=2, num_classes=3)
    model = VisionTransformer(**{**sizes, "dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def direct_embed(x: Tensor, embed: TokenEmbed) -> Tensor:
    x = F.layer_norm(x, x.shape[-1:], embed.norm_in.weight, embed.norm_in.bias)
    x = x @ embed.linear.weight.T + embed.linear.bias
    return F.layer_norm(x, x.shape[-1:], embed.norm_out.weight, embed.norm_out.bias)


def direct_features(model: VisionTransformer, images: Tensor, question: Tensor | None) -> Tensor:
    """DESIGN section 1 in a few lines: patches of 2 x 2 pixels with the channel fastest, blocks of two residuals."""
    height, width = images.shape[2:]
    corners = [(row, column) for row in range(0, height, 2) for column in range(0, width, 2)]
    patches = [images[:, :, r : r + 2, c : c + 2].permute(0, 2, 3, 1).flatten(1) for r, c in corners]
    x = direct_embed(torch.stack(patches, dim=1), model.patch_embed.proj)
    if question is not None:
        x = torch.cat([direct_embed(question, model.question_embed)[:, None], x], dim=1)
    for block in model.blocks:
        normed = F.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias)
        heads = (normed @ block.attn.qkv.weight.T).unflatten(-1, (3, 2, 6))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        pooled = torch.softmax(query @ key.mT / 6**0.5, dim=-1) @ value
        x = x + pooled.transpose(1, 2).flatten(2) @ block.attn.proj.weight.T + block.attn.proj.bias
        normed = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias)
        hidden = F.gelu(normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return x


def direct_logits(model: VisionTransformer, features: Tensor) -> Tensor:
    flat = features.flatten(1)
    flat = F.layer_norm(flat, flat.shape[-1:], model.head_norm.weight, model.head_norm.bias)
    return flat @ model.head.weight.T + model.head.bias


@pytest.mark.parametrize("question_dim", [None, 18])
def test_logits_features_and_every_gradient_equal_a_direct_evaluation(question_dim: int | None) -> None:
    model = small_model(question_dim=question_dim)
    leaves = {"images": torch.randn(3, 2, 4, 6, dtype=torch.float64, requires_grad=True)}
    if question_dim:
        leaves["question"] = torch.randn(3, 18, dtype=torch.float64, requires_grad=True)
    inputs = tuple(leaves.values())
    features = direct_features(model, leaves["images"], leaves.get("question"))
    assert features.shape == (3, 6 + bool(question_dim), 12)

    tokens_and_blocks = {name: value for name, value in model.named_parameters() if not name.startswith("head")}
    assert_close_with_gradients(model.forward_features(*inputs), features, leaves | tokens_and_blocks)
    features = direct_features(model, leaves["images"], leaves.get("question"))
    assert_close_with_gradients(model(*inputs), direct_logits(model, features), leaves | dict(model.named_parameters()))


def test_forward_is_head_of_features_and_pre_logits_is_what_the_last_linear_reads() -> None:
    model, images = small_model(), torch.randn(3, 2, 4, 6, dtype=torch.float64)
    features = model.forward_features(images)
    assert torch.equal(model.forward_head(features), model(images))
    assert torch.equal(model.head(model.forward_head(features, pre_logits=True)), model(images))


def test_widths_are_named_as_in_timm() -> None:
    model = small_model()
    assert model.embed_dim == model.num_features == 12
    assert (model.num_classes, model.num_tokens) == (3, 6)


def test_reset_classifier_replaces_the_last_linear_alone() -> None:
    model, images = small_model(), torch.randn(3, 2, 4, 6, dtype=torch.float64)
    flat = model.forward_head(model.forward_features(images), pre_logits=True)
    model.reset_classifier(5)
    assert model.num_classes == 5
    assert model.head.weight.shape == (5, 72) and model.head.weight.dtype == torch.float64
    assert model(images).shape == (3, 5)
    model.reset_classifier(0)
    assert torch.equal(model(images), flat)
    for wrong in (-1, 2.0, True):
        with pytest.raises(ValueError, match="VisionTransformer: expected num_classes"):
            model.reset_classifier(wrong)


def test_a_block_factory_is_called_once_a_layer_with_the_number_of_tokens() -> None:
    called_with: list[int] = []

    def make_block(num_tokens: int) -> nn.Module:
        called_with.append(num_tokens)
        return nn.Identity()

    model = TransformerShell(make_block, depth=3, embed_dim=8, img_size=8, patch_size=4, question_dim=18)
    assert called_with == [5, 5, 5]
    assert model(torch.zeros(2, 3, 8, 8), torch.zeros(2, 18)).shape == (2, 10)


def test_torch_manual_seed_suffices_to_make_a_model_again() -> None:
    first, second = small_model().state_dict(), small_model().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_linears_and_norms_start_as_pytorch_initialises_them() -> None:
    torch.manual_seed(3)
    model = VisionTransformer(depth=1, embed_dim=64, img_size=8, in_chans=1, num_classes=2)
    torch.manual_seed(3)
    expected = [
        nn.Linear(16, 64),
        nn.Linear(64, 192, bias=False),
        nn.Linear(64, 64),
        nn.Linear(64, 256),
        nn.Linear(256, 64),
        nn.Linear(256, 2),
    ]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear, fresh in zip(linears, expected, strict=True):
        assert torch.equal(linear.weight, fresh.weight)
        assert linear.bias is None or torch.equal(linear.bias, fresh.bias)
    for norm in (module for module in model.modules() if isinstance(module, nn.LayerNorm)):
        assert norm.eps == 1e-5 and bool((norm.weight == 1).all()) and bool((norm.bias == 0).all())


IMAGES = torch.zeros(3, 2, 4, 6, dtype=torch.float64)
QUESTION = torch.zeros(3, 18, dtype=torch.float64)


@pytest.mark.parametrize(
    ("question_dim", "question", "error", "message"),
    [
        (18, None, ValueError, r"a question of shape \(3, 18\), got None"),
        (None, QUESTION, ValueError, r"no question \(the model was made with question_dim=None\), got \(3, 18\)"),
        (18, QUESTION[:2], ValueError, r"a question of shape \(3, 18\), got \(2, 18\)"),
        (18, QUESTION[:, :11], ValueError, r"a question of shape \(3, 18\), got \(3, 11\)"),
        (18, QUESTION[0], ValueError, r"a question of shape \(3, 18\), got \(18,\)"),
        (18, QUESTION.float(), ValueError, r"question of the model's dtype, torch.float64, got torch.float32"),
        (18, QUESTION.long(), ValueError, r"question of the model's dtype, torch.float64, got torch.int64"),
        (18, QUESTION.to("meta"), ValueError, r"question on the model's device, cpu, got meta"),
        (18, [0.0] * 18, TypeError, r"the question as a torch.Tensor, got list"),
    ],
)
def test_a_missing_unwanted_or_wrong_question_is_refused(
    question_dim: int | None, question: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match="VisionTransformer: expected " + message):
        small_model(question_dim=question_dim)(IMAGES, question)


def test_bad_images_are_refused_by_the_model() -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(B, 2, 4, 6\), got \(3, 2, 6, 4\)"):
        small_model()(IMAGES.transpose(2, 3))
    with pytest.raises(ValueError, match=r"expected normalised floating-point images .*, got torch.uint8"):
        small_model()(IMAGES.to(torch.uint8))


@pytest.mark.parametrize("shape", [(3, 7, 12), (3, 6, 11), (3, 72)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"VisionTransformer: expected features of shape \(B, 6, 12\), got \(3, "):
        small_model().forward_head(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth >= 1, got 0"),
        ({"num_classes": -1}, "num_classes >= 1, got -1"),
        ({"question_dim": 0}, "question_dim >= 1, got 0"),
        ({"embed_dim": 100, "head_dim": 64}, "dim divisible by head_dim=64, got 100"),
        ({"img_size": 31}, r"img_size divisible by patch_size=2, got \(31, 31\)"),
        ({"hidden_dim": 0}, "hidden_dim >= 1, got 0"),
        ({"attention": "no"}, "attention to be True or False, got 'no'"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model(**arguments)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'drop_path'"):
        small_model(drop_path=0.1)
