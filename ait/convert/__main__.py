"""``python -m ait.convert``: a checkpoint of the authors' released code, as a file or a folder of this package."""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ait.convert.released import Converted, convert_released
from ait.models import AssociativeTransformer, create_model, list_models
from ait.models.checkpoint import differences, read_pickle, read_safetensors, write_safetensors
from ait.models.sharing import Saved, build

_DESCRIPTION = """\
Converts a checkpoint of an Associative Transformer that was trained with the authors' released code, a state dict in a
.pth file, into weights of this package. Nothing in the checkpoint is executed: a file that holds more than tensors is
refused. What the tensors cannot tell (how images were cut, how many tokens a memory row lets in) is an option; the
defaults are the release's.
"""
_EPILOG = """\
exit status: 0 converted; 1 the checkpoint or the output is refused, and nothing was written; 2 wrong usage

example:
  python -m ait.convert ait_cifar10_small_aitTrue_100.pth ait_small.safetensors --model ait_small
  python -c 'import ait; print(ait.AssociativeTransformer.from_pretrained("ait_small.safetensors"))'
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command, and returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        _run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"ait.convert: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m ait.convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, help="what torch.save wrote (.pth, .pt, .bin), or a .safetensors file")
    parser.add_argument(
        "output", type=Path, help="a .safetensors file, or a folder for config.json, model.safetensors and a model card"
    )
    models = list_models("ait_*")
    parser.add_argument("--model", choices=models, metavar="NAME", help=f"make sure that it is {' or '.join(models)}")
    parser.add_argument(
        "--img-size", type=_positive, nargs="+", metavar="PIXELS", help="side, or height and width (default: a square)"
    )
    parser.add_argument("--in-chans", type=_positive, default=3, metavar="N", help="channels of an image (default: 3)")
    parser.add_argument(
        "--head-dim", type=_positive, default=64, metavar="N", help="width of a self-attention head (default: 64)"
    )
    parser.add_argument(
        "--top-k", type=_positive, default=512, metavar="N", help="the release's --bottleneck (default: 512)"
    )
    parser.add_argument("--beta", type=float, default=1.0, metavar="X", help="the release's --beta (default: 1)")
    parser.add_argument("--ignore-unknown", action="store_true", help="drop tensors of unknown names")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")
    return parser


def _run(options: argparse.Namespace) -> None:
    _check_output(options.checkpoint, options.output, options.overwrite)
    img_size = options.img_size
    if img_size is not None:
        if len(img_size) > 2:
            raise ValueError(f"--img-size: expected one number or two, got {len(img_size)}")
        img_size = tuple(img_size) if len(img_size) == 2 else img_size[0]
    content = _read(options.checkpoint)
    try:
        converted = convert_released(
            content,
            img_size=img_size,
            in_chans=options.in_chans,
            head_dim=options.head_dim,
            top_k=options.top_k,
            beta=options.beta,
            ignore_unknown=options.ignore_unknown,
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{options.checkpoint}: {error}") from error
    if options.model is not None:
        _check_is(options.model, converted, options.checkpoint)
    _write(options.output, converted)
    _report(options, converted)


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        config, tensors = read_safetensors(path)
        if config is not None:
            raise ValueError(f"{path}: expected a checkpoint of the release, got a file of this package")
        return tensors
    content: Mapping[str, Any] = read_pickle(path)
    return content


def _check_output(checkpoint: Path, output: Path, overwrite: bool) -> None:
    """Refuses an output before anything is read."""
    is_folder = output.suffix != ".safetensors"
    if is_folder and output.suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensor"):
        raise ValueError(f"output {output}: expected a .safetensors file, or a folder")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"output {output}: no folder {output.parent}")
    if not output.exists():
        return
    if checkpoint.exists() and output.samefile(checkpoint):
        raise ValueError(f"output {output}: expected another file than the checkpoint, got the same")
    if output.is_dir() != is_folder:
        raise ValueError(f"output {output}: expected a {'folder' if is_folder else 'file'}, got the other")
    if not overwrite and not (is_folder and not any(output.iterdir())):
        raise FileExistsError(f"output {output} exists; --overwrite replaces it")


def _check_is(name: str, converted: Converted, checkpoint: Path) -> None:
    """Refuses a model that is not of the size of the name."""
    arguments = converted.config["arguments"]
    image = {key: arguments[key] for key in ("img_size", "patch_size", "in_chans", "num_classes", "question_dim")}
    expected = create_model(name, device="meta", **image).state_dict()
    if differences(expected, converted.state_dict):
        raise ValueError(f"{checkpoint}: expected {name}, got {_describe(arguments)}")


def _write(output: Path, converted: Converted) -> None:
    if output.suffix == ".safetensors":
        write_safetensors(output, converted.state_dict, converted.config)
        return
    model = build(AssociativeTransformer, Saved(converted.config, converted.state_dict, str(output)), {})
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        whole = Path(folder) / output.name
        model.save_pretrained(whole, repo_id=output.name)
        output.mkdir(exist_ok=True)
        for file in whole.iterdir():
            shutil.move(file, output / file.name)


def _report(options: argparse.Namespace, converted: Converted) -> None:
    arguments, state, dropped = converted.config["arguments"], converted.state_dict, converted.dropped
    print(f"{options.checkpoint}: {_describe(arguments)}")
    print(f"  converted: {len(state)} tensors, {sum(tensor.numel() for tensor in state.values()):,} entries")
    print(f"  dropped: {len(dropped)} tensors, {sum(tensor.numel() for tensor in dropped.values()):,} entries")
    for name, tensor in dropped.items():
        print(f"    {name} {tuple(tensor.shape)}")
    told = {name: arguments[name] for name in ("in_chans", "head_dim", "top_k", "beta", "write_dropout")}
    print(f"  not in the checkpoint: {', '.join(f'{name}={value}' for name, value in told.items())}")
    print(f"{options.output}: ait.AssociativeTransformer.from_pretrained({str(options.output)!r}) loads it")


def _describe(arguments: Mapping[str, Any]) -> str:
    size = arguments["img_size"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    question = "" if arguments["question_dim"] is None else f", questions of {arguments['question_dim']} entries"
    return (
        f"an AiT of {arguments['depth']} blocks {arguments['embed_dim']} wide, {arguments['num_slots']} slots "
        f"{arguments['slot_dim']} wide and {arguments['workspace_heads']} heads a block; images of {height} x {width} "
        f"pixels, patches of {arguments['patch_size']}{question}, {arguments['num_classes']} classes"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
