"""``autoslim check``: everything that a run of the pipeline would check, without running it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoslim.shell.commands.printing import UNITS, print_facts
from autoslim.shell.commands.project import enter_project
from autoslim.shell.exits import ending_clearly
from autoslim.vocabulary.budgets import format_amount

if TYPE_CHECKING:
    from autoslim.engine.data import DataInfo
    from autoslim.shell.params import Params


@ending_clearly
def check_cli(
    file: Annotated[Path, typer.Argument(help="The parameters.", show_default=True)] = Path("params.yaml"),
) -> None:
    """Check params.yaml and say what the budget comes to. Trains nothing, downloads nothing.

    Network and budget depend on the data: they are checked once the data are prepared (`dvc repro prepare`).

    Examples:

    autoslim check

    autoslim check presets/cifar10.yaml
    """
    given = file.resolve()
    root = enter_project()
    path = given if given.is_file() else root / file
    check(path.relative_to(root) if path.is_relative_to(root) else path, root)


def check(path: Path, root: Path) -> None:
    """Checks the parameters in the file at ``path`` for the project in ``root``, and prints what they come to.

    Raises:
        UserError: something is wrong with them.
    """
    from autoslim.shell.params import load_params

    params = load_params(path)  # before torch is imported: most mistakes are told at once
    from autoslim.engine.data import check_source
    from autoslim.shell.assembly import machine
    from autoslim.shell.checks import check_model

    check_source(params.data.source, relative_to=root)
    check_model(params.model)
    device = machine(params.runtime).device
    facts = [("parameters", f"{path} is complete"), ("data", params.data.source), ("device", str(device))]
    info = prepared_info(params)
    if info is None:
        print_facts([*facts, ("network, budget", "not checked: they need the data; run `dvc repro prepare` first")])
        return
    print_facts([*facts, *_network_facts(params, info)])


def _network_facts(params: "Params", info: "DataInfo") -> list[tuple[str, str]]:
    from autoslim.shell.assembly import traced_network
    from autoslim.shell.checks import check_reach

    _, graph = traced_network(params.model, info)
    reach = check_reach(params, graph)

    def amount(value: float) -> str:
        return format_amount(value, params.resource)

    counts = ", ".join(f"{count} {split}" for split, count in info.counts.items())
    unit = UNITS[params.resource]
    return [
        ("images", f"{info.channels}x{info.image_size}x{info.image_size}, {len(info.classes)} classes; {counts}"),
        ("network", f"{params.model.name}, {len(graph.groups)} groups, {amount(reach.default)} {unit}"),
        ("supernet", f"from {amount(reach.narrowest)} to {amount(reach.widest)} {unit}"),
        ("search", f"from the widest down to {amount(reach.stop)} {unit}"),
        (
            "budget",
            f"{params.budget}: at most {amount(reach.budget)} {unit}, "
            f"{100 * reach.budget / reach.default:.3g} % of the default network's",
        ),
    ]


def prepared_info(params: "Params") -> "DataInfo | None":
    """What the prepared data say of themselves, or None where there are none, or others."""
    from autoslim.engine.data.info import FILE_NAME, read_info
    from autoslim.shell.places import PREPARED

    if not (PREPARED / FILE_NAME).is_file():
        return None
    info = read_info(PREPARED)
    data = params.data
    asked = (data.source, data.image_size or info.image_size, data.channels or info.channels)
    return info if asked == (info.source, info.image_size, info.channels) else None
