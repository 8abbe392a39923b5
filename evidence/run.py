"""The evidence: gains of the methods over uniform widths on real images, by retraining with several seeds.

    python evidence/run.py table mobilenet_v2 --jobs 2
    python evidence/run.py networks mobilenet_v2
    python evidence/run.py resources mobilenet_v2 --only memory,params,macs
    python evidence/run.py resources mobilenet_v2 --only latency --table TABLE
    python evidence/run.py longer mobilenet_v2
    python evidence/run.py ranking mobilenet_v2
    python evidence/run.py scores mobilenet_v2
    python evidence/run.py factors mobilenet_v2
    python evidence/run.py trained efficientnet_lite0
    python evidence/run.py macro mobilenet

Each study runs the stages with a params file of this folder and the changes in evidence/studies.yaml. CIFAR-10 has to
be in data/raw/cifar10 (see docs/guide/data.md). Finished runs are cached in outputs/evidence; an interrupted study
continues from them. The rows of all trainings finished so far are written to evidence/results.
"""

import math
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from macro import macro
from studies import (
    HOST,
    ROOT,
    Params,
    Row,
    StageCache,
    changed,
    collect,
    load_yaml,
    read,
    retrained,
    screening,
    start_files,
)
from trained import trained

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import GridSpec
from autoslim.channels.groups import Channels
from autoslim.data.batches import eval_batches, search_chunks
from autoslim.data.prepared import PreparedData
from autoslim.pipeline.assembly import grid_spec, traced_network
from autoslim.pipeline.params import check_params
from autoslim.resources.budgets import parse_budget
from autoslim.resources.costs import Costs
from autoslim.search.methods import allocate
from autoslim.supernet.extract import load_supernet
from autoslim.supernet.recalibration import recalibrate
from autoslim.tasks.classification import Classification
from autoslim.tasks.evaluation import evaluate
from autoslim.training.device import autocast

HERE = Path(__file__).parent
app = typer.Typer(add_completion=False, help=__doc__)
Network = Annotated[str, typer.Argument(help="A params file of this folder, without .yaml.")]
Jobs = Annotated[int, typer.Option("--jobs", help="Number of parallel runs, each with one thread.")]
Work = Annotated[Path, typer.Option("--work", help="Folder of the cached runs.")]
CACHE = ROOT / "outputs/evidence"
app.command()(trained)
app.command()(macro)


@app.command()
def table(network: Network, jobs: Jobs = 1, work: Work = CACHE) -> None:
    """Train uniform and autoslim networks for several searches and budgets, from scratch and fine-tuned."""
    study, params = load_yaml(HERE / "studies.yaml")["table"], load_yaml(HERE / f"{network}.yaml")
    cache = StageCache(work)

    def rows(regime: str, search: str | None, supernet: int) -> Iterator[Row]:
        changes = study["regimes"][regime] | (study["searches"][search] if search else {})
        changed_params = changed(params, {"supernet.seed": supernet, **changes})
        method, start = "autoslim" if search else "uniform", changed_params["retrain"]["start"]
        seeds = study["seeds_of_uniform" if (method, start) == ("uniform", "scratch") else "seeds"]
        for row in _compared(cache, changed_params, study["budgets"][network], method, seeds):
            yield {"regime": regime, "start": start, "method": method, "search": search, "supernet": supernet, **row}

    def depends(regime: str, search: str | None) -> bool:
        return search is not None or changed(params, study["regimes"][regime])["retrain"]["start"] == "supernet"

    parts = [
        (regime, search, supernet)
        for supernet in study["supernets"]
        for regime in study["regimes"]
        for search in (*study["searches"], None)  # None: uniform
        if supernet == study["supernets"][0] or depends(regime, search)
    ]
    collect(rows, parts, HERE / "results" / f"table-{network}.csv", jobs)


@app.command()
def networks(network: Network, work: Work = CACHE) -> None:
    """List the channels that the finished searches of the study table found, and the time of supernets and searches."""
    study, params = load_yaml(HERE / "studies.yaml")["table"], load_yaml(HERE / f"{network}.yaml")
    cache = StageCache(work)

    def rows(supernet: int, search: str) -> Iterator[Row]:
        changed_params = changed(params, {"supernet.seed": supernet, **study["searches"][search]})
        runs = {stage: cache.done(stage, changed_params) for stage in ("supernet", "search")}
        for budget in study["budgets"][network] if runs["search"] else ():
            folder = cache.run("allocate", changed(changed_params, {"budget": budget}))
            channels = read(folder / "outputs/channels/autoslim.json")["channels"]
            times = {f"{stage}_{name}": value for stage, done in runs.items() for name, value in (done or {}).items()}
            yield {"supernet": supernet, "search": search, "budget": budget, **times, **channels}

    parts = [(supernet, search) for supernet in study["supernets"] for search in study["searches"]]
    collect(rows, parts, HERE / "results" / f"networks-{network}.csv", jobs=1)


@app.command()
def resources(
    network: Network,
    jobs: Jobs = 1,
    work: Work = CACHE,
    only: Annotated[str | None, typer.Option("--only", help="Only these resources, separated by commas.")] = None,
    table: Annotated[Path | None, typer.Option("--table", help="Latency table of the network, for latency.")] = None,
) -> None:
    """Fine-tune uniform and autoslim networks within budgets of several resources, for two searches."""
    study, params = load_yaml(HERE / "studies.yaml")["resources"], load_yaml(HERE / f"{network}.yaml")
    cache = StageCache(work)

    def rows(resource: str, search: str | None, supernet: int) -> Iterator[Row]:
        changes = study["regime"] | study["searches"][search or next(iter(study["searches"]))]
        if resource == "latency":
            changes |= {
                "latency.table": str((table or Path("latency.json")).resolve()),
                "latency.runtime": "onnxruntime",
            }
        changed_params = changed(params, {"supernet.seed": supernet, "resource": resource, **changes})
        method = "autoslim" if search else "uniform"
        budgets, costs = [study["budgets"][resource]], ("macs", "params", "memory")
        for row in _compared(cache, changed_params, budgets, method, study["seeds"], costs):
            named = {"resource": resource, "method": method, "search": search, "supernet": supernet}
            stages = {"search": changed_params, "allocate": changed(changed_params, {"budget": budgets[0]})}
            took = {
                f"{stage}_seconds": (cache.done(stage, own) or {})["cpu_seconds"] if search else None
                for stage, own in stages.items()
            }
            yield {**named, **took, **row}

    chosen = only.split(",") if only else list(study["budgets"])
    parts = [
        (resource, search, supernet)
        for resource in chosen
        for supernet in study["supernets"]
        for search in (None, *study["searches"])  # None: uniform
    ]
    for resource in chosen:  # one file for each resource, so that they can be run one by one
        own = [part for part in parts if part[0] == resource]
        collect(rows, own, HERE / "results" / f"resources-{resource}-{network}.csv", jobs)


@app.command()
def longer(network: Network, jobs: Jobs = 1, work: Work = CACHE) -> None:
    """Train uniform and autoslim networks from scratch for as long as supernet, search and retraining take together."""
    study, params = load_yaml(HERE / "studies.yaml")["longer"], load_yaml(HERE / f"{network}.yaml")
    cache = StageCache(work)

    def rows(budget: str, search: str | None, supernet: int, seed: int) -> Iterator[Row]:
        changes = study["changes"] | (study["searches"][search] if search else {})
        changed_params = changed(params, {"supernet.seed": supernet, **changes})
        for row in _compared(cache, changed_params, [budget], "autoslim" if search else "uniform", [seed]):
            yield {"epochs": changed_params["retrain"]["epochs"], "search": search, "supernet": supernet, **row}

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
    collect(rows, parts, HERE / "results" / f"longer-{network}.csv", jobs)


@app.command()
def factors(network: Network, jobs: Jobs = 1, work: Work = CACHE) -> None:
    """Fine-tune uniform and autoslim networks from supernets trained in twelve ways, with two searches in each."""
    study, params = load_yaml(HERE / "studies.yaml")["factors"], load_yaml(HERE / f"{network}.yaml")
    cache, screened = StageCache(work), _screened(study, params)

    def rows(supernet: int, way: int, method: str) -> Iterator[Row]:
        changes, changed_params = screened[supernet][way]
        if method == "uniform":  # it does not depend on the search
            changes = changes | dict.fromkeys(study["search"])
        for row in _compared(cache, changed_params, study["budgets"][network], method, study["seeds"]):
            yield {"supernet": supernet, "method": method, **changes, **row}

    ways = [(0, "autoslim"), (1, "autoslim"), (0, "uniform")]
    parts = [(supernet, *way) for supernet in range(len(screened)) for way in ways]
    collect(rows, parts, HERE / "results" / f"factors-{network}.csv", jobs)


@app.command()
def ranking(network: Network, jobs: Jobs = 1, work: Work = CACHE) -> None:
    """Train random networks of one size, and networks along a search, from scratch."""
    study, params = load_yaml(HERE / "studies.yaml")["ranking"], load_yaml(HERE / f"{network}.yaml")
    cache = StageCache(work)
    graph = _graph(cache, params)
    budget = study["budget"][network]
    networks = _networks(cache, params, graph, study, budget)

    def rows(kind: str, number: int, seed: int) -> Iterator[Row]:
        channels = networks[kind, number]
        costs = {"macs": graph.macs(channels), "params": graph.params(channels)}
        trained = retrained(cache, params, start_files(channels), seed)
        yield {"kind": kind, "network": number, "budget": budget, **costs, "seed": seed, **trained}

    parts = [(kind, number, seed) for seed in study["seeds"] for kind, number in networks]
    collect(rows, parts, HERE / "results" / f"ranking-{network}.csv", jobs)


@app.command()
def scores(network: Network, jobs: Jobs = 1, work: Work = CACHE) -> None:
    """Score the networks of the study ranking in its supernets and in those of the study factors."""
    studies, params = load_yaml(HERE / "studies.yaml"), load_yaml(HERE / f"{network}.yaml")
    study, cache = studies["ranking"], StageCache(work)
    networks = _networks(cache, params, _graph(cache, params), study, study["budget"][network])
    screened = _screened(studies["factors"], params)

    def rows(source: str, supernet: int) -> Iterator[Row]:
        changed_params = (
            changed(params, {"supernet.seed": supernet}) if source == "ranking" else screened[supernet][0][1]
        )
        score = _scorer(cache, changed_params, study["images"])
        for (kind, number), channels in networks.items():
            if (
                source == "ranking" or kind == "random"
            ):  # some networks along the search are too wide for other supernets
                for scored in score(channels):
                    yield {"study": source, "supernet": supernet, "kind": kind, "network": number, **scored}

    parts = [("ranking", supernet) for supernet in study["supernets"]]
    parts += [("factors", supernet) for supernet in range(len(screened))]
    collect(rows, parts, HERE / "results" / f"scores-{network}.csv", jobs)


def _screened(study: Params, params: Params) -> list[list[tuple[Params, Params]]]:
    """Returns the changes and the parameters of the study ``factors``: for each supernet those of its two searches."""
    ways = []
    for seed, changes in enumerate(screening(study["supernet"] | study["search"])):
        other = {
            name: next(value for value in study["search"][name] if value != changes[name]) for name in study["search"]
        }
        common = study["regime"] | {"supernet.seed": seed}
        ways.append([(each, changed(params, common | each)) for each in (changes, changes | other)])
    return ways


def _compared(
    cache: StageCache,
    params: Params,
    budgets: Sequence[str],
    method: str,
    seeds: Sequence[int],
    costs: Sequence[str] = ("macs", "params"),
) -> Iterator[Row]:
    """Yields the results of a method's networks, trained at each budget with each seed."""
    for budget in budgets:
        changed_params = changed(params, {"budget": budget})
        channels = cache.run("allocate", changed_params) / "outputs/channels"
        allocation = read(channels / f"{method}.json")
        files = start_files(
            allocation["channels"], (channels / f"{method}.safetensors").read_bytes(), allocation["start"]
        )
        amounts = {name: allocation["costs"][name] for name in costs}
        for seed in seeds:
            yield {"budget": budget, **amounts, "seed": seed, **retrained(cache, changed_params, files, seed)}


def _random_network(graph: ChannelGraph, budget: str, spread: float, spec: GridSpec, seed: int) -> Channels:
    """Draws each group's width around a common width (log-normal), chosen so that the network fills the budget.

    Channels are multiples of the grid's divisor between the supernet's narrowest and widest, not on the grid itself.
    """
    generator = random.Random(f"network {seed}")
    widths = {name: math.exp(generator.gauss(0, spread)) for name in graph.groups}
    limit = parse_budget(budget).absolute(graph.macs())
    options = {
        name: [count for count in range(0, grid[0] + 1, spec.divisor) if grid[-1] <= count <= grid[0]]
        for name, grid in graph.grid(spec).items()
    }

    def configuration(common: float) -> Channels:
        sizes = {name: group.size * common * widths[name] for name, group in graph.groups.items()}
        return {name: min(counts, key=lambda count: abs(count - sizes[name])) for name, counts in options.items()}

    common = max(n / 1000 for n in range(100, 3000) if graph.macs(configuration(n / 1000)) <= limit)
    channels = configuration(common)
    for name in generator.sample(sorted(options), len(options)):  # fills the rest of the budget group by group
        wider = channels | {name: channels[name] + spec.divisor}
        if wider[name] in options[name] and graph.macs(wider) <= limit:
            channels = wider
    return channels


def _graph(cache: StageCache, params: Params) -> ChannelGraph:
    data = PreparedData.open(cache.run("prepare", params) / "data/prepared", relative_to=ROOT)
    return traced_network(check_params(params, "params.yaml").model, data.info)[1]


def _networks(
    cache: StageCache, params: Params, graph: ChannelGraph, study: Params, budget: str
) -> dict[tuple[str, int], Channels]:
    """Returns the networks of the study ``ranking``: random ones, and those along the search of the first supernet."""
    reach = grid_spec(check_params(changed(params, study["within"]), "params.yaml").supernet)
    random_networks = {
        ("random", seed): _random_network(graph, budget, study["spread"], reach, seed)
        for seed in range(study["networks"])
    }
    changed_params = changed(params, {"supernet.seed": study["supernets"][0]})
    steps = read(cache.run("search", changed_params) / "outputs/search/trajectory.json")["steps"]
    configurations = [step["channels"] for step in steps]
    limits = [{"macs": parse_budget(budget).absolute(graph.macs())} for budget in study["along"]]
    along = (allocate("autoslim", Costs(graph), configurations, limit) for limit in limits)
    return random_networks | {("trajectory", number): channels for number, channels in enumerate(along)}


def _scorer(cache: StageCache, params: Params, images: Sequence[int]) -> Callable[[Channels], Iterator[Row]]:
    """Returns a function that scores a configuration in a supernet, with batch and with running statistics."""
    folder = cache.run("supernet", params)
    checked = check_params(params, "params.yaml")
    data = PreparedData.open(folder / "data/prepared", relative_to=ROOT)
    network, graph = traced_network(checked.model, data.info)
    supernet, _ = load_supernet(folder / "outputs/supernet", network, graph)
    cast, chunk = autocast(HOST.device, "fp32"), checked.search.chunk
    chunks = {
        count: search_chunks(data, images=count, chunk=chunk, seed=0, device=HOST.device, workers=HOST.workers)
        for count in images
    }
    batches = eval_batches(data, "train", batch_size=chunk, device=HOST.device, limit=2048, shuffled_by=0)
    training = [batch for batch, _ in batches]

    def score(channels: Channels) -> Iterator[Row]:
        plain = supernet.extract(channels)
        recalibrate(plain, training)
        supernet.select(channels)
        for count in images:
            for statistics, scored in (("batch", supernet), ("running", plain)):
                result = evaluate(Classification(), scored, chunks[count], cast)
                values = {"top1": round(1 - result.error, 5), "nats": round(result.loss, 4)}
                yield {"images": count, "statistics": statistics, **values}

    return score


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: the time of what is stopped is recorded
    app()
