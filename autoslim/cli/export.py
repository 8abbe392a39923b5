"""``autoslim export``: a retrained network for use elsewhere."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project


@with_clear_errors
def export_cli(
    method: Annotated[str, typer.Argument(help="autoslim, uniform or released/NAME.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="Ends in .pt2 or .safetensors.")],
    seed: Annotated[int | None, typer.Option("--seed", help="Default: the lowest seed.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a retrained network to a file that needs no autoslim.

    FILE.pt2 is a graph that torch.export.load opens where neither autoslim nor the network's code is, for any batch
    size. FILE.safetensors holds the weights alone. Beside either, FILE.json says the channels, the input's size and
    normalisation, and the classes.

    Example:

    autoslim export autoslim --seed 0 --to small.pt2
    """
    from autoslim.export import FORMATS, export

    target = to.absolute()
    if target.suffix not in FORMATS:
        raise UserError(f"--to {to} ends in {to.suffix or 'nothing'}; end it in {' or '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {target.parent}; make it first")
    for path in (to, to.with_suffix(".json")):
        if path.exists() and not force:
            raise UserError(f"{path} is there; name another file with --to, or replace it with --force")
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
            f'load it with torch.export.load("{to}").module(); images are (N, C, H, W), scaled to [0, 1] and then '
            "normalised as the JSON says"
        )
