"""The command ``autoslim``. The pipeline (``dvc repro``) trains; the subcommands check, inspect and export."""

from autoslim.pipeline import entry  # noqa: F401  # first: from here on, Ctrl-C prints one line

# isort: split
from typing import Annotated

import typer

from autoslim.cli.check import check_cli
from autoslim.cli.compare import compare_cli
from autoslim.cli.estimate import estimate_cli
from autoslim.cli.evaluate import evaluate_cli
from autoslim.cli.experiments import experiments_cli
from autoslim.cli.export import export_cli
from autoslim.cli.init import init_cli
from autoslim.cli.latency import latency_app
from autoslim.cli.predict import predict_cli
from autoslim.cli.profile import profile_cli
from autoslim.cli.stage import stage_cli
from autoslim.cli.sync import sync_cli
from autoslim.cli.trajectory import trajectory_cli

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in (
    ("init", init_cli),
    ("profile", profile_cli),
    ("check", check_cli),
    ("estimate", estimate_cli),
    ("trajectory", trajectory_cli),
    ("compare", compare_cli),
    ("experiments", experiments_cli),
    ("evaluate", evaluate_cli),
    ("export", export_cli),
    ("predict", predict_cli),
    ("stage", stage_cli),
    ("sync", sync_cli),
):
    app.command(name)(command)
app.add_typer(latency_app, name="latency")


def _print_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(version("autoslim"))
        raise typer.Exit


@app.callback()
def autoslim(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Choose the number of channels of each layer of a convolutional network for a budget.

    `autoslim init` makes a project and `dvc repro` runs it. The other commands profile networks, check parameters,
    show results, export networks and classify images.
    See `autoslim COMMAND --help` for the options of a command.
    """


def main() -> None:
    app(prog_name="autoslim")
