"""Compares variants of the search: time, images evaluated, and accuracy of the networks found, on unseen images.

    python benchmarks/search.py --seeds 0,1,2 --to benchmarks/results/search.json
    python benchmarks/search.py --quick

For each seed, it trains one supernet from benchmarks/search.yaml (CIFAR-10 in data/raw/cifar10, see docs/guide/data.md)
and runs the search on it with each variant, and the refinement for each budget. The network found at each budget is
scored in the supernet on the test split and compared, image by image, with the one of the first variant. Times are
processor seconds. Finished parts are reused as long as code and parameters do not change. ``--quick`` takes a few
minutes and needs no data: it uses scikit-learn's digits at 16x16 and a dozen steps from a supernet a tenth wider than
the default network. It checks the speed, not the networks found.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import torch
import typer
from ruamel.yaml import YAML

from autoslim.channels.grid import Grid
from autoslim.data.batches import eval_batches, even_chunk
from autoslim.data.prepared import PreparedData
from autoslim.files import file_digest, run_key
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.params import Params, check_params
from autoslim.resources.budgets import parse_budget
from autoslim.resources.costs import Costs, Objective
from autoslim.resources.latency.measure import processor
from autoslim.search.methods import allocate
from autoslim.search.racing import chunk_runners
from autoslim.search.refinement import refine_within
from autoslim.search.scoring import CURRENT, Outcome, concatenated
from autoslim.search.search import SearchSettings, search
from autoslim.supernet.extract import load_supernet
from autoslim.supernet.supernet import Supernet
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import RunContext, autocast

HERE = Path(__file__).parent
ROOT = HERE.parent
Changes = dict[str, dict[str, Any]]
PAPER = {"score": "error", "per_cost": False, "step": 0.0, "precision": "bf16"}
DEFAULT = {"score": "cross_entropy", "per_cost": True, "step": 0.05, "precision": "bf16"}
REFINED = "default"  # the variant whose networks are refined
VARIANTS: Changes = {  # the first one is the reference
    "paper, risk 0.03": PAPER | {"incremental": True, "risk": 0.03},
    "paper, exhaustive, fp32": PAPER | {"incremental": False, "risk": None, "precision": "fp32"},
    "paper, incremental": PAPER | {"incremental": True, "risk": None},
    "cross-entropy per MAC": DEFAULT | {"incremental": True, "risk": 0.03, "step": 0.0},
    REFINED: DEFAULT | {"incremental": True, "risk": 0.1},
}


QUICK: Changes = {
    "data": {"source": "digits", "train_images": None, "search_images": 640},
    "supernet": {"width": 1.1, "epochs": 15},
    "search": {"images": 320, "chunk": 40, "stop": 1.0},
}


def main(
    seeds: Annotated[str, typer.Option(help="Seeds of the supernets, separated by commas.")] = "0,1,2",
    budgets: Annotated[str, typer.Option(help="Budgets at which the networks are compared.")] = "100%,50%,25%",
    variants: Annotated[str, typer.Option(help="Variants of the search, separated by semicolons.")] = ";".join(
        VARIANTS
    ),
    to: Annotated[Path, typer.Option(help="JSON file for all results.")] = HERE / "results" / "search.json",
    work: Annotated[Path, typer.Option(help="Folder for supernets and trajectories.")] = ROOT / "outputs" / "bench",
    quick: Annotated[
        bool, typer.Option("--quick", help="Search one supernet of the digits for a dozen steps.")
    ] = False,
) -> None:
    """Run the benchmark and print a table."""
    rows: list[dict[str, Any]] = []
    changes = QUICK if quick else {}
    if quick:
        seeds, budgets, work = "0", "100%", work / "quick"
        to = work / "search.json"
        variants = "paper, risk 0.03;paper, exhaustive, fp32;paper, incremental;default"
    for seed in map(int, seeds.split(",")):
        folder = work / f"seed-{seed}-{file_digest(HERE / 'search.yaml')[:8]}"
        _stages(folder, changes, {"supernet": {"seed": seed}}, "prepare", "resources", "supernet")
        for variant in variants.split(";"):
            rows.append({"seed": seed, "way": variant, **_search(folder, changes, variant, seed, budgets.split(","))})
            print(f"seed {seed}: {variant}: {rows[-1]['seconds']:.1f} s", file=sys.stderr)
        selected = [row for row in rows if row["seed"] == seed]
        _compare(folder, selected, budgets.split(","))
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps({"machine": _machine(), "command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    _print(rows, budgets.split(","))


def _stages(folder: Path, basis: Changes, changes: Changes, *stages: str) -> None:
    """Runs stages whose outputs do not exist yet, with the changes of ``basis`` and then of ``changes``."""
    folder.mkdir(parents=True, exist_ok=True)
    params = YAML(typ="safe").load((HERE / "search.yaml").read_text())
    for section, values in (*basis.items(), *changes.items()):
        params[section] |= values
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)
    results = {
        "prepare": "data/prepared/data.json",
        "resources": "outputs/resources/objective.json",
        "supernet": "outputs/supernet/metrics.json",
    }
    for stage in stages:
        if stage not in results or not (folder / results[stage]).exists():
            subprocess.run([sys.executable, str(ROOT / "stages" / f"{stage}.py")], cwd=folder, check=True)


def _search(folder: Path, basis: Changes, variant: str, seed: int, budgets: list[str]) -> dict[str, Any]:
    """Returns the metrics and networks of a search and its refinements; runs them if there is no result yet."""
    folders = ("channels", "tracing", "data", "tasks", "training", "models", "resources", "supernet", "search")
    code = [path for name in folders for path in sorted((ROOT / "autoslim" / name).rglob("*.py"))]
    key = run_key(
        way=VARIANTS[variant], budgets=budgets, params=file_digest(HERE / "search.yaml"), code=file_digest(*code)
    )
    result = folder / f"{variant.replace(', ', '-').replace(' ', '-')}-{key}.json"
    if not result.exists():
        _stages(folder, basis, {"supernet": {"seed": seed}, "search": VARIANTS[variant]})
        result.write_text(json.dumps(_run_search(folder, variant, budgets)))
    values: dict[str, Any] = json.loads(result.read_text())
    return values


def _run_search(folder: Path, variant: str, budgets: list[str]) -> dict[str, Any]:
    params, data, supernet, grid = _supernet(folder)
    costs, context, settings = (
        Costs(supernet.graph),
        RunContext(torch.device("cpu"), 1),
        SearchSettings(**params.search.model_dump()),
    )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        started = time.process_time()
        trajectory = search(
            supernet,
            grid,
            data,
            context,
            objective=Objective(costs, "macs"),
            settings=settings,
            seed=0,
            folder=Path(work),
            checkpoints=Checkpoints(Path(work), "search", "all"),
        )
        seconds = time.process_time() - started
        metrics = json.loads((Path(work) / "metrics.json").read_text())
        found, refining = {}, []
        for budget in budgets:
            limits = {"macs": parse_budget(budget).absolute(supernet.graph.macs())}
            configurations = [step["channels"] for step in trajectory["steps"]]
            channels = allocate("autoslim", costs, configurations, limits)
            if variant == REFINED:
                started = time.process_time()
                refined = refine_within(
                    supernet,
                    grid,
                    data,
                    context,
                    channels=channels,
                    costs=costs,
                    limits=limits,
                    divisor=params.supernet.grid.divisor,
                    settings=settings,
                    seed=0,
                    checkpoints=Checkpoints(Path(work), "refinement", budget),
                )
                refining.append(time.process_time() - started)
                channels = refined["after"]["channels"]
            found[budget] = channels
    return {
        **metrics,
        "seconds": seconds,
        "seconds_of_a_refinement": fmean(refining) if refining else 0.0,
        "found": found,
        "slimmed": [step["slimmed"] for step in trajectory["steps"][1:]],
        "search_top1": [100 * (1 - step["error"]) for step in trajectory["steps"]],
    }


def _supernet(folder: Path) -> tuple[Params, PreparedData, Supernet, Grid]:
    params = check_params(YAML(typ="safe").load((folder / "params.yaml").read_text()), "params.yaml")
    data = PreparedData.open(folder / "data/prepared", relative_to=ROOT)
    network, graph = traced_network(params.model, data.info)
    supernet, file = load_supernet(folder / "outputs/supernet", network, graph)
    supernet.to(memory_format=torch.channels_last)
    return params, data, supernet, file.grid


def _compare(folder: Path, rows: list[dict[str, Any]], budgets: list[str]) -> None:
    """Adds top-1 of the networks found at each budget on unseen images, and the difference to the first variant."""
    params, data, supernet, _ = _supernet(folder)
    device = torch.device("cpu")
    size = even_chunk(data.info.counts["test"], params.search.chunk)
    chunks = list(eval_batches(data, "test", batch_size=size, device=device, shuffled_by=0))
    runners = chunk_runners(supernet, chunks, autocast(device, "fp32"), incremental=False, report=print)
    for budget in budgets:
        first: Outcome | None = None
        for row in rows:
            channels = row["found"][budget]
            outcome = concatenated([run_chunk(channels, {})[CURRENT] for run_chunk in runners])
            first = first or outcome
            difference = 100 * (first.errors - outcome.errors)
            row.setdefault("fresh", {})[budget] = {
                "macs": supernet.graph.macs(channels),
                "top1": 100 * (1 - float(outcome.errors.mean())),
                "cross_entropy": float(outcome.losses.mean()),
                "gain": float(difference.mean()),
                "gain_se": float(difference.std()) / len(difference) ** 0.5,
            }


def _machine() -> dict[str, Any]:
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _print(rows: list[dict[str, Any]], budgets: list[str]) -> None:
    variants = list(dict.fromkeys(row["way"] for row in rows))
    first = {row["seed"]: row["seconds"] for row in rows if row["way"] == variants[0]}
    gains = " | ".join(f"points at {budget}" for budget in budgets)
    print(f"| variant | seconds | seconds of a refinement | speed-up with one | images evaluated | {gains} |")
    print("|---|---:|---:|---:|---:|" + "---:|" * len(budgets))
    for variant in variants:
        selected = [row for row in rows if row["way"] == variant]
        speed = [first[row["seed"]] / (row["seconds"] + row["seconds_of_a_refinement"]) for row in selected]
        cells = [_spread([row[name] for row in selected], ".0f") for name in ("seconds", "seconds_of_a_refinement")]
        cells.append(_spread(speed, ".1f"))
        cells.append(_spread([row["images_evaluated"] / 1e6 for row in selected], ".2f") + " M")
        cells += [_spread([row["fresh"][budget]["gain"] for row in selected], "+.2f") for budget in budgets]
        print(f"| {variant} | {' | '.join(cells)} |")


def _spread(values: list[float], form: str) -> str:
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")


if __name__ == "__main__":
    typer.run(main)
