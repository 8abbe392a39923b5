"""``autoslim experiments``: the experiments of DVC as a table. ``compare --all`` shows more of the same rows."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from autoslim.cli.terminal import print_table
from autoslim.errors import UserError, first_line
from autoslim.files import parse_json
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.experiment import main_measure, network_name
from autoslim.pipeline.project import REPORT, enter_project
from autoslim.resources.budgets import TITLES, format_amount, format_budgets, format_named_amount, parse_budgets
from autoslim.tasks.measure import TOP1, Measure

WIDTH = 100
"""Columns of characters that the table of ``autoslim experiments`` fits."""

_PARAMS = Path("params.yaml")
_METRICS = (REPORT / "metrics.json").as_posix()


@dataclass(frozen=True)
class Row:
    """An experiment: what was asked for, and what its report found.

    Attributes:
        name: name of DVC's experiment, branch or commit, or "workspace"; for MLflow, the name of the run.
        store: "DVC" or "MLflow".
        network, data: the last part of ``model.name``, and ``data.source``.
        budget: the budget as written.
        resources: the resources that the budget limits.
        report: contents of ``metrics.json``; None if there is no report.
        state: why there is no report, such as "queued"; "" otherwise.
        note: how the report differs from the parameters; "" if it does not.
    """

    name: str
    store: str
    network: str
    data: str
    budget: str
    resources: tuple[str, ...]
    report: Mapping[str, Any] | None = field(compare=False, default=None)
    state: str = ""
    note: str = ""

    @property
    def measure(self) -> Measure:
        return TOP1 if self.report is None else main_measure(self.report)

    @property
    def methods(self) -> dict[str, Mapping[str, float]]:
        """The method -> its costs and measures."""
        return {} if self.report is None else methods_of(self.report)

    @property
    def cost(self) -> tuple[str, float] | None:
        """The first limited resource, and how much of it the network of ``autoslim``, or the first one, uses."""
        methods = self.methods
        if not methods or not self.resources:
            return None
        resource, first = self.resources[0], methods.get("autoslim") or next(iter(methods.values()))
        return (resource, first[resource]) if resource in first else None

    @property
    def gains(self) -> dict[str, Mapping[str, float]]:
        return {} if self.report is None else dict(self.report.get("gain", {}))

    def numbers(self) -> dict[str, Any]:
        """Returns all values for ``--json``: fractions and amounts in the units of ``metrics.json``."""
        values = {name: getattr(self, name) for name in ("name", "store", "network", "data", "budget")}
        values |= {"resources": list(self.resources), "state": self.state, "note": self.note}
        return values | {"measure": self.measure.name, "methods": self.methods, "gain": self.gains}


def methods_of(report: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Returns the method -> costs and measures of a report's ``metrics.json``."""
    name = main_measure(report).name
    return {key: value for key, value in report.items() if isinstance(value, Mapping) and {"macs", name} <= set(value)}


@with_clear_errors
def experiments_cli(
    as_json: Annotated[bool, typer.Option("--json", help="Print all values as JSON.")] = False,
    address: Annotated[
        bool, typer.Option("--address", help="Only print the address of the experiments in MLflow's UI (`make ui`).")
    ] = False,
) -> None:
    """Show DVC's experiments: budget, cost, main measure by method, and gain.

    These are the workspace, the latest commit, and all experiments that `dvc exp list --all-commits` names.
    `autoslim compare --all` shows more of each, draws a figure and includes the runs in MLflow.

    Example:

    autoslim experiments
    """
    enter_project()
    if address:
        from autoslim.pipeline.tracking.experiments import view_address

        print(view_address())
        return
    rows = dvc_rows()
    if as_json:
        print(json.dumps([row.numbers() for row in rows], indent=2))
        return
    print_rows(rows)


def print_rows(rows: Sequence[Row]) -> None:
    """Prints a table that fits ``WIDTH`` columns unless names or budgets are long."""
    measures = list(dict.fromkeys(row.measure for row in rows if row.report is not None))
    resources = list(dict.fromkeys(row.cost[0] for row in rows if row.cost))
    methods = list(dict.fromkeys(method for row in rows for method in row.methods))
    one = measures[0] if len(measures) == 1 else None
    title = f"{one.header(f'{one.title} on test')} by method" if one else "main measure on test by method"
    cost = TITLES[resources[0]] if len(resources) == 1 else "cost"
    headers = ["experiment", "budget", cost, *methods, "gain"]

    def cells(row: Row) -> list[str]:
        values = [row.methods.get(method) for method in methods]
        written = ["" if each is None else _value(row.measure, each[row.measure.name], one) for each in values]
        amount = ""
        if row.cost:
            amount = (format_amount if len(resources) == 1 else format_named_amount)(row.cost[1], row.cost[0])
        gain = row.gains.get("autoslim")
        text = "" if gain is None else row.measure.number(gain[row.measure.name], "+")
        return [row.name, row.budget, amount, *written, row.state or text]

    table = [cells(row) for row in rows]
    wide = [name for name in methods if "/" in name]
    if wide and _width(headers, table) > WIDTH:
        kept = [index for index, header in enumerate(headers) if header not in wide]
        headers, *table = ([line[index] for index in kept] for line in (headers, *table))
    else:
        wide = []
    print_table(headers, table, title=title, left=["budget"])
    if wide:
        print(f"\nNot shown: {', '.join(wide)}; see --json.")
    for row in rows:
        if row.note:
            print(f"\n{row.name}: {row.note}.")


def _width(headers: Sequence[str], table: Sequence[Sequence[str]]) -> int:
    return sum(max(len(line[index]) for line in (headers, *table)) + 2 for index in range(len(headers))) - 2


def _value(measure: Measure, value: float, one: Measure | None) -> str:
    return measure.number(value) if one else measure.short(value)


def dvc_rows() -> list[Row]:
    """Returns the workspace, the latest commit and all experiments. One that equals an earlier row is left out.

    Raises:
        UserError: DVC reports an error.
    """
    revisions = [argument for commit in _baselines() for argument in ("--rev", commit)]
    command = [sys.executable, "-m", "dvc", "exp", "show", "--json", "--rev", "HEAD", *revisions]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        shown = parse_json(done.stdout)
    except ValueError as error:
        reason = next(iter(reversed(done.stderr.strip().splitlines())), "it printed nothing")
        raise UserError(f"`dvc exp show` failed ({reason}); run it to see why") from error
    rows: list[Row] = []
    seen: list[tuple[Any, ...]] = []
    for name, data, state in sorted(_experiments(shown), key=lambda found: found[0] == "workspace"):
        row = _row_of_dvc(name, data, state)
        if row is None:
            continue
        same = row.network, row.data, row.budget, row.report, row.state
        if row.report is None or same not in seen:
            rows.append(row)
            seen.append(same)
    return rows


def _baselines() -> list[str]:
    """Returns the commits that experiments started from. DVC keeps an experiment as refs/exps/<commit>/<name>."""
    command = ["git", "for-each-ref", "--format=%(refname)", "refs/exps"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    parts = [line.split("/") for line in done.stdout.splitlines()]
    commits = ["".join(part[2:4]) for part in parts if len(part) == 5]
    return [commit for commit in dict.fromkeys(commits) if len(commit) == 40]


def _experiments(shown: Any) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Yields name, data and state of each experiment of ``dvc exp show --json``.

    While an experiment runs in the workspace, the workspace is that experiment.
    """
    groups = [group for baseline in shown for group in baseline.get("experiments") or []]
    running = any((group.get("executor") or {}).get("name") == "workspace" for group in groups)
    for baseline in shown:
        if not (running and _name(baseline) == "workspace"):
            yield _name(baseline), baseline.get("data") or {}, _error(baseline)
        for group in baseline.get("experiments") or []:
            latest = group["revs"][0]
            state = (group.get("executor") or {}).get("state") or ""
            yield _name(latest), latest.get("data") or {}, ("" if state == "success" else state) or _error(latest)


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry.get("name") or str(entry["rev"])[:9])


def _error(entry: Mapping[str, Any]) -> str:
    return "unreadable" if entry.get("error") else ""


def _row_of_dvc(name: str, data: Mapping[str, Any], state: str) -> Row | None:
    """Returns the row of an experiment; None if it has neither a report nor a state, as commits before the first run.

    Raises:
        UserError: its parameters are not those of this version.
    """
    params = data.get("params", {}).get(_PARAMS.name, {}).get("data")
    report = data.get("metrics", {}).get(_METRICS, {}).get("data")
    if state in ("running", "queued"):
        report = None  # it is that of the run before
    if not params or (report is None and not state):
        return None
    try:
        budgets = parse_budgets(params["budget"], params["resource"])
        network, source = network_name(params["model"]["name"]), str(params["data"]["source"])
        if report is not None:
            methods_of(report)
        written = format_budgets(budgets)
        note = "" if report is None else _difference(params, written, report)
    except (UserError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"the experiment {name} was made by another version of autoslim ({first_line(error)}); remove it with "
            f"`dvc exp remove {name}`, or repeat it"
        ) from error
    if name == "workspace" and report is not None:
        note = stale_report() or note
    return Row(name, "DVC", network, source, written, tuple(budgets), report, state, note)


def _difference(params: Mapping[str, Any], budget: str, report: Mapping[str, Any]) -> str:
    """Returns how a report differs from the parameters that are stored with it."""
    if report["budget"] != budget:
        return f"its report is for the budget {report['budget']}, and its parameters have {budget}; run `dvc repro`"
    missing = sorted(set(params["methods"]) - set(methods_of(report)))
    return f"its report has no {', '.join(missing)}, although `methods` has; run `dvc repro`" if missing else ""


def stale_report() -> str:
    """Returns how the report in the workspace differs from ``params.yaml``; "" if it does not, or if it is not known.

    ``dvc.lock`` has the parameters that each stage ran with, and a digest of each of its outputs.
    """
    from autoslim.pipeline.params import read_yaml

    if not Path("dvc.lock").is_file() or not _PARAMS.is_file():
        return ""
    current = read_yaml(_PARAMS)
    stages = read_yaml(Path("dvc.lock")).get("stages", {})
    methods = current.get("methods", [])
    removed = [name for name in stages if name.startswith("retrain@") and name.removeprefix("retrain@") not in methods]
    stages = {name: stage for name, stage in stages.items() if name not in removed}
    changed = {
        name: stage
        for stage, values in stages.items()
        for name, value in values.get("params", {}).get(_PARAMS.name, {}).items()
        if _at(current, name) != value
    }
    if changed:
        first, *others = sorted(changed)
        more = f" and {len(others)} other parameter{'s' if len(others) > 1 else ''}" if others else ""
        return f"its outputs were made before {first}{more} changed in {_PARAMS}; run `dvc repro`"
    for out in stages.get("report", {}).get("outs", []):
        path = Path(out["path"])
        if path.is_file() and hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() != out.get("md5"):
            return f"{out['path']} is not the one that dvc.lock describes; run `dvc checkout` or `dvc repro`"
    return ""


def _at(values: Any, name: str) -> Any:
    """Returns the value at a dotted name."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
