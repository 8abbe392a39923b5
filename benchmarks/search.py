"""Compares variants of the search: time, images evaluated, and accuracy of the networks found, on unseen images.

    python benchmarks/search.py --seeds 0,1,2 --to benchmarks/results/search.json
    python benchmarks/search.py --quick

For each seed, it trains one supernet from benchmarks/search.yaml (CIFAR-10 in data/raw/cifar10, see docs/guide/data.md)
and runs the stage ``search`` on it with each variant. The network found at each budget is scored in the supernet on the
test split and compared, image by image, with the one of the first variant. Finished parts are reused as long as code
and parameters do not change. ``--quick`` takes a few minutes and needs no data: it uses scikit-learn's digits at 16x16
and a dozen steps from a supernet a tenth wider than the default network. It checks the speed, not the networks found.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import torch
import typer
from ruamel.yaml import YAML

from autoslim.data.batches import eval_batches, even_chunk
from autoslim.data.prepared import PreparedData
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.params import check_params
from autoslim.resources.budgets import parse_budget
from autoslim.resources.latency.measure import processor
from autoslim.search.greedy import Option, SlimmingStep
from autoslim.search.methods import from_trajectory
from autoslim.search.racing import chunk_runners
from autoslim.search.scoring import Outcome
from autoslim.search.trajectory import read_trajectory
from autoslim.supernet.extract import load_supernet
from autoslim.tasks.classification import Score
from autoslim.training.checkpoints import file_digest, run_key
from autoslim.training.device import autocast

HERE = Path(__file__).parent
ROOT = HERE.parent
Changes = dict[str, dict[str, Any]]
VARIANTS: Changes = {
    "exhaustive": {"incremental": False, "risk": None, "precision": "fp32"},
    "incremental": {"incremental": True, "risk": None, "precision": "fp32"},
    "incremental, bf16": {"incremental": True, "risk": None, "precision": "bf16"},
    "risk 0.01, bf16": {"incremental": True, "risk": 0.01, "precision": "bf16"},
    "risk 0.03, bf16": {"incremental": True, "risk": 0.03, "precision": "bf16"},
    "risk 0.1, bf16": {"incremental": True, "risk": 0.1, "precision": "bf16"},
    "risk 0.03, bf16, by cross-entropy": {
        "incremental": True,
        "risk": 0.03,
        "precision": "bf16",
        "score": "cross_entropy",
    },
}


QUICK: Changes = {
    "data": {"source": "digits", "train_images": None, "search_images": 640},
    "supernet": {"width": 1.1, "epochs": 15},
    "search": {"images": 320, "chunk": 40},
}


def main(
    seeds: Annotated[str, typer.Option(help="Seeds of the supernets, separated by commas.")] = "0,1,2",
    budgets: Annotated[str, typer.Option(help="Budgets at which the networks are compared.")] = "175%,150%,125%,100%",
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
        variants = "exhaustive;incremental;incremental, bf16;risk 0.01, bf16;risk 0.1, bf16"
    for seed in map(int, seeds.split(",")):
        folder = work / f"seed-{seed}-{file_digest(HERE / 'search.yaml')[:8]}"
        _stages(folder, changes, {"supernet": {"seed": seed}}, "prepare", "resources", "supernet")
        for variant in variants.split(";"):
            rows.append({"seed": seed, "way": variant, **_search(folder, changes, variant, seed)})
            print(f"seed {seed}: {variant}: {rows[-1]['seconds']} s", file=sys.stderr)
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


def _search(folder: Path, basis: Changes, variant: str, seed: int) -> dict[str, Any]:
    """Returns the metrics and the trajectory of a search, after running it if there is no result yet."""
    folders = ("channels", "tracing", "data", "tasks", "training", "models", "supernet", "search")
    code = [path for name in folders for path in sorted((ROOT / "autoslim" / name).rglob("*.py"))]
    key = run_key(way=VARIANTS[variant], params=file_digest(HERE / "search.yaml"), code=file_digest(*code))
    result = folder / f"{variant.replace(', ', '-')}-{key}.json"
    if not result.exists():
        _stages(folder, basis, {"supernet": {"seed": seed}, "search": VARIANTS[variant]}, "search")
        metrics = json.loads((folder / "outputs/search/metrics.json").read_text())
        trajectory = read_trajectory(folder / "outputs/search/trajectory.json")
        result.write_text(json.dumps({**metrics, "trajectory": trajectory}))
    values: dict[str, Any] = json.loads(result.read_text())
    return values


def _compare(folder: Path, rows: list[dict[str, Any]], budgets: list[str]) -> None:
    """Adds the networks found at each budget, with top-1 on unseen images and the difference to the first variant."""
    params = check_params(YAML(typ="safe").load((folder / "params.yaml").read_text()), "params.yaml")
    data = PreparedData.open(folder / "data/prepared", relative_to=ROOT)
    network, graph = traced_network(params.model, data.info)
    supernet, _ = load_supernet(folder / "outputs/supernet", network, graph)
    supernet.to(memory_format=torch.channels_last)
    device = torch.device("cpu")
    size = even_chunk(data.info.counts["test"], params.search.chunk)
    chunks = list(eval_batches(data, "test", batch_size=size, device=device, shuffled_by=0))
    runners = chunk_runners(supernet, chunks, autocast(device, "fp32"), incremental=False, report=print)

    def score(channels: dict[str, int]) -> Outcome:
        name = next(iter(channels))
        step = SlimmingStep(None, channels, 0, Score(0, 0))
        outcomes = [run_chunk(step, {name: Option(channels[name], 0)}, [name])[name] for run_chunk in runners]
        return Outcome(torch.cat([o.wrong for o in outcomes]), torch.cat([o.nats for o in outcomes]))

    for budget in budgets:
        limit = parse_budget(budget).absolute(graph.macs())
        first: Outcome | None = None
        for row in rows:
            configurations = [step["channels"] for step in row["trajectory"]["steps"]]
            channels = from_trajectory(configurations, lambda c, most=limit: graph.macs(c) <= most)
            outcome = score(channels)
            first = first or outcome
            difference = 100 * (first.wrong - outcome.wrong)
            row.setdefault("fresh", {})[budget] = {
                "macs": graph.macs(channels),
                "top1": 100 * (1 - float(outcome.wrong.mean())),
                "gain": float(difference.mean()),
                "gain_se": float(difference.std()) / len(difference) ** 0.5,
                "channels": channels,
            }
    for row in rows:
        steps = row.pop("trajectory")["steps"]
        row["slimmed"] = [step["slimmed"] for step in steps[1:]]
        row["search_top1"] = [100 * (1 - step["error"]) for step in steps]


def _machine() -> dict[str, Any]:
    return {
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _print(rows: list[dict[str, Any]], budgets: list[str]) -> None:
    variants = list(dict.fromkeys(row["way"] for row in rows))
    slowest = {row["seed"]: row["seconds"] for row in rows if row["way"] == variants[0]}
    print(
        f"| variant | seconds | speed-up | images evaluated | {' | '.join(f'gain at {b} (points)' for b in budgets)} |"
    )
    print("|---|---:|---:|---:|" + "---:|" * len(budgets))
    for variant in variants:
        selected = [row for row in rows if row["way"] == variant]
        speed = [slowest[row["seed"]] / row["seconds"] for row in selected]
        cells = [_spread([row["seconds"] for row in selected], ".0f"), _spread(speed, ".1f")]
        cells.append(_spread([row["images_evaluated"] / 1e6 for row in selected], ".2f") + " M")
        cells += [_spread([row["fresh"][budget]["gain"] for row in selected], "+.2f") for budget in budgets]
        print(f"| {variant} | {' | '.join(cells)} |")


def _spread(values: list[float], form: str) -> str:
    return f"{fmean(values):{form}}" + (f" ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else "")


if __name__ == "__main__":
    typer.run(main)
