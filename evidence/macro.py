"""An independent truth: scores and choices of our supernets among networks that others trained.

    python evidence/run.py macro mobilenet
    python evidence/run.py macro resnet
    python evidence/summary.py --truth FOLDER

Channel-Bench-Macro (github.com/xiusu/Channel-Bench-Macro) has the accuracy of three trainings of each of the 16,384
networks of two spaces, whose seven groups have 1 to 4 quarters of their full width. A supernet of each space is trained
with evidence/macro_SPACE.yaml: half as wide, on smaller and fewer images than the benchmark's networks. It scores a
sample of the networks within a percent of three shares of the multiply-adds, as the search does, and networks are
chosen in it within budgets by several methods. The study does not read the benchmark: only the summary compares its
rows with the accuracies, which are in the benchmark's two files in FOLDER.

A network is named by its quarters, such as 4321432. Its multiply-adds and parameters in the rows are those of the
benchmark's network at 32x32; budgets limit those of the supernet's network.
"""

import itertools
import random
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import macro_networks
import torch
import typer
from studies import HOST, ROOT, Params, Row, StageCache, changed, collect, current_commit, load_yaml, read

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Channels
from autoslim.data.prepared import PreparedData
from autoslim.files import append_line, read_lines, run_key
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.params import check_params
from autoslim.search.scoring import CURRENT, mean_score
from autoslim.search.search import SearchSettings, scoring_runners
from autoslim.supernet.extract import load_supernet
from autoslim.tasks.classification import CLASSIFICATION
from autoslim.tracing import trace
from autoslim.training.device import to_device

HERE = Path(__file__).parent
NETWORKS = "macro_networks.py"
FILES = {"mobilenet": "Results_MobileNet.json", "resnet": "Results_ResNet.json"}
"""The benchmark's file of each space."""
SAMPLED, UNIFORM = "sampled", "uniform"
QUARTERS = 4
SIZE = 32  # of the benchmark's images


def macro(
    space: Annotated[str, typer.Argument(help="mobilenet or resnet.")],
    jobs: Annotated[int, typer.Option("--jobs", help="Number of parallel runs, each with one thread.")] = 1,
    work: Annotated[Path, typer.Option("--work", help="Folder of the cached runs.")] = ROOT / "outputs/evidence",
    only: Annotated[str | None, typer.Option("--only", help="Only these supernets, separated by commas.")] = None,
    study_file: Annotated[Path, typer.Option("--study", help="File with the study.")] = HERE / "studies.yaml",
    results: Annotated[Path, typer.Option("--results", help="Folder of the rows.")] = HERE / "results",
) -> None:
    """Score and choose networks of Channel-Bench-Macro in supernets of ours."""
    study = load_yaml(study_file)["macro"]
    params = changed(load_yaml(HERE / f"macro_{space}.yaml"), study["changes"])
    cache = StageCache(work, {NETWORKS: HERE / NETWORKS})
    graph = benchmark_graph(space)
    amounts = multiply_adds(graph)

    def rows(seed: int) -> Iterator[Row]:
        own = changed(params, {"supernet.seed": seed})
        score = _Scorer(cache, changed(own, study["searches"][study["scored_as"]]))

        def row(budget: str, method: str, network: str, choice_seconds: int) -> Row:
            costs = {"macs": amounts[network], "params": graph.params(quarters(graph, network))}
            named = {"budget": budget, "method": method, "supernet": seed, "network": network}
            return {**named, **costs, **score(network), "choice_seconds": choice_seconds}

        for share in study["shares"]:
            for network in sampled(amounts, share, study["within"], study["networks"]):
                yield row(f"{share:.0%}", SAMPLED, network, 0)
        for budget in study["budgets"][space]:
            for method in (UNIFORM, *study["searches"], *study["sampling"]):
                yield row(budget, method, *_chosen(cache, own, study, method, budget))

    seeds = [int(seed) for seed in only.split(",")] if only else study["supernets"]
    collect(rows, [(seed,) for seed in seeds], results / f"macro-{space}.csv", jobs)


def benchmark_graph(space: str) -> ChannelGraph:
    """Returns the graph of a space's widest network at the size of the benchmark's images."""
    return trace(getattr(macro_networks, space)(), torch.empty(1, 3, SIZE, SIZE))


def benchmark(folder: Path, space: str) -> dict[str, list[float]]:
    """Reads the benchmark's file of a space, and returns the top-1 of each network's trainings in percent.

    Raises:
        SystemExit: the file does not exist, or its networks are not those of ``macro_networks``.
    """
    path = folder / FILES[space]
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; --truth is the folder with the files of Channel-Bench-Macro")
    results, graph = read(path), benchmark_graph(space)
    for network, channels in configurations(graph).items():
        theirs = {name: (results.get(network) or {}).get(name) for name in ("flops", "params")}
        ours = {"flops": graph.macs(channels), "params": graph.params(channels)}
        if theirs != ours:
            raise SystemExit(f"{path} has {theirs} for the network {network}, but this network has {ours}")
    return {network: results[network]["acc"] for network in configurations(graph)}


def supernet_graph(params: Params) -> ChannelGraph:
    """Returns the graph of the supernet's network, whose costs the budgets limit."""
    model, size = params["model"], params["data"]["image_size"]
    build = getattr(macro_networks, model["name"].rpartition(":")[2])
    return trace(build(**model["kwargs"]), torch.empty(1, 3, size, size))


def configurations(graph: ChannelGraph) -> dict[str, Channels]:
    """Returns all networks of a space: name -> channels."""
    names = map("".join, itertools.product("1234", repeat=len(graph.groups)))
    return {network: quarters(graph, network) for network in names}


def multiply_adds(graph: ChannelGraph) -> dict[str, int]:
    """Returns the multiply-adds of all networks of a space."""
    return {network: graph.macs(channels) for network, channels in configurations(graph).items()}


def quarters(graph: ChannelGraph, network: str) -> Channels:
    """Returns the channels of a network. The groups of ``graph`` are in the order of the benchmark's digits."""
    digits = zip(graph.default.items(), network, strict=True)
    return {name: full * int(digit) // QUARTERS for (name, full), digit in digits}


def network_name(graph: ChannelGraph, channels: Channels) -> str:
    """Returns the name of a network of a space.

    Raises:
        ValueError: a number of channels is not a quarter of the full one.
    """
    named = "".join(str(QUARTERS * channels[name] // full) for name, full in graph.default.items())
    if quarters(graph, named) != channels:
        raise ValueError(f"{channels} are not quarters of {graph.default}")
    return named


def sampled(amounts: Mapping[str, int], share: float, within: float, count: int) -> list[str]:
    """Returns random networks whose share of the widest network's multiply-adds differs by at most ``within``."""
    full = max(amounts.values())
    near = sorted(network for network, macs in amounts.items() if abs(macs / full - share) <= within)
    return random.Random(f"share {share}").sample(near, min(count, len(near)))


def filling(amounts: Mapping[str, int], limit: float) -> list[str]:
    """Returns the networks within a limit to which no quarter of a group can be added."""

    def wider(network: str) -> Iterator[str]:
        for group, digit in enumerate(network):
            if int(digit) < QUARTERS:
                yield f"{network[:group]}{int(digit) + 1}{network[group + 1 :]}"

    fitting = [network for network, macs in amounts.items() if macs <= limit]
    return [network for network in fitting if all(amounts[other] > limit for other in wider(network))]


def _chosen(cache: StageCache, params: Params, study: Params, method: str, budget: str) -> tuple[str, int]:
    """Returns the network that a method chooses, and the processor seconds of the search and of the allocation."""
    search = study["searches"].get(method, study["searches"][study["scored_as"]])
    methods = [method] if method in study["sampling"] else [UNIFORM, "autoslim"]
    own = changed(params, {**search, "budget": budget, "methods": methods})
    name = "autoslim" if method in study["searches"] else method
    channels = read(cache.run("allocate", own) / f"outputs/channels/{name}.json")["channels"]
    stages = {"uniform": []}.get(method, ["search", "allocate"] if name == "autoslim" else ["allocate"])
    seconds = sum((cache.done(stage, own) or {})["cpu_seconds"] for stage in stages)
    return network_name(supernet_graph(params), channels), seconds


class _Scorer:
    """Scores networks in a supernet as the search does. A network that was scored before is not run again."""

    def __init__(self, cache: StageCache, params: Params) -> None:
        folder = cache.run("supernet", params)
        name = params["model"]["name"]
        checked = check_params(changed(params, {"model.name": f"{HERE}/{name}"}), "params.yaml")
        data = PreparedData.open(folder / "data/prepared", relative_to=ROOT)
        network, self._graph = traced_network(checked.model, data.info)
        supernet, _ = load_supernet(folder / "outputs/supernet", network, self._graph)
        to_device(supernet, HOST.device, channels_last=True)
        settings = SearchSettings(**checked.search.model_dump())
        self._runners, _ = scoring_runners(supernet, data, HOST, settings, checked.data.seed, CLASSIFICATION)
        self._log = folder / f"scores-{run_key(search=params['search'])}.jsonl"
        self._scores: dict[str, Row] = {line["network"]: line["row"] for line in read_lines(self._log)}
        self._shared = {"supernet_seconds": read(folder / "done.json")["cpu_seconds"]}

    def __call__(self, network: str) -> Row:
        """Returns the score on the search images, and the processor seconds and the commit."""
        if network not in self._scores:
            started, channels = time.thread_time(), quarters(self._graph, network)
            score = mean_score([run_chunk(channels, {})[CURRENT] for run_chunk in self._runners])
            values = {"search_top1": round(1 - score.error, 5), "nats": round(score.loss, 5)}
            took = {"score_seconds": round(time.thread_time() - started, 2), "commit": current_commit()}
            self._scores[network] = values | took
            append_line(self._log, {"network": network, "row": self._scores[network]})
        return self._scores[network] | self._shared
