"""``autoslim export``: writes a retrained network for use without autoslim."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from autoslim.cli.terminal import Method
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project


@with_clear_errors
def export_cli(
    method: Method,
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="File to write: .pt2 or .safetensors.")],
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the network. Default: the lowest seed.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Write a retrained network to a file that can be used without autoslim.

    FILE.pt2 is a graph for torch.export.load. It needs neither autoslim nor the network's code, and accepts any batch
    size. FILE.safetensors contains only the weights. FILE.json, which is written in both cases, contains the channels,
    the size and normalisation of the input, and the classes.

    Example:

    autoslim export autoslim --seed 0 --to small.pt2
    """
    from autoslim.export.formats import FORMATS, export

    target = to.absolute()
    if target.suffix not in FORMATS:
        raise UserError(f"--to {to} does not end in {' or '.join(FORMATS)}; rename it")
    if not target.parent.is_dir():
        raise UserError(f"--to {to}: the folder {target.parent} does not exist; create it first")
    for path in (to, to.with_suffix(".json")):
        if path.exists() and not force:
            raise UserError(f"{path} exists; choose another file with --to, or replace it with --force")
    enter_project()
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import load_retrained, seeds_of

    params = load_params()
    retrained = load_retrained(params, method, seeds_of(method)[0] if seed is None else seed)
    details = {
        "seed": retrained.seed,
        **dataclasses.asdict(retrained.allocation),
        **dataclasses.asdict(retrained.requested),
    }
    export(retrained.network, retrained.info, target, details)
    print(
        f"wrote {to} and {to.with_suffix('.json')}: method {method}, seed {retrained.seed}, "
        f"budget {retrained.requested.budget}"
    )
    if target.suffix == ".pt2":
        print(
            f'load it with torch.export.load("{to}").module(); the input is (N, C, H, W), scaled to [0, 1] and then '
            "normalised with the mean and std in the JSON file"
        )
