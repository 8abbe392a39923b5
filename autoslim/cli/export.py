"""``autoslim export``: writes a retrained network for use without autoslim."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoslim.cli.terminal import Method
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import PREPARED, enter_project, repository_root

if TYPE_CHECKING:
    from torch import Tensor

    from autoslim.data.prepared import PreparedData

COMPARED = 64
"""Number of images on which a file is compared with the network."""


@with_clear_errors
def export_cli(
    method: Method,
    to: Annotated[
        Path, typer.Option("--to", metavar="FILE", help="File to write: .pt2, .onnx, .xml (OpenVINO) or .safetensors.")
    ],
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the network. Default: the lowest seed.")] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify/--no-verify", help="Compare the file with the network, which needs the prepared images."
        ),
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Write a retrained network to a file that can be used without autoslim.

    FILE.pt2 is a graph for torch.export.load, FILE.onnx is for ONNX Runtime, and FILE.xml (with FILE.bin) for OpenVINO.
    They need neither autoslim nor the network's code, and accept any batch size. FILE.safetensors contains only the
    weights. Each contains the channels, the budget, the size and normalisation of the input, and the classes in its
    metadata; FILE.json has the same content. The file is compared with the network on images of the search split.

    Examples:

    autoslim export autoslim --seed 0 --to small.pt2

    autoslim export autoslim --to small.onnx
    """
    from autoslim.export.formats import description, export
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import load_retrained, seeds_of

    target = check_target(to, force)
    enter_project()
    params = load_params()
    retrained = load_retrained(params, method, seeds_of(method)[0] if seed is None else seed)
    details = {
        "seed": retrained.seed,
        **dataclasses.asdict(retrained.allocation),
        **dataclasses.asdict(retrained.requested),
    }
    check_description(
        to.with_suffix(".json"), target.with_suffix(".json"), {**details, **description(retrained.info)}, force
    )
    images = compared_images(prepared_data()) if verify else []
    agreement = export(retrained.network, retrained.info, target, details, images=images)
    print(
        f"wrote {to} and {to.with_suffix('.json')}: method {method}, seed {retrained.seed}, "
        f"budget {retrained.requested.budget}"
    )
    if agreement.images:
        print(
            f"compared with the network on {agreement.images} search images: the outputs differ by up to "
            f"{agreement.difference:.2g} (the largest is {agreement.largest:.3g})"
        )
    if target.suffix == ".pt2":
        print(
            f'load it with torch.export.load("{to}").module(); the input is (N, C, H, W), scaled to [0, 1] and then '
            "normalised with the mean and std in the JSON file"
        )


def check_target(to: Path, force: bool) -> Path:
    """Returns the absolute path of ``--to``.

    Raises:
        UserError: it has another suffix, its folder does not exist, a package is missing, or a file exists.
    """
    from autoslim.export.formats import FORMATS, files_of
    from autoslim.export.runtimes import check_installed

    if to.suffix not in FORMATS:
        raise UserError(f"--to {to} does not end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; rename it")
    target = to.absolute()
    if not target.parent.is_dir():
        raise UserError(f"--to {to}: the folder {target.parent} does not exist; create it first")
    for path in files_of(to)[:-1]:
        if path.exists() and not force:
            raise UserError(f"{path} exists; choose another file with --to, or replace it with --force")
    check_installed(to.suffix)
    return target


def check_description(shown: Path, path: Path, about: dict[str, object], force: bool) -> None:
    """Raises ``UserError`` if ``path`` describes another network. Files of several formats share one description."""
    if path.exists() and not force:
        try:
            same = json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(about))
        except (ValueError, OSError):
            same = False
        if not same:
            raise UserError(
                f"{shown} exists and describes another network; choose another file with --to, or replace it with "
                "--force"
            )


def prepared_data() -> "PreparedData":
    from autoslim.data.prepared import PreparedData

    return PreparedData.open(PREPARED, relative_to=repository_root())


def compared_images(data: "PreparedData") -> "list[Tensor]":
    """Returns batches of normalised images of the search split."""
    from autoslim.data.batches import eval_batches

    batches = eval_batches(data, "search", batch_size=32, device="cpu", limit=COMPARED, shuffled_by=0)
    return [images for images, _ in batches]
