"""The evidence: what the methods gain over uniform widths on real images, by retraining, with all seeds.

    python evidence/run.py table mobilenet_v2 --jobs 2
    python evidence/run.py networks mobilenet_v2
    python evidence/run.py longer mobilenet_v2
    python evidence/run.py ranking mobilenet_v2
    python evidence/run.py scores mobilenet_v2
    python evidence/run.py factors mobilenet_v2

Runs the stages themselves with the params files of this folder, and what evidence/studies.yaml varies. CIFAR-10 lies in
data/raw/cifar10, as the README says. A study that was stopped goes on where it was: what is done is kept in
outputs/evidence. Its rows go to evidence/results, with those of the trainings that are done so far.
"""

import json
import math
import os
import platform
import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save
from studies import ROOT, Params, Pieces, changed, load_yaml, read, screening

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Span
from autoslim.channels.groups import Channels
from autoslim.data.batches import eval_batches, search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.pipeline.assembly import recipe, span, traced_network
from autoslim.pipeline.params import check_params
from autoslim.resources.budgets import parse_budget
from autoslim.resources.costs import Costs
from autoslim.resources.latency.measure import processor
from autoslim.search.methods import allocate
from autoslim.supernet.extract import load_supernet, recalibrate
from autoslim.tasks.classification import evaluate
from autoslim.training.checkpoints import write_json
from autoslim.training.device import RunContext, autocast
from autoslim.training.loop import write_rows
from autoslim.training.retrain import retrained_top1

HERE = Path(__file__).parent
HOST = RunContext(torch.device("cpu"), 1, 300.0)
Row = dict[str, Any]
Files = dict[str, bytes]
app = typer.Typer(add_completion=False, help=__doc__)
Network = Annotated[str, typer.Argument(help="A params file of this folder, without .yaml.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Runs side by side, of one thread each.")]
Work = Annotated[Path, typer.Option("--work", help="Where everything is kept.")]
KEPT = ROOT / "outputs/evidence"


@app.command()
def table(network: Network, jobs: Jobs = 1, work: Work = KEPT) -> None:
    """Uniform and autoslim, by several searches, at several budgets, from scratch and from the supernet's weights."""
    study, params = load_yaml(HERE / "studies.yaml")["table"], load_yaml(HERE / f"{network}.yaml")
    pieces = Pieces(work)

    def rows(regime: str, search: str | None, supernet: int) -> Iterator[Row]:
        changes = study["regimes"][regime] | (study["searches"][search] if search else {})
        own = changed(params, {"supernet.seed": supernet, **changes})
        method, start = "autoslim" if search else "uniform", own["retrain"]["start"]
        seeds = study["seeds_of_uniform" if (method, start) == ("uniform", "scratch") else "seeds"]
        for row in _compared(pieces, own, study["budgets"][network], method, seeds):
            yield {"regime": regime, "start": start, "method": method, "search": search, "supernet": supernet, **row}

    def depends(regime: str, search: str | None) -> bool:
        return search is not None or changed(params, study["regimes"][regime])["retrain"]["start"] == "supernet"

    parts = [
        (regime, search, supernet)
        for supernet in study["supernets"]
        for regime in study["regimes"]
        for search in (*study["searches"], None)  # none: uniform
        if supernet == study["supernets"][0] or depends(regime, search)
    ]
    _collect(rows, parts, HERE / "results" / f"table-{network}.csv", jobs)


@app.command()
def networks(network: Network, work: Work = KEPT) -> None:
    """The channels that the table's searches found, and what each supernet and search took, of those that are done."""
    study, params = load_yaml(HERE / "studies.yaml")["table"], load_yaml(HERE / f"{network}.yaml")
    pieces = Pieces(work)

    def rows(supernet: int, search: str) -> Iterator[Row]:
        own = changed(params, {"supernet.seed": supernet, **study["searches"][search]})
        made = {stage: pieces.done(stage, own) for stage in ("supernet", "search")}
        for budget in study["budgets"][network] if made["search"] else ():
            folder = pieces.run("allocate", changed(own, {"budget": budget}))
            channels = read(folder / "outputs/channels/autoslim.json")["channels"]
            took = {f"{stage}_{name}": value for stage, done in made.items() for name, value in (done or {}).items()}
            yield {"supernet": supernet, "search": search, "budget": budget, **took, **channels}

    parts = [(supernet, search) for supernet in study["supernets"] for search in study["searches"]]
    _collect(rows, parts, HERE / "results" / f"networks-{network}.csv", jobs=1)


@app.command()
def longer(network: Network, jobs: Jobs = 1, work: Work = KEPT) -> None:
    """From scratch, uniform and what autoslim found, for as long as supernet, search and retraining take together."""
    study, params = load_yaml(HERE / "studies.yaml")["longer"], load_yaml(HERE / f"{network}.yaml")
    pieces = Pieces(work)

    def rows(budget: str, search: str | None, supernet: int, seed: int) -> Iterator[Row]:
        changes = study["changes"] | (study["searches"][search] if search else {})
        own = changed(params, {"supernet.seed": supernet, **changes})
        for row in _compared(pieces, own, [budget], "autoslim" if search else "uniform", [seed]):
            yield {"epochs": own["retrain"]["epochs"], "search": search, "supernet": supernet, **row}

    first, seeds = study["supernets"][0], study["seeds"]
    parts = [
        *((budget, None, first, seed) for budget in study["budgets"][network] for seed in seeds),
        *(
            (budget, search, supernet, seeds[0])
            for budget in study["budgets"][network]
            for search in study["searches"]
            for supernet in study["supernets"]
        ),
    ]
    _collect(rows, parts, HERE / "results" / f"longer-{network}.csv", jobs)


@app.command()
def factors(network: Network, jobs: Jobs = 1, work: Work = KEPT) -> None:
    """Uniform and autoslim, fine-tuned from supernets that are trained in twelve ways, and searched in two."""
    study, params = load_yaml(HERE / "studies.yaml")["factors"], load_yaml(HERE / f"{network}.yaml")
    pieces, screened = Pieces(work), _screened(study, params)

    def rows(supernet: int, way: int, method: str) -> Iterator[Row]:
        changes, own = screened[supernet][way]
        if method == "uniform":  # which no search changes
            changes = changes | dict.fromkeys(study["search"])
        for row in _compared(pieces, own, study["budgets"][network], method, study["seeds"]):
            yield {"supernet": supernet, "method": method, **changes, **row}

    ways = [(0, "autoslim"), (1, "autoslim"), (0, "uniform")]
    parts = [(supernet, *way) for supernet in range(len(screened)) for way in ways]
    _collect(rows, parts, HERE / "results" / f"factors-{network}.csv", jobs)


@app.command()
def ranking(network: Network, jobs: Jobs = 1, work: Work = KEPT) -> None:
    """Random networks of one size, and networks along a search, retrained from scratch."""
    study, params = load_yaml(HERE / "studies.yaml")["ranking"], load_yaml(HERE / f"{network}.yaml")
    pieces = Pieces(work)
    graph = _graph(pieces, params)
    budget = study["budget"][network]
    networks = _networks(pieces, params, graph, study, budget)

    def rows(kind: str, number: int, seed: int) -> Iterator[Row]:
        channels = networks[kind, number]
        costs = {"macs": graph.macs(channels), "params": graph.params(channels)}
        trained = _trained(pieces, params, _start(channels), seed)
        yield {"kind": kind, "network": number, "budget": budget, **costs, "seed": seed, **trained}

    parts = [(kind, number, seed) for seed in study["seeds"] for kind, number in networks]
    _collect(rows, parts, HERE / "results" / f"ranking-{network}.csv", jobs)


@app.command()
def scores(network: Network, jobs: Jobs = 1, work: Work = KEPT) -> None:
    """The networks of the study ``ranking``, scored in its supernets and in those of the study ``factors``."""
    studies, params = load_yaml(HERE / "studies.yaml"), load_yaml(HERE / f"{network}.yaml")
    study, pieces = studies["ranking"], Pieces(work)
    networks = _networks(pieces, params, _graph(pieces, params), study, study["budget"][network])
    screened = _screened(studies["factors"], params)

    def rows(of: str, supernet: int) -> Iterator[Row]:
        own = changed(params, {"supernet.seed": supernet}) if of == "ranking" else screened[supernet][0][1]
        score = _scorer(pieces, own, study["images"])
        for (kind, number), channels in networks.items():
            if of == "ranking" or kind == "random":  # narrower supernets lack some along the search
                for scored in score(channels):
                    yield {"study": of, "supernet": supernet, "kind": kind, "network": number, **scored}

    parts = [("ranking", supernet) for supernet in study["supernets"]]
    parts += [("factors", supernet) for supernet in range(len(screened))]
    _collect(rows, parts, HERE / "results" / f"scores-{network}.csv", jobs)


def _screened(study: Params, params: Params) -> list[list[tuple[Params, Params]]]:
    """The supernets of the study ``factors``, each searched twice: what is changed, and the parameters."""
    ways = []
    for seed, changes in enumerate(screening(study["supernet"] | study["search"])):
        other = {
            name: next(value for value in study["search"][name] if value != changes[name]) for name in study["search"]
        }
        common = study["regime"] | {"supernet.seed": seed}
        ways.append([(each, changed(params, common | each)) for each in (changes, changes | other)])
    return ways


def _compared(
    pieces: Pieces, params: Params, budgets: Sequence[str], method: str, seeds: Sequence[int]
) -> Iterator[Row]:
    """Trains what a method gives from a supernet at each budget, with each seed."""
    for budget in budgets:
        asked = changed(params, {"budget": budget})
        channels = pieces.run("allocate", asked) / "outputs/channels"
        allocation = read(channels / f"{method}.json")
        files = _start(allocation["channels"], (channels / f"{method}.safetensors").read_bytes())
        costs = {name: allocation["costs"][name] for name in ("macs", "params")}
        for seed in seeds:
            yield {"budget": budget, **costs, "seed": seed, **_trained(pieces, asked, files, seed)}


def _start(channels: Channels, weights: bytes | None = None) -> Files:
    """What the stage ``retrain`` reads of the stage before, under one name whatever the method."""
    chosen = {"method": "autoslim", "channels": channels, "costs": {"macs": 0}}
    asked = {"autoslim": {"budget": "", "resource": ""}}
    return {
        "outputs/channels/autoslim.json": json.dumps(chosen).encode(),
        "outputs/channels/budgets.json": json.dumps(asked).encode(),
        "outputs/channels/autoslim.safetensors": save({}) if weights is None else weights,
    }


def _trained(pieces: Pieces, params: Params, files: Files, seed: int) -> Row:
    """Retrains channels with one seed: top-1 on the search split and on the test split, and what that took."""
    own = changed(params, {"retrain.seeds": [seed]})
    folder = pieces.run("retrain", own, "autoslim", files=files)
    kept = folder / "accuracy.json"
    if not kept.exists():
        checked = check_params(own, "params.yaml")
        data = PreparedData.open(folder / "data/prepared", relative_to=ROOT)
        network, graph = traced_network(checked.model, data.info)
        channels = read(folder / "outputs/channels/autoslim.json")["channels"]
        weights = folder / "outputs/retrain/autoslim/weights"
        top1 = retrained_top1(
            network, graph, channels, data, recipe(checked.retrain), HOST, seeds=[seed], folder=weights
        )
        seen = read(folder / "outputs/retrain/autoslim/metrics.json")["search_top1"]["mean"]
        write_json(kept, {"search_top1": round(seen, 5), "top1": round(top1[seed], 5)})
    values: Row = read(kept) | read(folder / "done.json")
    return values


def _random_network(graph: ChannelGraph, budget: str, spread: float, span: Span, seed: int) -> Channels:
    """Each group's width drawn around a common one (log-normal), which is set so that the budget is just held.

    In multiples of the grid's divisor from the narrowest to the widest that the supernet has, not on the grid.
    """
    draw = random.Random(f"network {seed}")
    widths = {name: math.exp(draw.gauss(0, spread)) for name in graph.groups}
    limit = parse_budget(budget).absolute(graph.macs())
    options = {
        name: [count for count in range(0, grid[0] + 1, span.divisor) if grid[-1] <= count <= grid[0]]
        for name, grid in span.grid(graph).items()
    }

    def at(common: float) -> Channels:
        sizes = {name: group.size * common * widths[name] for name, group in graph.groups.items()}
        return {name: min(counts, key=lambda count: abs(count - sizes[name])) for name, counts in options.items()}

    channels = at(max(number / 1000 for number in range(100, 3000) if graph.macs(at(number / 1000)) <= limit))
    for name in draw.sample(sorted(options), len(options)):  # what one step of all left over
        wider = channels | {name: channels[name] + span.divisor}
        if wider[name] in options[name] and graph.macs(wider) <= limit:
            channels = wider
    return channels


def _graph(pieces: Pieces, params: Params) -> ChannelGraph:
    data = PreparedData.open(pieces.run("prepare", params) / "data/prepared", relative_to=ROOT)
    return traced_network(check_params(params, "params.yaml").model, data.info)[1]


def _networks(
    pieces: Pieces, params: Params, graph: ChannelGraph, study: Params, budget: str
) -> dict[tuple[str, int], Channels]:
    """The networks of the study ``ranking``: random ones, and those along the search of the first supernet."""
    reach = span(check_params(changed(params, study["within"]), "params.yaml").supernet)
    drawn = {
        ("random", seed): _random_network(graph, budget, study["spread"], reach, seed)
        for seed in range(study["networks"])
    }
    own = changed(params, {"supernet.seed": study["supernets"][0]})
    steps = read(pieces.run("search", own) / "outputs/search/trajectory.json")["steps"]
    configurations = [step["channels"] for step in steps]
    limits = [{"macs": parse_budget(budget).absolute(graph.macs())} for budget in study["along"]]
    along = (allocate("autoslim", Costs(graph), configurations, limit) for limit in limits)
    return drawn | {("trajectory", number): channels for number, channels in enumerate(along)}


def _scorer(pieces: Pieces, params: Params, images: Sequence[int]) -> Callable[[Channels], Iterator[Row]]:
    """Scores a configuration in the supernet on so many search images, with batch statistics and with running ones."""
    folder = pieces.run("supernet", params)
    checked = check_params(params, "params.yaml")
    data = PreparedData.open(folder / "data/prepared", relative_to=ROOT)
    network, graph = traced_network(checked.model, data.info)
    supernet, _ = load_supernet(folder / "outputs/supernet", network, graph)
    cast, chunk = autocast(HOST.device, "fp32"), checked.search.chunk
    chunks = {
        count: search_chunks(data, images=count, chunk=chunk, seed=0, device=HOST.device, workers=HOST.workers)
        for count in images
    }
    shown = eval_batches(data, "train", batch_size=chunk, device=HOST.device, limit=2048, shuffled_by=0)
    training = [batch for batch, _ in shown]

    def score(channels: Channels) -> Iterator[Row]:
        plain = supernet.extract(channels)
        recalibrate(plain, training)
        supernet.select(channels)
        for count in images:
            for statistics, scored in (("batch", supernet), ("running", plain)):
                found = evaluate(scored, chunks[count], cast)
                figures = {"top1": round(1 - found.error, 5), "nats": round(found.cross_entropy, 4)}
                yield {"images": count, "statistics": statistics, **figures}

    return score


def _collect(rows: Callable[..., Iterator[Row]], parts: Sequence[tuple[Any, ...]], to: Path, jobs: int) -> None:
    """Runs the parts, and writes the rows of all that are done after each training, in the parts' order.

    A part that fails ends the study when the others are done.
    """
    done: dict[int, list[Row]] = {number: [] for number in range(len(parts))}
    lock = threading.Lock()

    def run(number: int) -> None:
        torch.set_num_threads(1)
        for row in rows(*parts[number]):
            with lock:
                done[number].append(row)
                print(", ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)
                _write(to, [each for group in done.values() for each in group])

    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(run, number) for number in range(len(parts))]
    for each in runs:
        each.result()


def _write(path: Path, rows: Sequence[Row]) -> None:
    write_rows(path, rows)
    machine = {
        "command": " ".join(["python", *sys.argv]),
        "processor": f"{processor()}, {os.cpu_count()} cores, one for a run",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    write_json(path.with_suffix(".json"), machine)


if __name__ == "__main__":
    app()
