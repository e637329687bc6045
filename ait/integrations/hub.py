"""Models of this package on the Hugging Face Hub: saving, uploading, downloading and the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ait.models.checkpoint import (
    CONFIG_FILE,
    PICKLE_FILE,
    SAFETENSORS_FILE,
    read_config,
    read_weights_file,
    write_safetensors,
)
from ait.models.count import count_parameters
from ait.models.sharing import Saved, config_of
from ait.nn.memory import Memory

try:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
except ImportError as error:
    raise ImportError(
        f"Hugging Face Hub: cannot import huggingface_hub ({error}); pip install 'associative-transformer[hf]'",
        name="huggingface_hub",
    ) from error

_DOWNLOAD_OPTIONS = ("revision", "cache_dir", "force_download", "local_files_only", "token")
_TAGS = ("associative-transformer", "global-workspace", "vision-transformer", "pytorch_model_hub_mixin")
_CITATION = """```bibtex
@inproceedings{sun2025associative,
  title = {Associative Transformer},
  author = {Sun, Yuwei and Ochiai, Hideya and Wu, Zhirong and Lin, Stephen and Kanai, Ryota},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year = {2025},
  note = {arXiv:2309.12862}
}
```"""


class HubModel(PyTorchModelHubMixin):
    """What ``PyTorchModelHubMixin`` saves, uploads and downloads: a config, tensors and, on the way out, a card.

    The mixin stands beside the models, not among their bases, so that ``import ait`` neither needs huggingface_hub nor
    waits for it.

    Args:
        saved: the config and the tensors.
        model: whose they are, for the card.
        repo_id: name for the card's example.
    """

    def __init__(self, saved: Saved, model: nn.Module | None = None, repo_id: str | None = None) -> None:
        self.saved = saved
        self.model = model
        self.repo_id = repo_id

    def _save_pretrained(self, save_directory: Path) -> None:
        write_safetensors(save_directory / SAFETENSORS_FILE, self.saved.tensors, self.saved.config)

    def generate_model_card(self, **details: Any) -> ModelCard:
        assert self.model is not None
        return model_card(self.model, **{"repo_id": self.repo_id, **details})

    @classmethod
    def _from_pretrained(  # type: ignore[override]
        cls, *, model_id: str, config: dict[str, Any] | None = None, **options: Any
    ) -> HubModel:
        download = {name: options[name] for name in _DOWNLOAD_OPTIONS if name in options}
        if config is None:
            # The mixin passes over a download that failed; this one says whether the repository, the revision or the
            # file is missing.
            config = read_config(_fetch(model_id, (CONFIG_FILE,), download))
        weights = _fetch(model_id, (SAFETENSORS_FILE, PICKLE_FILE), download)
        return cls(Saved(config, read_weights_file(weights), model_id))


def _fetch(repo_id: str, names: Sequence[str], download: Mapping[str, Any]) -> Path:
    """The first of the files that the repository has."""
    for name in names:
        try:
            return Path(hf_hub_download(repo_id, name, **download))
        except LocalEntryNotFoundError:
            # The repository was not asked.
            raise
        except EntryNotFoundError:
            continue
    raise FileNotFoundError(f"{repo_id}: expected a repository with {' or '.join(names)}, got none")


def download_saved(repo_id: str, **download: Any) -> Saved:
    """Downloads a model's config and weights, or finds them in the cache.

    Args:
        repo_id: ``"user/name"``.
        **download: ``revision``, ``cache_dir``, ``force_download``, ``token``, ``local_files_only``.

    Raises:
        FileNotFoundError: the repository has no config, or no weights.
        ValueError: a file is corrupt or refused.
        Whatever huggingface_hub raises where a repository cannot be read.
    """
    try:
        return HubModel.from_pretrained(repo_id, **download).saved
    except json.JSONDecodeError as error:
        raise ValueError(f"{repo_id}: expected JSON in config.json, got {error}") from error


def model_card(
    model: nn.Module,
    *,
    repo_id: str | None = None,
    title: str | None = None,
    description: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    metrics: Mapping[str, float] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    tags: Sequence[str] = (),
) -> ModelCard:
    """The ``README.md`` of a model: metadata for the Hub, what it is, how to load it, what it reached, whom to cite.

    Args:
        model: an ``AssociativeTransformer`` or a ``VisionTransformer``.
        repo_id: ``"user/name"``, for the example.
        title: heading; the name of ``repo_id`` or the class by default.
        description: what it was trained for and how; a paragraph of Markdown.
        license: identifier such as ``"mit"``; none by default, since it is the publisher's to choose.
        dataset: what it was trained and measured on.
        metrics: figures by name, such as ``{"accuracy": 0.754}``.
        mean: of each channel of images in [0, 1], with which inputs are normalised.
        std: the same for the standard deviation.
        classes: name of the class of each logit.
        tags: more tags for the Hub.

    Raises:
        ValueError: ``mean`` without ``std`` or the reverse, or not as many ``classes`` as the model has logits.
    """
    config = config_of(model)
    arguments, architecture = config["arguments"], config["architecture"]
    if (mean is None) != (std is None):
        raise ValueError(f"model card: expected both mean and std, got mean={mean}, std={std}")
    if classes is not None and len(classes) != arguments.get("num_classes"):
        raise ValueError(f"model card: expected {arguments.get('num_classes')} classes, got {len(classes)}")
    title = title or (repo_id or architecture).rpartition("/")[2]
    asks = arguments.get("question_dim") is not None
    task = "visual-question-answering" if asks else "image-classification"
    optional: dict[str, Any] = {}
    if dataset:
        optional["datasets"] = [dataset]
    if dataset and metrics:
        measured: dict[str, Any] = {"task_type": task, "dataset_type": dataset, "dataset_name": dataset}
        optional["model_name"] = title
        optional["eval_results"] = [
            EvalResult(metric_type=name, metric_value=value, **measured) for name, value in metrics.items()
        ]
    data = ModelCardData(
        license=license, library_name="ait", pipeline_tag=task, tags=sorted({*_TAGS, *tags}), **optional
    )
    body = [f"# {title}", _what_it_is(model, architecture, arguments)]
    if description:
        body.append(description)
    body += ["## Use", _how_to_load(architecture, arguments, repo_id), _inputs(mean, std, classes)]
    if metrics:
        rows = "\n".join(f"| {name} | {value} |" for name, value in metrics.items())
        on = f"On {dataset}, as" if dataset else "As"
        table = f"| metric | value |\n|---|--:|\n{rows}"
        body += ["## Metrics", f"{on} stated by who published the model.", table]
    body += [
        "## License",
        f"`{license}`" if license else "Not stated here. Who publishes the model sets `license:` above.",
        "## Citation",
        f"The architecture is of this paper:\n\n{_CITATION}",
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, body)) + "\n")


def _what_it_is(model: nn.Module, architecture: str, arguments: Mapping[str, Any]) -> str:
    parameters, entries = count_parameters(model)
    memories = [module for module in model.modules() if isinstance(module, Memory)]
    text = f"`{architecture}` of the Python package `ait` (distribution `associative-transformer`): "
    if memories:
        slots, width = memories[0].gamma.shape
        text += (
            "a Vision Transformer with the global workspace layer of the Associative Transformer "
            "([arXiv 2309.12862](https://arxiv.org/abs/2309.12862)) in place of each MLP. A memory of "
            f"{slots} slots {width} wide per block, `memory={arguments.get('memory')!r}`, "
            f"`semantics={arguments.get('semantics')!r}`"
        )
    else:
        text += "the Vision Transformer that the Associative Transformer is compared with"
    text += f"; {arguments.get('depth')} blocks {arguments.get('embed_dim')} wide, {parameters:,} parameters"
    return text + (f" and {entries:,} memory entries." if entries else ".")


def _how_to_load(architecture: str, arguments: Mapping[str, Any], repo_id: str | None) -> str:
    size = arguments.get("img_size", 32)
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    dtype = arguments.get("dtype", "torch.float32")
    suffix = "" if dtype == "torch.float32" else f", dtype={dtype}"
    inputs = f"torch.zeros(1, {arguments.get('in_chans', 3)}, {height}, {width}{suffix})"
    if arguments.get("question_dim") is not None:
        inputs += f", torch.zeros(1, {arguments['question_dim']}{suffix})"
    return (
        "```python\nimport torch\n\nimport ait\n\n"
        f'model = ait.{architecture}.from_pretrained("{repo_id or "path/to/this/folder"}")  # in evaluation mode\n'
        f"logits = model({inputs})\n```"
    )


def _inputs(mean: Sequence[float] | None, std: Sequence[float] | None, classes: Sequence[str] | None) -> str:
    sentences = []
    if mean is not None and std is not None:
        sentences.append(f"Images in [0, 1] are normalised with mean {tuple(mean)} and std {tuple(std)}.")
    if classes is not None:
        sentences.append(f"Logits are in the order {', '.join(classes)}.")
    return " ".join(sentences)
