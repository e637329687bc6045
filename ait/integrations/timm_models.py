"""The models of ``ait`` in timm's registry. Importing this module registers them.

::

    import timm
    import ait.integrations.timm_models

    timm.list_models("ait_*")
    model = timm.create_model("ait_tiny_patch4_32.cifar10", pretrained=True)
    features = timm.create_model("ait_base_patch16_224", features_only=True, out_indices=(3, 7, 11))

``ait_vit_*`` is the Vision Transformer of the comparison, with the same patches and head. Options are those of
:func:`ait.create_model` and of :class:`~ait.integrations.timm_interface.TimmInterface`; state dicts pass between the
two. Add ``ait.balance_loss(model)`` to the training loss.
"""

from __future__ import annotations

from typing import Any

try:
    import timm.models._features as timm_features
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
except ImportError as error:
    raise ImportError(
        f"ait.integrations.timm_models: cannot import timm ({error}); timm 0.9.16 or later is needed: "
        "pip install 'associative-transformer[timm]'",
        name="timm",
    ) from error
from torch import nn

from ait.integrations.timm_interface import TimmAssociativeTransformer, TimmVisionTransformer
from ait.models.pretrained import WEIGHTS_DIR, pretrained_config
from ait.models.registry import _MODELS

# timm's register_model adds the entry points.
__all__: list[str] = []


def _cfg(**changes: Any) -> dict[str, Any]:
    """ImageNet, 224 pixels. The head's shape depends on the image size, hence ``fixed_input_size``."""
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": None,
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2309.12862",
        **changes,
    }


def _cifar10_cfg(weights: str | None = None) -> dict[str, Any]:
    """CIFAR-10, 32 pixels; ``weights`` is one of :func:`ait.list_pretrained`."""
    config = pretrained_config(weights or "ait_tiny.cifar10")
    cfg = _cfg(num_classes=len(config.classes), input_size=(3, 32, 32), crop_pct=1.0, mean=config.mean, std=config.std)
    if weights is not None:
        file = WEIGHTS_DIR / f"{weights.replace('.', '-')}.safetensors"
        cfg |= {"file": str(file), "custom_load": True, "label_names": config.classes}
    return cfg


default_cfgs = generate_default_cfgs(
    {
        "ait_tiny_patch4_32.cifar10": _cifar10_cfg("ait_tiny.cifar10"),
        "ait_small_patch4_32": _cifar10_cfg(),
        "ait_medium_patch4_32": _cifar10_cfg(),
        "ait_base_patch4_32": _cifar10_cfg(),
        "ait_small_patch16_224": _cfg(),
        "ait_medium_patch16_224": _cfg(),
        "ait_base_patch16_224": _cfg(),
        "ait_vit_tiny_patch4_32.cifar10": _cifar10_cfg("vit_tiny.cifar10"),
        "ait_vit_small_patch4_32": _cifar10_cfg(),
        "ait_vit_medium_patch4_32": _cifar10_cfg(),
        "ait_vit_base_patch4_32": _cifar10_cfg(),
        "ait_vit_small_patch16_224": _cfg(),
        "ait_vit_medium_patch16_224": _cfg(),
        "ait_vit_base_patch16_224": _cfg(),
    }
)


def _create(variant: str, name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Builds ``variant`` through timm, from the model that :func:`ait.create_model` knows as ``name``."""
    if options.get("features_only") and not hasattr(timm_features, "FeatureGetterNet"):
        raise RuntimeError(f"{variant}: features_only needs timm 1.0 or later; forward_intermediates works without")
    options = {**_MODELS[name].defaults, **options}
    model: nn.Module = build_model_with_cfg(
        TimmAssociativeTransformer if name.startswith("ait_") else TimmVisionTransformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": min(3, options["depth"]), "feature_cls": "getter"},
        **options,
    )
    return model


@register_model
def ait_tiny_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``ait_tiny`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_tiny_patch4_32", "ait_tiny", pretrained, {"patch_size": 4, **options})


@register_model
def ait_small_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``ait_small`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_small_patch4_32", "ait_small", pretrained, {"patch_size": 4, **options})


@register_model
def ait_medium_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``ait_medium`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_medium_patch4_32", "ait_medium", pretrained, {"patch_size": 4, **options})


@register_model
def ait_base_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``ait_base`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_base_patch4_32", "ait_base", pretrained, {"patch_size": 4, **options})


@register_model
def ait_small_patch16_224(pretrained: bool = False, **options: Any) -> nn.Module:
    """``ait_small`` on 224 x 224 pixels, with patches of 16."""
    return _create("ait_small_patch16_224", "ait_small", pretrained, {"patch_size": 16, **options})


@register_model
def ait_medium_patch16_224(pretrained: bool = False, **options: Any) -> nn.Module:
    """``ait_medium`` on 224 x 224 pixels, with patches of 16."""
    return _create("ait_medium_patch16_224", "ait_medium", pretrained, {"patch_size": 16, **options})


@register_model
def ait_base_patch16_224(pretrained: bool = False, **options: Any) -> nn.Module:
    """``ait_base`` on 224 x 224 pixels, with patches of 16."""
    return _create("ait_base_patch16_224", "ait_base", pretrained, {"patch_size": 16, **options})


@register_model
def ait_vit_tiny_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``vit_tiny`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_vit_tiny_patch4_32", "vit_tiny", pretrained, {"patch_size": 4, **options})


@register_model
def ait_vit_small_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``vit_small`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_vit_small_patch4_32", "vit_small", pretrained, {"patch_size": 4, **options})


@register_model
def ait_vit_medium_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``vit_medium`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_vit_medium_patch4_32", "vit_medium", pretrained, {"patch_size": 4, **options})


@register_model
def ait_vit_base_patch4_32(pretrained: bool = False, **options: Any) -> nn.Module:
    """``vit_base`` on 32 x 32 pixels, with patches of 4."""
    return _create("ait_vit_base_patch4_32", "vit_base", pretrained, {"patch_size": 4, **options})


@register_model
def ait_vit_small_patch16_224(pretrained: bool = False, **options: Any) -> nn.Module:
    """``vit_small`` on 224 x 224 pixels, with patches of 16."""
    return _create("ait_vit_small_patch16_224", "vit_small", pretrained, {"patch_size": 16, **options})


@register_model
def ait_vit_medium_patch16_224(pretrained: bool = False, **options: Any) -> nn.Module:
    """``vit_medium`` on 224 x 224 pixels, with patches of 16."""
    return _create("ait_vit_medium_patch16_224", "vit_medium", pretrained, {"patch_size": 16, **options})


@register_model
def ait_vit_base_patch16_224(pretrained: bool = False, **options: Any) -> nn.Module:
    """``vit_base`` on 224 x 224 pixels, with patches of 16."""
    return _create("ait_vit_base_patch16_224", "vit_base", pretrained, {"patch_size": 16, **options})
