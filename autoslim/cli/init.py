"""``autoslim init``: the pipeline in a repository of one's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project

if TYPE_CHECKING:
    from autoslim.pipeline.own_project import Choices


@with_clear_errors
def init_cli(
    folder: Annotated[
        Path, typer.Argument(help="Folder in a git repository. It is made if it does not exist.", show_default=True)
    ] = Path(),
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="data.source: `folder:PATH`, `my_data.py:build`, `torchvision:NAME`, `scenes` or `digits`."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="model.name: `net.py:build`, `torchvision.models:resnet50` or `timm:resnet18`."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="model.weights: a file with your trained weights, or `DEFAULT` of torchvision."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="task: classification, multilabel, segmentation, regression or `my_task.py:MyTask`."
        ),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="305M, 20MB, 4.5ms, 50%, or `{macs: 305M, params: 3.5M}`.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="Start from a preset, such as `cifar10` or `imagenet-resnet50`.")
    ] = None,
    upgrade: Annotated[
        bool,
        typer.Option("--upgrade", help="Bring an existing project up to date, and show the differences."),
    ] = False,
) -> None:
    """Make a project for the pipeline in your own git repository, or bring one up to date.

    Writes params.yaml (all parameters), dvc.yaml (the stages), autoslim.lock (the version of autoslim), and .dvc and
    lines of .gitignore where they are missing. Existing files are kept.

    With --upgrade, params.yaml gets new parameters with their defaults, and dvc.yaml the stages of the installed
    version, with the files that params.yaml names among their deps. Your values, comments and stages are kept. In a
    clone of autoslim, it adds only these files.

    Examples:

    autoslim init --data folder:images --model net.py:build --weights trained.pt --budget 50%

    autoslim init slimming --preset cifar10

    autoslim init --upgrade
    """
    from autoslim.pipeline.own_project import Choices

    choices = Choices(data, model, weights, task, budget, preset)
    if not upgrade:
        create(folder, choices)
        return
    if choices != Choices():
        raise UserError("--upgrade keeps the parameters; edit params.yaml instead of using other options with it")
    update(folder)


def create(folder: Path, choices: "Choices") -> None:
    """Makes a project and prints what was written and what to do next.

    Raises:
        UserError: the project cannot be made there, or a choice is wrong.
    """
    from autoslim.pipeline.checks import own_files
    from autoslim.pipeline.own_project import create_project

    created = create_project(folder, choices)
    if created.kept:
        print(f"kept, because they exist: {', '.join(created.kept)}")
    if created.extended:
        print(f"added lines to {', '.join(created.extended)}")
    changed = (*created.written, *created.extended)
    if not changed:
        return
    if created.written:
        print(f"wrote {', '.join(created.written)}")
    files = {file.parameter: file.path for file in own_files(created.params)}
    weights = files.pop("model.weights", None)
    print("\nNext:")
    if folder != Path():
        print(f"  cd {folder}")
    print("  edit params.yaml           # image size, epochs, learning rates, ...")
    print("  dvc repro prepare          # prepares the data")
    print("  autoslim check             # checks the network and the budget")
    print("  autoslim estimate          # estimates the hours and the memory of the run")
    print("  dvc repro                  # runs the stages, and those only that are out of date")
    print(f"  git add {' '.join((*changed, *files.values()))}    # and commit: experiments start from a commit")
    if weights:
        print(f"  dvc add {weights}    # unless git tracks it: queued experiments see only tracked files")


def update(folder: Path) -> None:
    """Brings the project in ``folder``, or in the nearest parent folder of it, up to date and prints the differences.

    Raises:
        UserError: there is no project, or its parameters are wrong.
    """
    from autoslim.pipeline.own_project import upgrade_project

    differences = upgrade_project(enter_project() if folder == Path() else folder)
    print(differences or "the project is up to date", end="" if differences else "\n")
