"""Putting workspaces into a model that others built, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from torch import nn

from ait.integrations.inserted import CHILD_NAME, BlockHooks, InsertedLayer, InsertedWorkspace
from ait.integrations.planning import Plan, Planned, plan_insertion, second_half
from ait.ops._checks import op_error

Model = TypeVar("Model", bound=nn.Module)

CONFIG_ENTRY = "ait_workspace"  # of a transformers config


def insert_workspace(
    model: Model,
    layers: Literal["all"] | Iterable[int] | slice = "all",
    *,
    mode: Literal["wrap", "parallel", "replace"] = "wrap",
    prefix_tokens: Literal["in", "out"] | int = "in",
    **options: Any,
) -> Model:
    """Puts a global workspace into blocks of a ViT or a text encoder, in place.

    Blocks are found by looking at the model, not by its name: a member of a list of modules with an ``mlp`` (or
    ``ffn``, ``feed_forward``, ``intermediate`` and ``output``) of its own, as in timm, torchvision and transformers.
    Widths are read from each MLP, so they may differ from stage to stage. With ``y = mlp(x)``, a block gets

    - ``"wrap"``: ``y + g * retrieve(LN(y))``;
    - ``"parallel"``: ``y + g * retrieve(LN(x))``;
    - ``"replace"``: the published :class:`ait.GlobalWorkspaceLayer` with its own ``fc1, fc2``; the block's MLP is gone.

    In the first two, ``g`` is one number a layer, 0 at first: the model's outputs stay the same, bit for bit. The
    host's modules and the names in its state dict stay as they are, too; each block gains one child,
    ``global_workspace``, that a forward hook calls. So the host's checkpoints, adapters and learning rates by layer
    still fit. A host whose parameters are frozen (``requires_grad=False``) is welcome: they stay frozen, and the
    workspaces learn.

    What padding the model is told about (``attention_mask`` of transformers, ``patch_valid`` of timm) never writes
    into the memory. In transformers models the arguments are noted in ``model.config``; see :func:`ait.with_workspace`
    for ``from_pretrained``.

    Insert before ``torch.compile``, DistributedDataParallel and the optimizer.

    Args:
        model: the host.
        layers: ``"all"``, or numbers of blocks in forward order (negative ones count from the end), or a slice.
        mode: see above.
        prefix_tokens: whether class and register tokens compete with the others for the memory. ``"out"``: they only
            read it. An integer says that so many first tokens of each image stay out, for hosts that do not tell.
        **options: of :class:`ait.GlobalWorkspace` (in ``"replace"`` of :class:`ait.GlobalWorkspaceLayer`):
            ``num_slots``, ``top_k_ratio``, ``generator``, and so on. Device and dtype are those of each MLP.
            ``write_dropout`` is 0 by default, except in ``"replace"``: an open or closed gate draws no random numbers
            of the host's own dropout.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: an argument is not as above; no block was found; a chosen one has no place for a workspace (fused
            or parallel MLP, mixture of experts) or is causal (a shared memory would show tokens their future); the
            model has a workspace, is wrapped (DataParallel and its like), compiled, quantised, or a traced, scripted,
            exported or (by ``torch.jit.freeze``) frozen program.
            The model is as it was.

    Example:
        >>> vit = timm.create_model("vit_base_patch16_224", pretrained=True)
        >>> ait.insert_workspace(vit, layers=slice(6, None))
        >>> print(ait.workspaces(vit).summary())
    """
    carry_out(model, plan_insertion("insert_workspace", model, layers, mode, prefix_tokens, options))
    return model


def remove_workspace(model: Model) -> Model:
    """Takes out what :func:`ait.insert_workspace` put in: the host computes what its own modules compute.

    Args:
        model: a host with workspaces in mode ``"wrap"`` or ``"parallel"``.

    Returns:
        ``model`` itself.

    Raises:
        ValueError: there is none, or one cannot be taken out (in mode ``"replace"`` the host's MLP is gone; a model
            that was built with workspaces has no other form). The model is as it was.
    """
    name = "remove_workspace"
    if not isinstance(model, nn.Module):
        raise op_error(name, "a torch.nn.Module", type(model).__name__)
    owners: list[tuple[nn.Module, InsertedWorkspace]] = []
    for path, module in model.named_modules():
        if not isinstance(module, (InsertedWorkspace, InsertedLayer)):
            continue
        if isinstance(module, InsertedLayer) or module.insertion is None:
            got = f"{path!r}, which took the place of a part of the host"
            raise op_error(name, "workspaces in mode 'wrap' or 'parallel', put in by ait.insert_workspace", got)
        block = model.get_submodule(path.rpartition(".")[0])
        if block._modules.get(CHILD_NAME) is not module:
            got = f"{path!r} inside {type(block).__name__}"
            raise op_error(name, "workspaces that peft has not wrapped (merge_and_unload() of its model unwraps)", got)
        owners.append((block, module))
    if not owners:
        raise op_error(name, "a model with workspaces put in by ait.insert_workspace", type(model).__name__)
    blocks = {id(block) for block, _ in owners}
    paddings = {id(module.mask.padding) for _, module in owners}
    for block, _ in owners:
        delattr(block, CHILD_NAME)
    for module in model.modules():
        _drop_hooks(module, blocks, paddings)
    if _has_config(model) and hasattr(model.config, CONFIG_ENTRY):
        delattr(model.config, CONFIG_ENTRY)
    return model


def carry_out(model: nn.Module, plan: Plan) -> None:
    """Changes ``model`` as planned; nothing here fails."""
    for planned in plan.workspaces:
        _attach(planned)
    for owner, padding in plan.paddings:
        owner.register_forward_pre_hook(padding.begin, with_kwargs=True)
        owner.register_forward_hook(padding.end)
    if _has_config(model):
        setattr(model.config, CONFIG_ENTRY, dict(plan.arguments))


def _attach(planned: Planned) -> None:
    block, place, module, _ = planned
    if isinstance(module, InsertedLayer):
        # In a pair, the second half may add the residual: it stays, without the linear layer in it.
        if place.is_split:
            second_half(place).dense = nn.Identity()
        setattr(block.module, place.input_path, module)
        return
    block.module.add_module(CHILD_NAME, module)
    hooks = BlockHooks(block.module)
    place.output_module.register_forward_hook(hooks.add_to_output, with_kwargs=True)
    if module.mode == "parallel" and place.is_split:
        place.input_module.register_forward_pre_hook(hooks.hold_input, with_kwargs=True)


def _drop_hooks(module: nn.Module, blocks: set[int], paddings: set[int]) -> None:
    """Drops the hooks for the workspaces of ``blocks`` and those of ``paddings``, both given by id."""
    for hooks, with_kwargs in (
        (module._forward_hooks, module._forward_hooks_with_kwargs),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()):
            owner = getattr(hook, "__self__", None)
            if id(owner) in paddings or (isinstance(owner, BlockHooks) and id(owner.block) in blocks):
                del hooks[key]
                with_kwargs.pop(key, None)


def _has_config(model: nn.Module) -> bool:
    """Whether ``model`` keeps a config that is saved beside its weights, as those of transformers do."""
    return hasattr(getattr(model, "config", None), "to_json_string")
