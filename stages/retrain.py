"""retrain: a method's network, from new weights or the supernet's, once for each seed."""

from autoslim.shell import environment  # noqa: F401  (first: torch and mlflow read it when they are imported)

# isort: split
from typing import Annotated

import typer

from autoslim.engine.artifacts import Allocation, Asked, load_weights, start_file
from autoslim.engine.checkpoints import write_json
from autoslim.engine.data import PreparedData, eval_batches
from autoslim.engine.retraining import over_seeds, retrain
from autoslim.engine.training import write_rows
from autoslim.networks.resizing import resize
from autoslim.shell.assembly import checkpoints, inputs, recipe, traced_network
from autoslim.shell.checks import check_allocation, check_smoothing
from autoslim.shell.exits import ending_clearly
from autoslim.shell.launching import joined, launched
from autoslim.shell.params import load_params
from autoslim.shell.places import CHANNELS, PREPARED, RETRAIN, SUPERNET, repository_root
from autoslim.shell.tracking import lineage, numbers, tracked


@ending_clearly
def main(
    method: Annotated[str, typer.Argument(help="How channel numbers are chosen: autoslim, uniform or released/NAME.")],
) -> None:
    """Trains the network that a method gives for the budget."""
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    network, graph = traced_network(params.model, data.info)
    chosen, told = Allocation.read(CHANNELS, method), Asked.read(CHANNELS, method)
    check_smoothing(params, data.info)
    check_allocation(chosen, params, graph)
    if launched(params.runtime, __file__, method):
        return
    channels = chosen.channels
    asked = params.retrain
    folder = RETRAIN / method
    weights = folder / "weights"
    start = start_file(CHANNELS, method)
    kept = checkpoints(
        f"retrain-{method.replace('/', '-')}",
        *inputs(params.model, PREPARED),
        start,
        model=params.model.model_dump(),
        channels=channels,
        retrain=asked.model_dump(),
    )
    with (
        joined(params.runtime) as place,
        place.processes.first_in(kept.held()),
        tracked(
            "retrain",
            run_name=f"retrain {method} {told.budget}",
            params={
                "retrain": asked.model_dump(),
                "model": params.model.model_dump(),
                "budget": told.budget,
                "resource": told.resource,
                "method": method,
            },
            tags={
                "source": params.data.source,
                "method": method,
                "budget": told.budget,
                "resource": told.resource,
                **lineage(SUPERNET / "weights.safetensors"),
            },
            enabled=params.tracking.enabled and place.processes.first,
            experiment=params.tracking.experiment,
        ) as tracker,
    ):
        rows = retrain(
            network,
            graph,
            channels,
            data,
            recipe(asked),
            place,
            seeds=asked.seeds,
            start=start if asked.start == "supernet" else None,
            label=f"{method} {told.budget}",
            folder=weights,
            checkpoints=kept,
            observe=lambda seed, row: tracker.metrics(
                {f"seed_{seed}.{name}": value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"])
            ),
        )
        if not place.processes.first:
            return
        write_rows(folder / "curves.csv", [{"seed": seed, **row} for seed, own in rows.items() for row in own])
        figures = {**chosen.costs, **over_seeds(rows)}
        write_json(folder / "metrics.json", figures)
        tracker.metrics(numbers(figures))
        tracker.artifact(CHANNELS / f"{method}.json")
        if params.tracking.log_network:
            plain = resize(network, graph, channels)
            load_weights(plain, weights / f"seed-{asked.seeds[0]}.safetensors")
            images, _ = next(iter(eval_batches(data, "search", batch_size=4, device=place.device)))
            tracker.network(plain, images.cpu())
        kept.clear()


if __name__ == "__main__":
    typer.run(main)
