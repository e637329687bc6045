"""The authors' released model, by the names of its tensors: an oracle for what :mod:`ait.convert` makes of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PREFIX = "transformer.layers."


def released_layer_shapes(width: int, hidden: int, slots: int, slot_dim: int, heads: int) -> dict[str, tuple[int, ...]]:
    inner = heads * slot_dim
    return {
        "fc1.weight": (hidden, width), "fc1.bias": (hidden,), "fc2.weight": (width, hidden), "fc2.bias": (width,),
        "fc3.weight": (width, slot_dim), "fc3.bias": (width,), "norm.weight": (width,), "norm.bias": (width,),
        "memoryupdate.memory": (slots, slot_dim), "memoryupdate.beta": (),
        "memoryupdate.mha.w_qs.weight": (inner, slot_dim), "memoryupdate.mha.w_ks.weight": (inner, width),
        "memoryupdate.mha.w_vs.weight": (inner, width), "memoryupdate.mha.fc.weight": (slot_dim, inner),
        "memoryupdate.mha.layer_norm.weight": (slot_dim,), "memoryupdate.mha.layer_norm.bias": (slot_dim,),
    }  # fmt: skip


def released_shapes(
    *, depth: int = 2, width: int = 24, hidden: int = 48, slots: int = 6, slot_dim: int = 4, heads: int = 2,
    patch: int = 2, side: int = 3, classes: int = 5, question: int | None = None,
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Every tensor of a released AiT with ``side * side`` patches, and its shape."""
    pixels, patches = 3 * patch * patch, side * side
    entries = (patches + (question is not None)) * width
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embedding": (1, patches + 1, width), "cls_token": (1, 1, width),
        "to_patch_embedding.1.weight": (pixels,), "to_patch_embedding.1.bias": (pixels,),
        "to_patch_embedding.2.weight": (width, pixels), "to_patch_embedding.2.bias": (width,),
        "to_patch_embedding.3.weight": (width,), "to_patch_embedding.3.bias": (width,),
        "to_patch_embedding_cnn.0.weight": (768, 3, 5, 5), "to_patch_embedding_cnn.0.bias": (768,),
        "mlp_head.0.weight": (entries,), "mlp_head.0.bias": (entries,),
        "mlp_head.1.weight": (classes, entries), "mlp_head.1.bias": (classes,),
    }  # fmt: skip
    if question is not None:
        shapes |= {
            "question_to_embedding.0.weight": (question,), "question_to_embedding.0.bias": (question,),
            "question_to_embedding.1.weight": (width, question), "question_to_embedding.1.bias": (width,),
            "question_to_embedding.2.weight": (width,), "question_to_embedding.2.bias": (width,),
        }  # fmt: skip
    for i in range(depth):
        block = {
            "0.norm.weight": (width,), "0.norm.bias": (width,), "0.fn.to_qkv.weight": (3 * width, width),
            "0.fn.to_out.0.weight": (width, width), "0.fn.to_out.0.bias": (width,),
            "1.norm.weight": (width,), "1.norm.bias": (width,),
        }  # fmt: skip
        layer = released_layer_shapes(width, hidden, slots, slot_dim, heads)
        block |= {f"1.fn.{name}": shape for name, shape in layer.items()}
        shapes |= {f"{PREFIX}{i}.{name}": shape for name, shape in block.items()}
    return shapes


def released_state_dict(*, dtype: torch.dtype = torch.float64, seed: int = 0, **sizes: int | None) -> dict[str, Tensor]:
    """Random weights, all of them other than those that the release starts from."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in released_shapes(**sizes).items():  # type: ignore[arg-type]
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 2 and not name.endswith("memory"):
            weight = weight / shape[1] ** 0.5
        state[name] = torch.tensor(0.9) if name.endswith("memoryupdate.beta") else weight.to(dtype)
    return state


def released_forward(
    state: dict[str, Tensor], images: Tensor, question: Tensor | None = None, *, head_dim: int, k: int, beta: float
) -> Tensor:
    """Logits in evaluation. As the release does, this moves the memories: those in ``state`` are replaced."""

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(x: Tensor, name: str, eps: float = 1e-5) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, state[f"{name}.bias"], eps)

    def embed(x: Tensor, name: str) -> Tensor:
        first, second, third = (i + (name == "to_patch_embedding") for i in range(3))
        return norm(linear(norm(x, f"{name}.{first}"), f"{name}.{second}"), f"{name}.{third}")

    def attention(x: Tensor, name: str) -> Tensor:
        query, key, value = linear(x, f"{name}.to_qkv").chunk(3, dim=-1)
        pooled = []
        for start in range(0, query.shape[-1], head_dim):
            q, k_, v = (each[..., start : start + head_dim] for each in (query, key, value))
            pooled.append(torch.softmax(q @ k_.transpose(1, 2) * head_dim**-0.5, dim=-1) @ v)
        return linear(torch.cat(pooled, dim=-1), f"{name}.to_out.0")

    def write(tokens: Tensor, name: str) -> Tensor:
        memory = state[f"{name}.memory"]
        slots, width = memory.shape
        query, key, value = (
            linear(x, f"{name}.mha.{w}") for x, w in ((memory, "w_qs"), (tokens, "w_ks"), (tokens, "w_vs"))
        )
        answers = memory.new_empty(slots, width, query.shape[1] // width)
        for head in range(answers.shape[2]):
            rows = slice(head * width, (head + 1) * width)
            logits = query[:, rows] @ key[:, rows].T / width**0.5
            best = logits.topk(min(k, len(tokens)), dim=-1)
            for slot in range(slots):
                gates = torch.softmax(best.values[slot], dim=-1)
                answers[slot, :, head] = gates @ value[best.indices[slot], rows]
        # Slot width outermost, head innermost.
        answer = linear(answers.reshape(slots, -1), f"{name}.mha.fc") + memory
        decay = state[f"{name}.beta"].to(memory.dtype)
        mixed = decay * memory + (1 - state[f"{name}.beta"]) * norm(answer, f"{name}.mha.layer_norm", 1e-6)
        return mixed / mixed.norm(dim=1, keepdim=True)

    def workspace(x: Tensor, name: str) -> Tensor:
        f = norm(linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2"), f"{name}.norm")
        state[f"{name}.memoryupdate.memory"] = memory = write(f.flatten(0, 1), f"{name}.memoryupdate")
        patterns = linear(memory, f"{name}.fc3")
        return torch.softmax(beta * f @ patterns.T, dim=-1) @ patterns + f

    batch, channels, height, width = images.shape
    side = int((len(state["to_patch_embedding.1.weight"]) / channels) ** 0.5)
    grid = images.reshape(batch, channels, height // side, side, width // side, side)
    x = embed(grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2), "to_patch_embedding")
    if question is not None:
        x = torch.cat([embed(question, "question_to_embedding")[:, None], x], dim=1)
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith(PREFIX))
    for i in range(depth):
        x = x + attention(norm(x, f"{PREFIX}{i}.0.norm"), f"{PREFIX}{i}.0.fn")
        x = x + workspace(norm(x, f"{PREFIX}{i}.1.norm"), f"{PREFIX}{i}.1.fn")
    return linear(norm(x.flatten(1), "mlp_head.0"), "mlp_head.1")
