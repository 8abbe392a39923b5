"""``autoslim predict``: classifies image files with a retrained network or an exported file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoslim.cli.terminal import percent, print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project

if TYPE_CHECKING:
    from autoslim.export.predictions import Prediction
    from autoslim.export.predictor import Predictor

BATCH = 32


@with_clear_errors
def predict_cli(
    network: Annotated[
        str, typer.Argument(help="A file that `autoslim export` wrote (.pt2, .onnx or .xml), or a method's name.")
    ],
    images: Annotated[list[Path], typer.Argument(help="Image files, and folders with image files at any depth.")],
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the method's network. Default: the lowest seed.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Number of classes shown for each image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the classes and their probabilities as JSON.")] = False,
) -> None:
    """Classify images, with the preprocessing of the evaluation.

    Examples:

    autoslim predict autoslim photo.jpg

    autoslim predict small.onnx photos/ --top 5 --json
    """
    from autoslim.export.runtimes import RUNTIMES

    files = list(image_files(images))  # before the working directory changes
    names = [str(file) for file in files]
    files = [file.absolute() for file in files]
    if Path(network).suffix in RUNTIMES:
        if seed is not None:
            raise UserError(f"--seed {seed} selects one of a method's networks, but {network} is a file; omit --seed")
        predictor = from_file(Path(network))
    else:
        predictor = from_project(network, seed)
    found = list(zip(names, predicted(predictor, files, top), strict=True))
    if as_json:
        values = [
            {
                "image": name,
                "class": prediction.label,
                "probability": prediction.probability,
                "probabilities": prediction.probabilities,
            }
            for name, prediction in found
        ]
        print(json.dumps(values, indent=1))
        return
    rows = []
    for name, prediction in found:
        others = list(prediction.probabilities.items())[1:]
        next_best = ", ".join(f"{label} ({percent(share, 1)})" for label, share in others)
        rows.append([name, prediction.label, percent(prediction.probability, 1), next_best])
    print_table(["image", "class", "probability (%)", "next"], rows, left=["class", "next"])


def image_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yields the files among ``paths``, and the image files in the folders, sorted by path.

    Raises:
        UserError: a path does not exist, or a folder contains no image.
    """
    from autoslim.data.sources import IMAGE_SUFFIXES

    for path in paths:
        if path.is_dir():
            inside = [f for f in sorted(path.rglob("*")) if f.name.lower().endswith(IMAGE_SUFFIXES) and f.is_file()]
            if not inside:
                raise UserError(f"{path} contains no image ({' '.join(IMAGE_SUFFIXES)}); name a folder with images")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise UserError(f"{path} does not exist or is not a file; name image files, or folders with images")


def from_file(file: Path) -> "Predictor":
    from autoslim.export.predictor import Predictor
    from autoslim.export.runtimes import open_exported

    exported = open_exported(file)
    return Predictor(exported.about, exported.run)


def from_project(method: str, seed: int | None) -> "Predictor":
    from autoslim.export.formats import description
    from autoslim.export.predictor import Predictor
    from autoslim.export.runtimes import network_run

    if Path(method).suffix and not method.startswith("released/"):
        raise UserError(
            f"{method} is neither a method nor a file that can be run; name a .pt2, .onnx or .xml file that "
            "`autoslim export` wrote, or autoslim or uniform"
        )
    enter_project()
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import load_retrained, seeds_of
    from autoslim.tasks.building import find_task
    from autoslim.tasks.classification import Classification

    params = load_params()
    if not isinstance(find_task(params.task), Classification):
        raise UserError(
            f"task is {params.task}, but `autoslim predict` shows probabilities of classes; run a file of `autoslim "
            "export` with its runtime"
        )
    retrained = load_retrained(params, method, seeds_of(method)[0] if seed is None else seed)
    return Predictor(description(retrained.info), network_run(retrained.network))


def predicted(predictor: "Predictor", files: Sequence[Path], top: int) -> "list[Prediction]":
    """Returns the predictions for image files, which are decoded batch by batch."""
    found = []
    for start in range(0, len(files), BATCH):
        found += predictor.predict(map(predictor.pixels, files[start : start + BATCH]), top)
    return found
