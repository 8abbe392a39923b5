"""Stage ``retrain``: trains one method's network, once for each seed."""

from dataclasses import dataclass
from typing import Annotated

import typer
from torch import nn

from autoslim.channels.resize import resize
from autoslim.data.batches import eval_batches
from autoslim.data.prepared import DataInfo, PreparedData, read_info
from autoslim.errors import UserError
from autoslim.pipeline.artifacts import Allocation, RequestedBudget, initial_weights_file
from autoslim.pipeline.assembly import checkpoints, inputs, recipe, run_context, traced_network
from autoslim.pipeline.checks import check_allocation, check_smoothing
from autoslim.pipeline.launch import distributed_context, launch
from autoslim.pipeline.params import Params, load_params
from autoslim.pipeline.project import CHANNELS, PREPARED, RETRAIN, SUPERNET, repository_root
from autoslim.pipeline.tracking import lineage, numbers, tracked
from autoslim.tasks.classification import Score
from autoslim.training.checkpoints import load_weights, write_json
from autoslim.training.device import to_device
from autoslim.training.loop import write_rows
from autoslim.training.retrain import over_seeds, retrain, split_score


@dataclass(frozen=True)
class Retrained:
    """A method's network with the weights of one seed, in evaluation mode on the CPU, and what it is for."""

    seed: int
    network: nn.Module
    chosen: Allocation
    asked: RequestedBudget
    info: DataInfo


def seeds_of(method: str) -> list[int]:
    """The seeds whose weights lie there.

    Raises:
        UserError: none do.
    """
    folder = RETRAIN / method / "weights"
    seeds = sorted(int(path.stem.removeprefix("seed-")) for path in folder.glob("seed-*.safetensors"))
    if not seeds:
        methods = sorted(path.parent.relative_to(RETRAIN).as_posix() for path in RETRAIN.rglob("weights"))
        remedy = f"there are networks of {' and '.join(methods)}" if methods else "run `dvc repro`"
        raise UserError(f"there is no retrained network of method {method!r}; {remedy}")
    return seeds


def load_retrained(params: Params, method: str, seed: int) -> Retrained:
    """Raises:
    UserError: there is no such network, or it is not of the network that ``params`` names.
    """
    seeds = seeds_of(method)
    if seed not in seeds:
        raise UserError(
            f"method {method} has no network of seed {seed}; its seeds are {', '.join(map(str, seeds))}: name one of "
            "these, or add it to retrain.seeds and run `dvc repro`"
        )
    info = read_info(PREPARED)
    network, graph = traced_network(params.model, info)
    chosen = Allocation.read(CHANNELS, method)
    check_allocation(chosen, params, graph)
    plain = resize(network, graph, chosen.channels)
    load_weights(plain, RETRAIN / method / "weights" / f"seed-{seed}.safetensors")
    return Retrained(seed, plain.eval(), chosen, RequestedBudget.read(CHANNELS, method), info)


def score(retrained: Retrained, params: Params, split: str) -> Score:
    """Top-1 error and cross-entropy on a split, on the device and in the precision that ``params`` ask for."""
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    context, asked = run_context(params.runtime), recipe(params.retrain)
    to_device(retrained.network, context.device, asked.channels_last)
    return split_score(retrained.network, data, split, asked, context)


def run(
    method: Annotated[str, typer.Argument(help="How channel numbers are chosen: autoslim, uniform or released/NAME.")],
) -> None:
    """Trains the network that a method gives for the budget."""
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    network, graph = traced_network(params.model, data.info)
    chosen, told = Allocation.read(CHANNELS, method), RequestedBudget.read(CHANNELS, method)
    check_smoothing(params, data.info)
    check_allocation(chosen, params, graph)
    if launch(params.runtime, "retrain", method):
        return
    channels = chosen.channels
    asked = params.retrain
    folder = RETRAIN / method
    weights = folder / "weights"
    start = initial_weights_file(CHANNELS, method)
    kept = checkpoints(
        f"retrain-{method.replace('/', '-')}",
        *inputs(params.model, PREPARED),
        start,
        model=params.model.model_dump(),
        channels=channels,
        retrain=asked.model_dump(),
    )
    with (
        distributed_context(params.runtime) as context,
        context.world.entered_on_rank_zero(kept.lock()),
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
            enabled=params.tracking.enabled and context.world.is_rank_zero,
            experiment=params.tracking.experiment,
        ) as tracker,
    ):
        rows = retrain(
            network,
            graph,
            channels,
            data,
            recipe(asked),
            context,
            seeds=asked.seeds,
            start=start if asked.start == "supernet" else None,
            label=f"{method} {told.budget}",
            folder=weights,
            checkpoints=kept,
            observe=lambda seed, row: tracker.metrics(
                {f"seed_{seed}.{name}": value for name, value in row.items() if name != "epoch"}, step=int(row["epoch"])
            ),
        )
        if not context.world.is_rank_zero:
            return
        write_rows(folder / "curves.csv", [{"seed": seed, **row} for seed, own in rows.items() for row in own])
        figures = {**chosen.costs, **over_seeds(rows)}
        write_json(folder / "metrics.json", figures)
        tracker.metrics(numbers(figures))
        tracker.artifact(CHANNELS / f"{method}.json")
        if params.tracking.log_network:
            plain = resize(network, graph, channels)
            load_weights(plain, weights / f"seed-{asked.seeds[0]}.safetensors")
            images, _ = next(iter(eval_batches(data, "search", batch_size=4, device=context.device)))
            tracker.network(plain, images.cpu())
        kept.clear()
