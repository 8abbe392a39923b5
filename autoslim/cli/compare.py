"""``autoslim compare``: shows the table of the latest report, or of all experiments."""

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from autoslim.cli.experiments import Row, dvc_rows, stale_report
from autoslim.cli.terminal import Resource, print_table
from autoslim.errors import UserError
from autoslim.pipeline.entry import with_clear_errors
from autoslim.pipeline.project import REPORT, enter_project, read_output
from autoslim.resources.budgets import TITLES, UNITS, format_amount, format_named_amount
from autoslim.tasks.measure import TOP1, Measure


@with_clear_errors
def compare_cli(
    all_: Annotated[bool, typer.Option("--all", help="All experiments of DVC and MLflow.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="With --all: only those of this data.source.")] = None,
    network: Annotated[str | None, typer.Option("--network", help="With --all: only those of this network.")] = None,
    resource: Annotated[
        Resource | None, typer.Option("--resource", help="With --all: only budgets of this resource.")
    ] = None,
    figure: Annotated[
        Path | None, typer.Option("--figure", help="With --all: write the measure against the resource to a PNG file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all values as JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print one row for each network as CSV.")] = False,
) -> None:
    """Show the latest report: the cost of each method's network, and its measures, such as top-1, on the test split.

    With `--all`, show every experiment instead, and draw the main measure against a resource, with each method's front.

    Examples:

    autoslim compare

    autoslim compare --all --resource macs --figure experiments.png
    """
    if as_json and as_csv:
        raise UserError("--json and --csv are both given; use only one of them")
    if not all_:
        options = {"data": data, "network": network, "resource": resource, "figure": figure}
        if given := [f"--{name}" for name, value in options.items() if value is not None]:
            raise UserError(f"{given[0]} is for several experiments; add --all")
        _compare_latest(as_json, as_csv)
        return
    target = None if figure is None else figure.resolve()
    enter_project()
    rows = selected_rows([*dvc_rows(), *mlflow_rows()], data, network, resource)
    if as_json:
        print(json.dumps([row.numbers() for row in rows], indent=2))
    elif as_csv:
        print(experiments_csv(rows), end="")
    else:
        print_all(rows)
    if target is not None:
        draw(target, rows, resource)
        print(f"wrote {figure}", file=sys.stderr)


def _compare_latest(as_json: bool, as_csv: bool) -> None:
    enter_project()
    metrics = read_output(REPORT / "metrics.json", "report")
    path = REPORT / "comparison.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            results = list(csv.DictReader(file))
        remarks = (REPORT / "table.md").read_text(encoding="utf-8").strip().rpartition("\n\n")[2]
    except FileNotFoundError as error:
        raise UserError(f"there is no {error.filename}; run `dvc repro report`") from error
    if note := stale_report():
        print(f"warning: {note}", file=sys.stderr)
    if as_json:
        print(json.dumps(metrics, indent=2))
        return
    if as_csv:
        print(path.read_text(encoding="utf-8"), end="")
        return
    try:
        measures = [Measure(**values) for values in metrics.get("measures", ())] or [TOP1]
        lines = [_line(result, measures) for result in results]
        title = f"budget {_budget(metrics)}"
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} or metrics.json in the same folder was not written by this version of autoslim ({error!r}); run "
            "`dvc repro report`"
        ) from error
    print_comparison(title, lines, remarks, _difference_headers(measures[0])[1])


def mlflow_rows() -> list[Row]:
    """Returns the experiments in MLflow. If it cannot be used, this is a warning."""
    from autoslim.pipeline.tracking.experiments import experiment_runs

    try:
        runs = experiment_runs()
    except UserError as error:
        print(f"warning: {error}", file=sys.stderr)
        return []
    rows = []
    for run in runs:
        params, report = run["params"], run["report"]
        network, data, budget = (params.get(name, "") for name in ("network", "data", "budget"))
        resources = tuple(params.get("resource", "").split(", "))
        state = "" if report else "waiting" if run["status"] == "scheduled" else run["status"]
        rows.append(Row(run["name"], "MLflow", network, data, budget, resources, report, state))
    return rows


def selected_rows(rows: Sequence[Row], data: str | None, network: str | None, resource: str | None) -> list[Row]:
    """Returns the rows that match. An experiment that DVC and MLflow both have is the one of DVC.

    Raises:
        UserError: there is none.
    """
    known = [row.report for row in rows if row.store == "DVC"]
    rows = [row for row in rows if row.store == "DVC" or row.report is None or row.report not in known]
    for name, wanted, values in (
        ("data", data, lambda row: {row.data}),
        ("network", network, lambda row: {row.network}),
        ("resource", resource, lambda row: set(row.resources)),
    ):
        found = sorted({value for row in rows for value in values(row)})
        rows = [row for row in rows if wanted is None or wanted in values(row)]
        if not rows and found:
            raise UserError(f"--{name} {wanted} matches no experiment; there are {', '.join(found)}")
    if not rows:
        raise UserError("there are no experiments yet; run `dvc repro` or `dvc exp run`")
    return rows


def print_all(rows: Sequence[Row]) -> None:
    """Prints one line for each network."""
    lines = []
    several = len({row.resources for row in rows}) > 1
    for row in rows:
        measure = row.measure
        budget = row.budget
        if several and len(row.resources) == 1:  # those of several resources name them
            budget += f" {TITLES[row.resources[0]]}"
        about = {"experiment": row.name, "network": row.network, "data": row.data, "budget": budget}
        if not row.methods:
            lines.append(about | {"method": row.state or "no report"})
        for method, values in row.methods.items():
            text = measure.number(values[measure.name])
            if (deviation := values.get(f"{measure.name}_std")) is not None:
                text += f" ± {measure.number(deviation)}"
            gain = row.gains.get(method, {})
            costs = {TITLES[name]: format_amount(values[name], name) for name in UNITS if name in values}
            gained = measure.number(gain[measure.name], "+") if gain else ""
            if f"{measure.name}_low" in gain:
                ends = (measure.number(gain[f"{measure.name}_{end}"], "+") for end in ("low", "high"))
                gained += "  [{}, {}]".format(*ends)
            main = {measure.header(f"{measure.title} on test"): text, _difference_headers(measure)[1]: gained}
            lines.append(about | {"method": method} | costs | main)
    headers = list(dict.fromkeys(name for line in lines for name in line))
    print_table(
        headers,
        [[line.get(name, "") for name in headers] for line in lines],
        left=["network", "data", "budget", "method"],
    )
    for row in rows:
        if row.note:
            print(f"\n{row.name}: {row.note}.")


def experiments_csv(rows: Sequence[Row]) -> str:
    """Returns one row for each network, with unscaled values (fractions, MACs). Cells without a value are empty."""
    lines: list[dict[str, Any]] = []
    for row in rows:
        about = {name: getattr(row, name) for name in ("name", "store", "network", "data", "budget", "state", "note")}
        about["resources"] = " ".join(row.resources)
        for method, values in row.methods.items() or [("", {})]:
            gain = {f"gain_{name}": value for name, value in row.gains.get(method, {}).items()}
            lines.append({**about, "method": method, **values, **gain})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def draw(path: Path, rows: Sequence[Row], resource: str | None) -> None:
    """Writes the figure of all experiments that limit one resource.

    Experiments with a note are left out: the report is not of the parameters, which name the resource.

    Raises:
        UserError: they cannot be drawn in one figure, or none has a report.
    """
    from autoslim.report.experiments_figure import Point, experiments_figure

    rows = [row for row in rows if row.report is not None and not row.note]
    if not rows:
        raise UserError("no experiment has a report of its parameters, and nothing can be drawn; run `dvc repro`")
    chosen = resource or Counter(row.resources[0] for row in rows).most_common(1)[0][0]
    rows = [row for row in rows if chosen in row.resources]
    data = sorted({row.data for row in rows})
    measures = list(dict.fromkeys(row.measure for row in rows))
    if len(data) > 1 or len(measures) > 1:
        raise UserError(f"the experiments are of several data sets, {', '.join(data)}; choose one with --data")
    several = len({row.network for row in rows}) > 1
    series: dict[str, list[Point]] = {}
    for row in rows:
        for method, values in row.methods.items():
            if chosen in values:
                name = measures[0].name
                point = Point(values[chosen], values[name], values.get(f"{name}_std"))
                series.setdefault(f"{row.network}, {method}" if several else method, []).append(point)
    experiments_figure(path, series, chosen, measures[0])


def print_comparison(title: str, lines: Sequence[Mapping[str, str]], remarks: str, gain: str) -> None:
    """Prints the comparison without empty columns, except that of the gain."""
    headers = [name for name in lines[0] if name == gain or any(line[name] for line in lines)] if lines else []
    print_table(headers, [[line[name] for name in headers] for line in lines], title=title)
    print(f"\n{remarks}")


def _difference_headers(measure: Measure) -> tuple[str, str]:
    """Returns the headers of the differences from the default network and of the gains."""
    unit = f" ({measure.unit_of_differences})" if measure.unit_of_differences else ""
    return f"difference from default{unit}", f"gain over uniform{unit}"


def _line(result: Mapping[str, str], measures: Sequence[Measure]) -> dict[str, str]:
    """Returns header -> cell for a row of ``comparison.csv`` (see ``autoslim.report.table``)."""

    def amount(column: str, resource: str) -> str:
        return format_amount(float(result[column]), resource) if result[column] else ""

    measured = amount("measured_latency", "latency")
    if measured:
        spread = (float(result["measured_latency_high"]) - float(result["measured_latency_low"])) / 2
        measured += f" ± {format_amount(spread, 'latency')}"
    main = measures[0]
    values = {}
    for measure in measures:
        text = measure.number(float(result[measure.name]))
        if deviation := result[f"{measure.name}_std"]:
            text += f" ± {measure.number(float(deviation))}"
        values[measure.header(f"{measure.title} on test")] = text

    def points(name: str) -> str:
        text = main.number(float(result[name]), "+") if result[name] else ""
        if result[f"{name}_low"]:
            low, high = (main.number(float(result[f"{name}_{end}"]), "+") for end in ("low", "high"))
            text += f"  [{low}, {high}]"
        return text

    difference, gain = _difference_headers(main)
    return {
        "method": result["method"],
        "MACs": amount("macs", "macs"),
        "parameters": amount("params", "params"),
        "memory": amount("memory", "memory"),
        "latency predicted": amount("latency", "latency"),
        "latency measured": measured,
        **values,
        "seeds": result["seeds"],
        difference: points("difference"),
        gain: points("gain"),
    }


def _budget(metrics: Mapping[str, Any]) -> str:
    """Returns the budget as written in ``params.yaml``, followed by its absolute value if that differs."""
    limits = {resource: metrics[key] for resource in UNITS if (key := f"budget_{resource}") in metrics}
    named = ", ".join(format_named_amount(limit, resource) for resource, limit in limits.items())
    plain = ", ".join(format_amount(limit, resource) for resource, limit in limits.items())
    return named if metrics["budget"] in (plain, named) else f"{metrics['budget']} = {named}"
