"""Parameter-efficient fine-tuning: workspaces and the classifier learn, the backbone stands still."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ait.integrations.inserted import InsertedLayer, InsertedWorkspace
from ait.nn.control import workspaces_of
from ait.nn.workspace import GlobalWorkspace
from ait.ops._checks import op_error

NAME = "freeze_backbone"
# Where models without timm's get_classifier() keep their classifier: ait, torchvision, transformers.
HEADS = ("head", "heads", "fc", "classifier", "cls_classifier", "distillation_classifier", "score", "head_dist")
RECORD = "_ait_requires_grad_before"  # attribute of a frozen model


def freeze_backbone(model: nn.Module, frozen: bool = True, *, head: bool | str | nn.Module = True) -> None:
    """Leaves workspaces and the classifier trainable, and sets ``requires_grad=False`` on everything else.

    What learns: of an inserted workspace all (LayerNorm and gate; in mode ``"replace"`` the new feed-forward, too); of
    an ``ait`` model's :class:`ait.GlobalWorkspaceLayer` the workspace, not the feed-forward before it; the classifier
    that gives the logits, without the norms before it, which belong to the backbone. Parameters to which no gradient
    comes (the writer's in ``semantics="released"``) stay as they are made, and so do those that
    :func:`ait.freeze_memory` holds, in whatever order the two are called and undone.

    Adapters of ``peft`` (LoRA and others) are left alone. Since ``peft`` freezes all but its adapters, call this after
    it::

        ait.insert_workspace(vit)
        model = peft.get_peft_model(vit, peft.LoraConfig(r=16, target_modules=["attn.qkv", "attn.proj"]))
        ait.freeze_backbone(model)      # LoRA, workspaces and classifier learn
        ...
        model.save_pretrained("adapter")                                # LoRA
        torch.save(ait.workspace_state_dict(model), "workspace.pt")     # workspaces and their memories
        torch.save(vit.head.state_dict(), "head.pt")
        merged = model.merge_and_unload()                               # an ordinary model, LoRA inside its weights

    Or let ``peft`` keep all of it in the adapter's own file, without this function; it then trains copies, whose names
    :func:`ait.workspaces` tells, and ``merge_and_unload()`` puts them in place::

        config = peft.LoraConfig(target_modules=[...], modules_to_save=["global_workspace", "head"])

    Only parameters are frozen: dropout and running statistics of the backbone follow ``train()`` and ``eval()``.

    Args:
        model: any model with workspaces in it, also inside wrappers.
        frozen: False undoes it: every ``requires_grad`` is what it was before.
        head: True finds the classifier (timm's ``get_classifier()``, or ``head``, ``heads``, ``fc``, ``classifier``,
            ``score``); False freezes it, too; a name or a module says which it is.

    Raises:
        ValueError: ``model`` has no workspace or no classifier that was found, ``head`` is none of its modules or has
            no parameters, or it is to be unfrozen and was not frozen.
    """
    if not isinstance(frozen, bool):
        raise op_error(NAME, "frozen to be True or False", repr(frozen))
    workspaces = workspaces_of(NAME, model)
    flags = _Flags(model, workspaces)
    if not frozen:
        before = model.__dict__.get(RECORD)
        if before is None:
            raise op_error(NAME, "a model that freeze_backbone froze, to unfreeze it", type(model).__name__)
        flags.write(before)
        del model.__dict__[RECORD]
        return
    heads = find_heads(NAME, model, head)
    learning = {id(p) for workspace in workspaces for p in workspace.learning_parameters()}
    for module in model.modules():
        if isinstance(module, (InsertedWorkspace, InsertedLayer)):
            inside = {id(p) for p in module.workspace.parameters()}
            learning |= {id(p) for p in module.parameters() if id(p) not in inside}
    learning |= {id(p) for module in heads for p in module.parameters()}
    adapters = {id(p) for p in _adapter_parameters(model)}
    idle = {id(p) for p in _parameters_replaced_by_copies(model)}
    before = flags.read()
    now = {
        name: before[name] if id(p) in adapters else id(p) in learning and id(p) not in idle
        for name, p in model.named_parameters()
    }
    flags.write(now)
    # The first record stays where a model is frozen again, say with another head.
    model.__dict__.setdefault(RECORD, before)


def find_heads(caller: str, model: nn.Module, head: bool | str | nn.Module) -> list[nn.Module]:
    """The modules that give the logits of ``model``; none where ``head`` is False.

    Raises:
        ValueError: there is none, or ``head`` is none of the model's modules or has no parameters.
    """
    cure = "pass head=module, its name, or head=False"
    if isinstance(head, nn.Module):
        if not any(module is head for module in model.modules()):
            raise op_error(caller, "head to be a module of the model", type(head).__name__)
        found = [head]
    elif isinstance(head, str):
        modules = dict(unwrap(model).named_modules()) | dict(model.named_modules())
        if head not in modules or not head:
            raise op_error(caller, "head to be the name of a module of the model", repr(head))
        found = [modules[head]]
    elif isinstance(head, bool):
        if not head:
            return []
        found = _look_for_heads(unwrap(model))
        if not found:
            got = f"{type(unwrap(model)).__name__} without one that has parameters"
            raise op_error(caller, f"a classifier (get_classifier(), {', '.join(HEADS[:4])}, ...; else {cure})", got)
    else:
        raise op_error(caller, "head to be True, False, a module or its name", repr(head))
    if not any(True for module in found for _ in module.parameters()):
        raise op_error(caller, "a head with parameters", type(found[0]).__name__)
    return found


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, torch.compile and peft."""
    while True:
        inner = model.__dict__.get("_orig_mod") or model._modules.get("_orig_mod")
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None and callable(getattr(model, "get_base_model", None)):
            inner = model.get_base_model()  # type: ignore[operator]
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _look_for_heads(model: nn.Module) -> list[nn.Module]:
    get_classifier = getattr(model, "get_classifier", None)
    given = get_classifier() if callable(get_classifier) else None
    candidates = list(given) if isinstance(given, tuple | list) else [given]
    if not any(isinstance(each, nn.Module) for each in candidates):
        candidates = [model._modules.get(name) for name in HEADS]
    return [each for each in candidates if isinstance(each, nn.Module) and any(True for _ in each.parameters())]


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of peft's adapters, known by what its layers say of themselves."""
    for module in model.modules():
        names = getattr(module, "adapter_layer_names", None)
        if isinstance(names, tuple | list) and hasattr(module, "base_layer"):
            for name in names:
                part = getattr(module, name, None)
                if isinstance(part, nn.Module | nn.ParameterDict):
                    yield from part.parameters()


def _parameters_replaced_by_copies(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of modules in whose place peft trains a copy (its ``modules_to_save``)."""
    for module in model.modules():
        original = module._modules.get("original_module")
        if original is not None and "modules_to_save" in module._modules:
            yield from original.parameters()


class _Flags:
    """``requires_grad`` of all parameters of a model; of those that a frozen memory holds, what it will be after."""

    def __init__(self, model: nn.Module, workspaces: list[GlobalWorkspace]) -> None:
        self.parameters = dict(model.named_parameters())
        self.held: dict[int, tuple[dict[str, bool], str]] = {}
        for workspace in workspaces:
            if workspace.frozen:
                for name, parameter in workspace.memory_learners().named_parameters():
                    self.held[id(parameter)] = workspace._requires_grad_before, name

    def read(self) -> dict[str, bool]:
        flags = {}
        for name, parameter in self.parameters.items():
            if id(parameter) in self.held:
                record, own_name = self.held[id(parameter)]
                flags[name] = record[own_name]
            else:
                flags[name] = parameter.requires_grad
        return flags

    def write(self, flags: dict[str, Any]) -> None:
        for name, parameter in self.parameters.items():
            if name not in flags:
                continue
            if id(parameter) in self.held:
                record, own_name = self.held[id(parameter)]
                record[own_name] = flags[name]
            else:
                parameter.requires_grad_(flags[name])
