"""What was put into a model, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias, overload

from torch import nn

from ait.integrations.inserted import InsertedLayer, InsertedWorkspace, Insertion
from ait.models.count import count_parameters
from ait.nn.readers import HopfieldReader
from ait.nn.workspace import GlobalWorkspace, GlobalWorkspaceLayer
from ait.ops._checks import check_positive_int, op_error

Workspace: TypeAlias = InsertedWorkspace | InsertedLayer | GlobalWorkspaceLayer | GlobalWorkspace


class Cost(NamedTuple):
    """What one layer adds to its host; what it took the place of is subtracted.

    Args:
        parameters: parameters and memory entries.
        read_flops: floating-point operations of matrix products that every token costs, in training and evaluation.
        write_flops: further ones, of training alone: the logits by which tokens compete. (The few tokens that are let
            in, and the memory itself, cost next to nothing.)
    """

    parameters: int
    read_flops: int
    write_flops: int


class Workspaces(Sequence[tuple[str, Workspace]]):
    """The workspaces of a model as ``(name, module)``, in the order of its modules; see :func:`ait.workspaces`."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found = list(find_workspaces(model))

    def __len__(self) -> int:
        return len(self._found)

    @overload
    def __getitem__(self, index: int) -> tuple[str, Workspace]: ...

    @overload
    def __getitem__(self, index: slice) -> list[tuple[str, Workspace]]: ...

    def __getitem__(self, index: int | slice) -> tuple[str, Workspace] | list[tuple[str, Workspace]]:
        return self._found[index]

    def costs(self) -> list[Cost]:
        """What each of them adds to its host."""
        return [cost(module) for _, module in self._found]

    def summary(self, tokens: int = 1) -> str:
        """A table: layers, parameters and floating-point operations added, one by one and in total, and the gates.

        Operations are those of matrix products, a multiplication and an addition counted as two.

        Args:
            tokens: tokens of an image, for operations an image (197 of a ViT-Base); a token by default.

        Raises:
            ValueError: ``tokens`` is not a positive integer.
        """
        tokens = check_positive_int("summary", "tokens", tokens)
        costs = self.costs()
        unit = "a token" if tokens == 1 else f"of {tokens} tokens"
        header = ("layer", "name", "block", "mode", "parameters", f"FLOPs {unit}", "more in training", "gate")
        rows: list[tuple[str, ...]] = [header]
        for index, ((name, module), added) in enumerate(zip(self._found, costs, strict=True)):
            insertion = insertion_of(module)
            rows.append(
                (
                    str(index if insertion is None else insertion.layer),
                    name,
                    "" if insertion is None else insertion.block_class,
                    module.mode if isinstance(module, (InsertedWorkspace, InsertedLayer)) else "built in",
                    f"{added.parameters:+,}",
                    f"{added.read_flops * tokens:+,}",
                    f"{added.write_flops * tokens:+,}",
                    _gate(module),
                )
            )
        total = Cost(*(sum(column) for column in zip(*costs, strict=True)))
        figures = [f"{total.parameters:+,}", f"{total.read_flops * tokens:+,}", f"{total.write_flops * tokens:+,}"]
        rows.append(("total", "", "", "", *figures, ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.rjust(width) if 4 <= column <= 6 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, self._share(total.parameters)])

    def _share(self, added: int) -> str:
        now = count_parameters(self._model).total
        before = now - added
        share = f", {added / before:+.2%}" if before else ""
        return f"model: {before:,} parameters without, {now:,} with ({added:+,}{share}; memory entries included)"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[name for name, _ in self._found]})"


def workspaces(model: nn.Module) -> Workspaces:
    """The workspaces of a model: put in by :func:`ait.insert_workspace`, or built in.

    Args:
        model: any module with workspaces in it, also inside wrappers (``DistributedDataParallel``, ``torch.compile``).

    Returns:
        A sequence of ``(name, module)``; print its ``.summary()``.

    Raises:
        ValueError: ``model`` has no workspace.
    """
    if not isinstance(model, nn.Module):
        raise op_error("workspaces", "a torch.nn.Module", type(model).__name__)
    found = Workspaces(model)
    if not found:
        raise op_error("workspaces", "a model with a workspace in it (ait.insert_workspace)", type(model).__name__)
    return found


def find_workspaces(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Workspace]]:
    """Outermost workspace modules with their names, each once."""
    seen: set[int] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, Workspace]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        if isinstance(module, (InsertedWorkspace, InsertedLayer, GlobalWorkspaceLayer, GlobalWorkspace)):
            yield name, module
            return
        for child_name, child in _children_in_use(module):
            yield from walk(child, f"{name}.{child_name}" if name else child_name)

    return walk(model, prefix)


def _children_in_use(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All children; where peft trains a copy in the place of a module (``modules_to_save``), the copy alone."""
    copies, active = module._modules.get("modules_to_save"), getattr(module, "active_adapters", None)
    if "original_module" in module._modules and isinstance(copies, nn.ModuleDict) and active:
        for adapter in active:
            if adapter in copies:
                yield f"modules_to_save.{adapter}", copies[adapter]
        return
    yield from module.named_children()


def insertion_of(module: nn.Module) -> Insertion | None:
    """How ``module`` came into its host; None if it was built in."""
    insertion = getattr(module, "insertion", None)
    return insertion if isinstance(insertion, Insertion) else None


def cost(module: Workspace) -> Cost:
    """What a workspace adds to its host."""
    workspace = module if isinstance(module, GlobalWorkspace) else module.workspace
    parameters = count_parameters(module).total
    read = _read_flops(workspace)
    layer = module.global_workspace if isinstance(module, InsertedLayer) else module
    if isinstance(layer, GlobalWorkspaceLayer):
        read += 2 * (layer.fc1.weight.numel() + layer.fc2.weight.numel())
    insertion = insertion_of(module)
    if isinstance(module, InsertedLayer) and insertion is not None:
        parameters -= insertion.host_parameters
        read -= insertion.host_flops
    return Cost(parameters, read, _write_flops(workspace))


def _read_flops(workspace: GlobalWorkspace) -> int:
    slots, _ = workspace.memory.gamma.shape
    reader = workspace.reader
    if isinstance(reader, HopfieldReader):
        # Logits, and the mixture of patterns; steps between them stay in M dimensions.
        return 4 * slots * workspace.dim + (reader.steps - 1) * 2 * slots * slots
    width = reader.query.weight.shape[0]
    return 2 * (reader.query.weight.numel() + reader.out.weight.numel()) + 4 * slots * width


def _write_flops(workspace: GlobalWorkspace) -> int:
    writer = workspace.writer
    if writer is None:
        return 0
    slots, slot_dim = workspace.memory.gamma.shape
    rows = writer.num_heads * slots
    if writer.selects_on_keys:
        return 2 * (writer.key.weight.numel() + rows * slot_dim)
    return 2 * rows * workspace.dim


def _gate(module: nn.Module) -> str:
    if not isinstance(module, InsertedWorkspace) or module.gate.is_meta:
        return ""
    return f"{float(module.gate.detach()):.4g}"
