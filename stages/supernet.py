"""supernet: the default network, widened -> weights shared by all its subnets."""

from autoslim.shell import environment  # noqa: F401  (first: torch and mlflow read it when they are imported)

# isort: split
import sys

import typer

from autoslim.engine.checkpoints import write_json
from autoslim.engine.data import PreparedData
from autoslim.engine.processes import here
from autoslim.engine.supernet_training import train_supernet
from autoslim.engine.training import write_rows
from autoslim.networks.pretrained import weights_file
from autoslim.shell.assembly import checkpoints, inputs, recipe, span, starting_network, traced_network
from autoslim.shell.checks import check_model, check_reach, check_smoothing
from autoslim.shell.exits import ending_clearly
from autoslim.shell.launching import joined, launched
from autoslim.shell.params import load_params
from autoslim.shell.places import PREPARED, SUPERNET, repository_root
from autoslim.shell.tracking import fingerprint, tracked


@ending_clearly
def main() -> None:
    """Trains the supernet by the sandwich rule with in-place distillation."""
    params = load_params()
    check_model(params.model)
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    network, graph = traced_network(params.model, data.info)
    check_smoothing(params, data.info)
    check_reach(params, graph)
    if launched(params.runtime, __file__):
        return
    start, told = starting_network(params.model, params.supernet, network, graph)
    if told and here().first:
        print(f"supernet: {told}", file=sys.stderr)
    trained = weights_file(params.model.weights)
    sections = {"model": params.model.model_dump(), "supernet": params.supernet.model_dump()}
    kept = checkpoints("supernet", *inputs(params.model, PREPARED), *([trained] if trained else []), **sections)
    with (
        joined(params.runtime) as place,
        place.processes.first_in(kept.held()),
        tracked(
            "supernet",
            run_name=f"supernet {params.model.name.rpartition(':')[2]} x{params.supernet.width}",
            params=sections | {"data": params.data.model_dump()},
            tags={"source": params.data.source},
            enabled=params.tracking.enabled and place.processes.first,
            experiment=params.tracking.experiment,
        ) as tracker,
    ):
        rows, scores = train_supernet(
            start,
            graph,
            data,
            span(params.supernet),
            recipe(params.supernet),
            place,
            trained=params.model.weights is not None,
            random_widths=params.supernet.random_widths,
            random_widths_per=params.supernet.random_widths_per,
            widths_by_rank=params.supernet.widths_by_rank,
            distillation=params.supernet.distillation,
            seed=params.supernet.seed,
            name=params.model.name,
            folder=SUPERNET,
            checkpoints=kept,
            observe=lambda row: tracker.metrics(
                {name: value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"])
            ),
        )
        if not place.processes.first:
            return
        write_rows(SUPERNET / "curves.csv", rows)
        figures = {
            which: {"top1": 1 - score.error, "cross_entropy": score.cross_entropy} for which, score in scores.items()
        }
        write_json(SUPERNET / "metrics.json", figures)
        tracker.metrics({f"{which}.{name}": value for which, f in figures.items() for name, value in f.items()})
        tracker.tag("supernet", fingerprint(SUPERNET / "weights.safetensors"))
        tracker.artifact(SUPERNET / "supernet.json")
        kept.clear()


if __name__ == "__main__":
    typer.run(main)
