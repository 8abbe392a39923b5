"""``autoslim export``: a retrained network for use elsewhere."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoslim.shell.commands.project import enter_project
from autoslim.shell.exits import ending_clearly
from autoslim.vocabulary.errors import UserError

if TYPE_CHECKING:
    from autoslim.shell.retrained import Retrained

FORMATS = (".pt2", ".safetensors")


@ending_clearly
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
    target = to.absolute()
    if target.suffix not in FORMATS:
        raise UserError(f"--to {to} ends in {to.suffix or 'nothing'}; end it in {' or '.join(FORMATS)}")
    if not target.parent.is_dir():
        raise UserError(f"--to {to}: there is no folder {target.parent}; make it first")
    for path in (to, to.with_suffix(".json")):
        if path.exists() and not force:
            raise UserError(f"{path} is there; name another file with --to, or replace it with --force")
    enter_project()
    from autoslim.shell.params import load_params
    from autoslim.shell.retrained import load_retrained, seeds_of

    params = load_params()
    retrained = load_retrained(params, method, seeds_of(method)[0] if seed is None else seed)
    export(retrained, target)
    print(
        f"wrote {to} and {to.with_suffix('.json')}: method {method}, seed {retrained.seed}, "
        f"budget {retrained.asked.budget}"
    )
    if target.suffix == ".pt2":
        print(
            f'load it with torch.export.load("{to}").module(); images are (N, C, H, W), scaled to [0, 1] and then '
            "normalised as the JSON says"
        )


def export(retrained: "Retrained", target: Path) -> None:
    """Writes the network to ``target`` (``.pt2`` or ``.safetensors``) and its description beside it."""
    import torch

    from autoslim.engine.artifacts import save_weights
    from autoslim.engine.checkpoints import write_atomically, write_json
    from autoslim.shell.retrained import description, exported

    if target.suffix == ".pt2":
        program = exported(retrained)
        write_atomically(target, lambda path: torch.export.save(program, path))
    else:
        save_weights(retrained.network, target)
    write_json(target.with_suffix(".json"), description(retrained))
