"""Tests whether ranking candidates by score per saved resource (search.per_cost) helps, by retraining.

    python benchmarks/weighting.py --supernets 0,1,2 --to benchmarks/results/weighting.json

For each supernet, each resource and each ranking (by the score alone, or per unit saved of that resource), it searches
and retrains the autoslim and uniform networks at the budget with every seed of params.yaml. Latency is measured with
batches of 256 images, because that of a single image hardly depends on the channels of such a small network. Finished
parts are reused. benchmarks/results/weighting.json is from the digits, which were the data of params.yaml then.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent
BUDGETS = {"macs": "20%", "params": "35%", "memory": "45%", "latency": "60%"}


def main(
    supernets: Annotated[str, typer.Option(help="Seeds of the supernets, separated by commas.")] = "0,1,2",
    resources: Annotated[str, typer.Option(help="Resources, separated by commas.")] = ",".join(BUDGETS),
    to: Annotated[Path, typer.Option(help="JSON file for all results.")] = ROOT / "benchmarks/results/weighting.json",
    work: Annotated[Path, typer.Option(help="Folder for all runs.")] = ROOT / "outputs/weighting",
) -> None:
    """Run the comparison and print a table."""
    rows: list[dict[str, Any]] = []
    for seed in supernets.split(","):
        for resource in resources.split(","):
            for per_cost in (False, True):
                folder = work / f"{resource}-{per_cost}-{seed}"
                rows += _compared(folder, work / f"supernet-{seed}", int(seed), resource, per_cost)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_text(json.dumps({"command": " ".join(sys.argv), "rows": rows}, indent=1) + "\n")
    _print(rows)


def _compared(folder: Path, shared: Path, seed: int, resource: str, per_cost: bool) -> list[dict[str, Any]]:
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    params |= {"resource": resource, "budget": BUDGETS[resource]}
    params["supernet"]["seed"] = seed
    params["latency"]["batch"] = 256
    params["search"] |= {"per_cost": per_cost, "stop": 0.9 * float(BUDGETS[resource].rstrip("%")) / 100}
    params["tracking"]["enabled"] = False
    _run(shared, params, "prepare", "resources", "supernet")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("data", "outputs"):
        (folder / name).mkdir(exist_ok=True)
    for name in ("data/prepared", "outputs/supernet"):
        if not (folder / name).exists():
            (folder / name).symlink_to((shared / name).resolve())
    _run(folder, params, "resources", "search", "allocate", "retrain uniform", "retrain autoslim", "report")
    metrics = json.loads((folder / "outputs/report/metrics.json").read_text())
    return [
        {"resource": resource, "per_cost": per_cost, "supernet": seed, "method": method, **metrics[method]}
        for method in ("uniform", "autoslim")
    ]


def _run(folder: Path, params: dict[str, Any], *stages: str) -> None:
    """Runs the stages that have not run yet in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "params.yaml").open("w") as file:
        YAML(typ="safe").dump(params, file)
    for stage in stages:
        done = folder / f"{stage.replace(' ', '-')}.done"
        if not done.exists():
            name, *arguments = stage.split()
            subprocess.run([sys.executable, str(ROOT / f"stages/{name}.py"), *arguments], cwd=folder, check=True)
            done.touch()


def _print(rows: list[dict[str, Any]]) -> None:
    print("| resource (budget) | uniform (%) | by the score (%) | per unit saved (%) |\n|---|---:|---:|---:|")
    for resource in dict.fromkeys(row["resource"] for row in rows):
        selected = [row for row in rows if row["resource"] == resource]
        cells = [[row["top1"] for row in selected if row["method"] == "uniform" and not row["per_cost"]]]
        for per_cost in (False, True):
            cells.append([r["top1"] for r in selected if r["method"] == "autoslim" and r["per_cost"] == per_cost])
        print(f"| {resource} ({BUDGETS[resource]}) | {' | '.join(map(_spread, cells))} |")


def _spread(values: list[float]) -> str:
    return f"{100 * fmean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    typer.run(main)
