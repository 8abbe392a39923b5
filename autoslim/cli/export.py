"""``autoslim export``: writes a retrained network for use without autoslim."""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoslim.cli.terminal import Method, print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import PREPARED, enter_project, repository_root

if TYPE_CHECKING:
    from torch import Tensor

    from autoslim.data.prepared import PreparedData
    from autoslim.export.formats import Agreement
    from autoslim.pipeline.params import Params
    from autoslim.pipeline.retrain import Retrained
    from autoslim.tasks.measure import Measure

COMPARED = 64
"""Number of search images on which a file is compared with the network."""
CALIBRATION = 256
"""Largest number of search images on which the ranges of activations are calibrated."""


@with_clear_errors
def export_cli(
    method: Method,
    to: Annotated[
        Path, typer.Option("--to", metavar="FILE", help="File to write: .pt2, .onnx, .xml (OpenVINO) or .safetensors.")
    ],
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the network. Default: the lowest seed.")] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Quantise the network (.onnx or .xml), calibrated on search images, and compare accuracy and latency.",
        ),
    ] = False,
    elastic: Annotated[
        str | None,
        typer.Option(
            "--elastic",
            metavar="BUDGETS",
            help="Write networks of several budgets, such as 25%,50%,100%, that share the supernet's weights.",
        ),
    ] = None,
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

    autoslim export autoslim --to small-int8.onnx --int8

    autoslim export autoslim --to elastic.safetensors --elastic 25%,50%,100%
    """
    from autoslim.export.formats import check_structure, description, export
    from autoslim.export.samples import task_entry
    from autoslim.pipeline.params import load_params
    from autoslim.pipeline.retrain import load_retrained, seeds_of
    from autoslim.tasks.building import find_task

    target = check_target(to, force)
    if int8:
        check_quantisable(to)
    if elastic is not None:
        widths = elastic_widths(elastic, to, seed, int8)
        if target.with_suffix(".json").exists() and not force:
            raise UserError(
                f"{to.with_suffix('.json')} exists; choose another file with --to, or replace it with --force"
            )
        enter_project()
        write_elastic(load_params(), method, widths, to, target)
        return
    enter_project()
    params = load_params()
    retrained = load_retrained(params, method, seeds_of(method)[0] if seed is None else seed)
    check_structure(retrained.network, retrained.info, to.suffix)
    details: dict[str, object] = {
        "seed": retrained.seed,
        **dataclasses.asdict(retrained.allocation),
        **dataclasses.asdict(retrained.requested),
        "task": task_entry(find_task(params.task)),
    }
    if int8:
        calibrated_on = min(CALIBRATION, retrained.info.counts["search"])
        details["quantisation"] = {"dtype": "int8", "calibration_images": calibrated_on}
    check_description(
        to.with_suffix(".json"), target.with_suffix(".json"), {**details, **description(retrained.info)}, force
    )
    data = prepared_data() if verify or int8 else None
    images = search_images(data, COMPARED) if data and verify else []
    table: list[list[str]] = []
    if int8:
        assert data is not None
        agreement, table = quantised_export(retrained, target, details, images, data, params)
    else:
        agreement = export(retrained.network, retrained.info, target, details, images=images)
    print(
        f"wrote {to} and {to.with_suffix('.json')}: method {method}, seed {retrained.seed}, "
        f"budget {retrained.requested.budget}"
    )
    if agreement.images:
        print_agreement(agreement)
    if table:
        print()
        measured_on = f"latency with threads {params.latency.threads}, batch {params.latency.batch}, measured in turns"
        print_table(["network", accuracy_header(params), "latency", "quartiles", "size"], table, title=measured_on)
    if target.suffix == ".pt2":
        own = "a batch of inputs as your data set returns them"
        pixels = "(N, C, H, W), scaled to [0, 1] and then normalised with the mean and std in the JSON file"
        print(f'load it with torch.export.load("{to}").module(); the input is {pixels if retrained.info.mean else own}')


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


def elastic_widths(text: str, to: Path, seed: int | None, int8: bool) -> list[str]:
    """Returns the budgets in ``--elastic``, and checks the options that do not go with it."""
    widths = [width.strip() for width in text.split(",")]
    if not all(widths) or len({*widths}) < len(widths):
        raise UserError(f"--elastic {text!r} is not a list of different budgets; write it like 25%,50%,100%")
    if to.suffix != ".safetensors":
        raise UserError(f"--elastic needs a file that ends in .safetensors, not {to}; rename it")
    if seed is not None or int8:
        raise UserError(
            f"--elastic exports the supernet, not a retrained network; omit {'--int8' if int8 else '--seed'}"
        )
    return widths


def write_elastic(params: "Params", method: str, widths: list[str], to: Path, target: Path) -> None:
    from autoslim.pipeline.elastic import export_elastic
    from autoslim.resources.budgets import format_amount

    written, agreement = export_elastic(params, method, widths, target, COMPARED)
    measure = main_measure(params)
    print(f"wrote {to} and {to.with_suffix('.json')}: method {method}, {len(written)} widths with shared weights")
    print_agreement(agreement, "networks")
    print()
    rows = [
        [
            name,
            format_amount(width.costs["macs"], "macs"),
            format_amount(width.costs["params"], "params"),
            measure.number(width.test[measure.name]),
        ]
        for name, width in written.items()
    ]
    print_table(["width", "MACs", "parameters", accuracy_header(params)], rows)
    print(f'\nload it with autoslim.load_elastic(build, "{to}"), and choose a width with select("{widths[0]}")')


def main_measure(params: "Params") -> "Measure":
    from autoslim.data.prepared import read_info
    from autoslim.tasks.building import find_task

    return find_task(params.task).measures(read_info(PREPARED))[0]


def accuracy_header(params: "Params") -> str:
    measure = main_measure(params)
    return measure.header(f"{measure.title} on test")


def print_agreement(agreement: "Agreement", what: str = "network") -> None:
    print(
        f"compared with the {what} on {agreement.images} search images: the outputs differ by up to "
        f"{agreement.difference:.2g} (the largest is {agreement.largest:.3g})"
    )


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


def search_images(data: "PreparedData", count: int) -> "list[Tensor]":
    """Returns batches of at most ``count`` normalised images of the search split, with mixed classes."""
    from autoslim.data.batches import eval_batches

    batches = eval_batches(data, "search", batch_size=32, device="cpu", limit=count, shuffled_by=0)
    return [images for images, _ in batches]


def check_quantisable(to: Path) -> None:
    """Raises ``UserError`` if a file of this suffix cannot be quantised, or a package for it is missing."""
    from autoslim.export.quantise import QUANTISED
    from autoslim.export.runtimes import check_installed

    if to.suffix not in QUANTISED:
        raise UserError(
            f"--int8 needs a file that ends in {' or '.join(QUANTISED)}, not {to}; rename it, or omit --int8"
        )
    check_installed(to.suffix, *(["nncf"] if to.suffix == ".xml" else []))


def quantised_export(
    retrained: "Retrained",
    target: Path,
    details: dict[str, object],
    images: "list[Tensor]",
    data: "PreparedData",
    params: "Params",
) -> "tuple[Agreement, list[list[str]]]":
    """Exports a quantised network.

    Returns:
        How it agrees with the network, and a table of its accuracy, latency and size before and after.
    """
    import shutil
    from tempfile import TemporaryDirectory

    from autoslim.export.formats import export
    from autoslim.export.quantise import quantise_file

    calibration = [batch.numpy() for batch in search_images(data, CALIBRATION)]
    with TemporaryDirectory() as folder:

        def quantise(file: Path, about: str) -> None:
            shutil.copytree(file.parent, folder, dirs_exist_ok=True)
            quantise_file(file, calibration, about)

        agreement = export(retrained.network, retrained.info, target, details, images=images, quantise=quantise)
        return agreement, before_and_after(Path(folder, target.name), target, data, params)


def before_and_after(before: Path, after: Path, data: "PreparedData", params: "Params") -> list[list[str]]:
    """Returns the accuracy on the test split, the latency in turns, and the size of a file before and after."""
    import torch

    from autoslim.data.batches import eval_batches, worker_count
    from autoslim.export.formats import files_of
    from autoslim.export.quantise import RuntimeNetwork
    from autoslim.export.runtimes import open_exported
    from autoslim.files import format_bytes
    from autoslim.pipeline.assembly import recipe
    from autoslim.resources.budgets import format_amount
    from autoslim.resources.latency.turns import latencies_in_turns
    from autoslim.tasks.building import find_task
    from autoslim.training.device import RunContext
    from autoslim.training.progress import Progress
    from autoslim.training.retrain import evaluate_split

    task = find_task(params.task)
    context = RunContext(torch.device("cpu"), worker_count(params.runtime.workers))
    files = before, after
    runs = [open_exported(file, params.latency.threads).run for file in files]
    measure = main_measure(params)
    found = []
    with Progress("evaluate", len(runs), "file", brief=True) as progress:
        for run in runs:
            found.append(evaluate_split(RuntimeNetwork(run), data, "test", recipe(params.retrain), context, task))
            progress.advance()
    example, _ = next(eval_batches(data, "test", batch_size=params.latency.batch, device="cpu"))
    batch = example.repeat(-(-params.latency.batch // len(example)), *[1] * (example.dim() - 1))[
        : params.latency.batch
    ].numpy()
    latencies = latencies_in_turns([partial(run, batch) for run in runs])
    return [
        [
            name,
            measure.number(evaluation.values[measure.name]),
            format_amount(latency.median, "latency"),
            f"{format_amount(latency.low, 'latency')} to {format_amount(latency.high, 'latency')}",
            format_bytes(sum(path.stat().st_size for path in files_of(file)[:-1])),
        ]
        for name, file, evaluation, latency in zip(("float32", "int8"), files, found, latencies, strict=True)
    ]
