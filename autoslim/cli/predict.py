"""``autoslim predict``: predictions of a retrained network or an exported file."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoslim.cli.terminal import percent, print_json, print_table, without_output
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import enter_project

if TYPE_CHECKING:
    from autoslim.export.runtimes import Run

BATCH = 32
SHOWN_NUMBERS = 8


@with_clear_errors
def predict_cli(
    network: Annotated[
        str, typer.Argument(help="A file that `autoslim export` wrote (.pt2, .onnx or .xml), or a method's name.")
    ],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="Image files, and folders with image files at any depth; for data of your own, .npy files with inputs."
        ),
    ],
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of the method's network. Default: the lowest seed.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Number of classes shown for each input.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print the predictions as JSON.")] = False,
) -> None:
    """Show what a network predicts for images, with the preprocessing of the evaluation, or for inputs of your own.

    With data of your own (data.source: my_data.py:build), only your code knows the preprocessing: save inputs as your
    data set returns them, or batches of them, with numpy.save. The task decides what is shown: classes, labels with a
    probability of at least 50 %, the classes' shares of the pixels, or numbers.

    Examples:

    autoslim predict autoslim photo.jpg

    autoslim predict small.onnx photos/ --top 5 --json

    autoslim predict small.onnx inputs.npy
    """
    from autoslim.data.sources import IMAGE_SUFFIXES
    from autoslim.export.runtimes import RUNTIMES
    from autoslim.export.samples import SUFFIX

    paths = {path: path.absolute() for path in inputs}  # before the working directory changes
    for path in paths:
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path} does not exist or is not a file; name image files, or folders with images")
    with without_output(as_json):
        if Path(network).suffix in RUNTIMES:
            if seed is not None:
                raise UserError(
                    f"--seed {seed} selects one of a method's networks, but {network} is a file; omit --seed"
                )
            about, run = from_file(Path(network))
        else:
            about, run = from_project(network, seed)
        own = not about["input"].get("mean")
        files = input_files(paths, (SUFFIX,) if own else IMAGE_SUFFIXES)
        found = predicted_samples(about, run, files, top) if own else predicted_images(about, run, files, top)
    if as_json:
        print_json([{"input" if own else "image": name, **values} for name, values in found])
        return
    print_predictions(found, "input" if own else "image", about)


def input_files(paths: Mapping[Path, Path], suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Returns the files among ``paths``, and those with one of ``suffixes`` in the folders, sorted by path.

    Args:
        paths: path as the user wrote it -> absolute path. The keys of the result begin with the former.

    Raises:
        UserError: a folder contains no such file.
    """
    what = "images" if len(suffixes) > 1 else "such files"
    files: dict[str, Path] = {}
    for shown, path in paths.items():
        if path.is_dir():
            inside = [f for f in sorted(path.rglob("*")) if f.name.lower().endswith(suffixes) and f.is_file()]
            if not inside:
                raise UserError(
                    f"{shown} contains no {what.removesuffix('s')} ({' '.join(suffixes)}); name a folder with {what}"
                )
            files |= {str(shown / file.relative_to(path)): file for file in inside}
        else:
            files[str(shown)] = path
    return files


def from_file(file: Path) -> "tuple[Mapping[str, Any], Run]":
    from autoslim.export.runtimes import open_exported

    exported = open_exported(file)
    return exported.about, exported.run


def from_project(method: str, seed: int | None) -> "tuple[Mapping[str, Any], Run]":
    from autoslim.export.formats import description
    from autoslim.export.runtimes import network_run
    from autoslim.export.samples import task_entry

    if Path(method).suffix and not method.startswith("released/"):
        raise UserError(
            f"{method} is neither a method nor a file that can be run; name a .pt2, .onnx or .xml file that "
            "`autoslim export` wrote, or autoslim or uniform"
        )
    enter_project()
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import load_retrained, seeds_of
    from autoslim.tasks.building import find_task
    from autoslim.tasks.segmentation import Segmentation, logits

    params = load_params()
    retrained = load_retrained(params, method, seeds_of(method)[0] if seed is None else seed)
    task, trained = find_task(params.task), retrained.network
    about = {**description(retrained.info), "task": task_entry(task)}
    return about, network_run(lambda x: logits(trained(x))) if isinstance(task, Segmentation) else network_run(trained)


def predicted_images(
    about: Mapping[str, Any], run: "Run", files: Mapping[str, Path], top: int
) -> list[tuple[str, dict[str, Any]]]:
    """Returns the predictions for image files, which are decoded batch by batch."""
    from autoslim.export.predictor import Predictor
    from autoslim.export.samples import classified
    from autoslim.training.progress import Progress

    predictor = Predictor(about, run)
    names, paths, found = list(files), list(files.values()), []
    with Progress("predict", len(files), "image", brief=True) as bar:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            found += predictor.predict(map(predictor.pixels, batch), top)
            bar.advance(len(batch))
    return [(name, classified(prediction)) for name, prediction in zip(names, found, strict=True)]


def predicted_samples(
    about: Mapping[str, Any], run: "Run", files: Mapping[str, Path], top: int
) -> list[tuple[str, dict[str, Any]]]:
    """Returns the predictions for inputs of the user's own. Samples of a batch are named by their index in it."""
    from autoslim.export.samples import SamplePredictor
    from autoslim.training.progress import Progress

    predictor = SamplePredictor(about, run)
    found = []
    with Progress("predict", len(files), "file", brief=True) as bar:
        for name, path in files.items():
            inputs = predictor.inputs(path)
            for start in range(0, len(inputs), BATCH):
                for index, values in enumerate(predictor.predict(inputs[start : start + BATCH], top), start):
                    found.append((f"{name}[{index}]" if len(inputs) > 1 else name, values))
            bar.advance()
    return found


def print_predictions(found: list[tuple[str, dict[str, Any]]], kind: str, about: Mapping[str, Any]) -> None:
    """Prints a table whose columns depend on what is predicted."""
    rows = []
    header = [kind]
    for name, values in found:
        if "class" in values:
            header = [kind, "class", "probability (%)", "next"]
            rows.append([name, values["class"], percent(values["probability"], 1), shares(values["probabilities"], 1)])
        elif "labels" in values:
            header = [kind, "labels (%)"]
            rows.append([name, shares({label: values["probabilities"][label] for label in values["labels"]}) or "none"])
        elif "pixels" in values:
            header = [kind, "pixels (%)"]
            rows.append([name, shares(values["pixels"])])
        else:
            unit = about["task"]["unit"]
            header = [kind, f"value ({unit})" if unit else "value"]
            rows.append([name, numbers(values["values"])])
    print_table(header, rows, left=["class", "next", *header[1:2]])


def shares(values: Mapping[str, float], first: int = 0) -> str:
    return ", ".join(f"{name} ({percent(share, 1)})" for name, share in list(values.items())[first:])


def numbers(values: Any) -> str:
    """Returns the numbers of a sample, or of many of them the range and the mean."""
    import numpy as np

    array = np.array(values)
    if array.size <= SHOWN_NUMBERS:
        return ", ".join(f"{value:.4g}" for value in array.ravel())
    shape = "x".join(map(str, array.shape))
    return f"{shape} numbers from {array.min():.4g} to {array.max():.4g}, mean {array.mean():.4g}"
