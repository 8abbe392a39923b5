"""``autoslim``: what a user does besides ``dvc repro``. Looks, checks and ships; training belongs to the pipeline."""

from importlib.metadata import version
from typing import Annotated

import typer

from autoslim.shell import environment  # noqa: F401  (before torch is imported by anything)
from autoslim.shell.commands.check import check_cli
from autoslim.shell.commands.compare import compare_cli
from autoslim.shell.commands.estimate import estimate_cli
from autoslim.shell.commands.evaluate import evaluate_cli
from autoslim.shell.commands.export import export_cli
from autoslim.shell.commands.latency import latency_app
from autoslim.shell.commands.profile import profile_cli
from autoslim.shell.commands.stage import stage_cli
from autoslim.shell.commands.trajectory import trajectory_cli

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("profile", profile_cli),
    ("check", check_cli),
    ("estimate", estimate_cli),
    ("trajectory", trajectory_cli),
    ("compare", compare_cli),
    ("evaluate", evaluate_cli),
    ("export", export_cli),
    ("stage", stage_cli),
):
    app.command(name)(command)
app.add_typer(latency_app, name="latency")


def _print_version(asked: bool) -> None:
    if asked:
        print(version("autoslim"))
        raise typer.Exit


@app.callback()
def autoslim(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sets the channel numbers of a convolutional network for a budget.

    `dvc repro` runs the pipeline; these commands look at networks and results, check parameters, and ship what was
    found. Each explains itself: `autoslim profile --help`.
    """


def main() -> None:
    app(prog_name="autoslim")
