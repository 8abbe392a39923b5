"""Does the first run (`make repro`) show a gain with other supernets, too? Repeats it with several supernet seeds.

    python benchmarks/first_run.py --supernets 0,1,2,3,4 --to benchmarks/results/first-run.json

Each supernet is trained, searched and retrained with params.yaml, except for `supernet.seed`. The command prints a row
for each supernet, and the processor seconds of its stages. Finished stages are reused.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from ruamel.yaml import YAML

ROOT = Path(__file__).parent.parent


def main(
    supernets: Annotated[str, typer.Option(help="Seeds of the supernets, separated by commas.")] = "0,1,2,3,4",
    to: Annotated[Path, typer.Option(help="JSON file for all results.")] = ROOT / "benchmarks/results/first-run.json",
    work: Annotated[Path, typer.Option(help="Folder for all runs.")] = ROOT / "outputs/first-run",
) -> None:
    """Repeat the first run and print a table."""
    params = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    params["tracking"]["enabled"] = False
    stages = ["prepare", "resources", "supernet", "search", "allocate"]
    stages += [*(f"retrain {method}" for method in params["methods"]), "report"]
    rows: list[dict[str, Any]] = []
    for seed in map(int, supernets.split(",")):
        folder = work / f"supernet-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        params["supernet"]["seed"] = seed
        with (folder / "params.yaml").open("w") as file:
            YAML(typ="safe").dump(params, file)
        seconds = sum(_run(folder, stage) for stage in stages)
        metrics = json.loads((folder / "outputs/report/metrics.json").read_text())
        rows.append({"supernet": seed, "processor_seconds": round(seconds), **metrics})
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(json.dumps({"command": " ".join(["python", *sys.argv]), "rows": rows}, indent=1) + "\n")
        print(f"supernet {seed}, {seconds:.0f} processor seconds:\n{(folder / 'outputs/report/table.md').read_text()}")


def _run(folder: Path, stage: str) -> float:
    """Runs a stage in ``folder`` unless it has run there, and returns its processor seconds."""
    done = folder / f"{stage.replace(' ', '-')}.done"
    if not done.exists():
        name, *arguments = stage.split()
        process = subprocess.Popen([sys.executable, str(ROOT / f"stages/{name}.py"), *arguments], cwd=folder)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{stage} failed in {folder}")
        done.write_text(str(used.ru_utime + used.ru_stime))
    return float(done.read_text())


if __name__ == "__main__":
    typer.run(main)
