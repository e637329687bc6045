"""workspace_state_dict, load_workspace, with_workspace: what is saved comes back; what does not fit changes nothing."""

from __future__ import annotations

import pickle

import pytest
import torch

import ait
from tests.integrations.hosts import OPTIONS, fingerprint, hf_bert, hf_vit, logits, timm_vit


def trained(make, mode="wrap", **options):
    """A host whose workspaces are no longer as they were made."""
    torch.manual_seed(3)
    model = ait.insert_workspace(make(), mode=mode, **(OPTIONS | options))
    with torch.no_grad():
        for _, module in ait.workspaces(model):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    logits(model.train(), torch.randn(2, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("mode", ["wrap", "parallel", "replace"])
def test_a_file_of_the_workspaces_alone_restores_them_in_a_bare_host(tmp_path, mode, suffix):
    model, images = trained(timm_vit, mode), torch.randn(2, 3, 32, 32)
    state, path = ait.workspace_state_dict(model), tmp_path / f"workspace.{suffix}"
    assert all("global_workspace" in name for name in state if name != "ait_workspace_arguments")
    if suffix == "pt":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file({k: v.contiguous() for k, v in state.items()}, path)
    bare = timm_vit()
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k in bare.state_dict()}, strict=False)
    if mode == "replace":  # the bare host's own MLP goes
        assert ait.load_workspace(bare, path) is bare
    else:
        ait.load_workspace(bare, path)
    assert torch.equal(bare.eval()(images), model(images))
    assert ait.workspaces(bare).summary() == ait.workspaces(model).summary()


def test_a_file_for_other_layers_or_options_is_refused_and_changes_nothing():
    state = ait.workspace_state_dict(ait.insert_workspace(timm_vit(), [0, 1], **OPTIONS))
    others = (
        ait.insert_workspace(timm_vit(), [1, 2], **OPTIONS),
        ait.insert_workspace(timm_vit(), [0, 1], **(OPTIONS | dict(num_slots=4))),
        ait.insert_workspace(timm_vit(), [0, 1], mode="parallel", **OPTIONS),
        timm_vit(embed_dim=64),
    )
    for model in others:
        before = fingerprint(model)
        with pytest.raises(ValueError, match="load_workspace: expected"):
            ait.load_workspace(model, state)
        assert fingerprint(model) == before


def test_a_malicious_file_runs_nothing(tmp_path):
    class Payload:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    torch.save({"weight": Payload()}, tmp_path / "malicious.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"weight": Payload()}))
    for name in ("malicious.pt", "plain.pkl"):
        model = timm_vit()
        before = fingerprint(model)
        with pytest.raises(ValueError, match="not unpickled"):
            ait.load_workspace(model, tmp_path / name)
        assert fingerprint(model) == before
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_corrupted_file_is_refused(tmp_path, suffix):
    state, path = ait.workspace_state_dict(trained(timm_vit)), tmp_path / "workspace"
    if suffix == "pt":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file({k: v.contiguous() for k, v in state.items()}, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="a whole file of a workspace"):
        ait.load_workspace(timm_vit(), path)
    with pytest.raises(FileNotFoundError):
        ait.load_workspace(timm_vit(), tmp_path / "none")


def test_values_that_are_not_finite_are_refused():
    model = trained(timm_vit)
    state = {name: value.clone() for name, value in ait.workspace_state_dict(model).items()}
    next(value for name, value in state.items() if name.endswith("gamma"))[0, 0] = torch.nan
    before = fingerprint(model)
    with pytest.raises(ValueError, match="finite"):
        ait.load_workspace(model, state)
    assert fingerprint(model) == before


@pytest.mark.parametrize("mode", ["wrap", "replace"])
def test_transformers_saves_and_loads_them_bit_for_bit(tmp_path, mode):
    model, images = trained(hf_vit, mode), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    loaded = ait.with_workspace(type(model)).from_pretrained(tmp_path)
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(logits(loaded, images), logits(model, images))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_transformers_own_class_loads_the_bare_host(tmp_path):
    model = trained(hf_vit)
    model.save_pretrained(tmp_path)
    bare = type(model).from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(logits(bare, images), logits(ait.remove_workspace(model), images))


def test_with_workspace_refuses_what_has_no_from_pretrained():
    with pytest.raises(ValueError, match="with_workspace: expected a class with from_pretrained"):
        ait.with_workspace(dict)


def test_text_models_keep_their_workspaces_in_half_precision(tmp_path):
    model = ait.insert_workspace(hf_bert(), **OPTIONS).eval()
    model.save_pretrained(tmp_path)
    loaded = ait.with_workspace(type(model)).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for (_, one), (_, two) in zip(ait.workspaces(model), ait.workspaces(loaded), strict=True):
        assert two.workspace.memory.gamma.dtype == torch.float32 and two.norm.weight.dtype == torch.bfloat16
        assert torch.equal(one.workspace.memory.gamma, two.workspace.memory.gamma)
