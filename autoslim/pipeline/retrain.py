"""Stage ``retrain``: trains one method's network once for each seed. Also loads and scores retrained networks."""

import sys
from dataclasses import dataclass

from torch import nn

from autoslim.channels.resize import resize
from autoslim.data.batches import eval_batches
from autoslim.data.prepared import DataInfo, PreparedData, data_digest, read_info
from autoslim.distributed.ranks import current_world
from autoslim.errors import UserError
from autoslim.files import write_json
from autoslim.models.pretrained import weights_file
from autoslim.pipeline.artifacts import Allocation, RequestedBudget, initial_weights_file
from autoslim.pipeline.assembly import checkpoints, inputs, recipe, run_context, teacher_network, traced_network
from autoslim.pipeline.checks import batch_note, check_allocation, check_task, check_teacher_file
from autoslim.pipeline.launch import distributed_context, launch
from autoslim.pipeline.params import Params, check_method, load_params
from autoslim.pipeline.project import CHANNELS, PREPARED, RETRAIN, SUPERNET, repository_root
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.pipeline.tracking.stage import logged_model_name, tracked_stage
from autoslim.pipeline.tracking.tags import lineage
from autoslim.tasks.building import find_task
from autoslim.tasks.classification import Classification
from autoslim.tasks.evaluation import Evaluation
from autoslim.training.checkpoints import load_weights
from autoslim.training.device import memory_errors, to_device
from autoslim.training.distillation import Teacher
from autoslim.training.loop import write_rows
from autoslim.training.retrain import evaluate_split, keep, over_seeds, retrain


def run(method: str) -> None:
    """Trains the network that ``method`` chose for the budget.

    Raises:
        UserError: there is no such method, a parameter is wrong, an earlier stage has not run, or training diverges.
    """
    check_method(method)
    recorded = RecordedInputs("retrain", method)
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    task = find_task(params.task)
    network, graph = traced_network(params.model, data.info, task)
    allocation, requested = Allocation.read(CHANNELS, method), RequestedBudget.read(CHANNELS, method)
    check_task(params, data.info, task)
    check_allocation(allocation, params, graph)
    kept = allocation.start == "trained"
    check_teacher_file(params)
    teaching = None if kept else teacher_network(params, network, graph)
    if not kept and launch(params.runtime, "retrain", method):
        return
    training = params.retrain
    folder = RETRAIN / method
    start = initial_weights_file(CHANNELS, method, allocation.weights)
    used = {} if kept else {"images_per_step": min(training.batch_size, data.info.counts["train"])}
    if current_world().is_rank_zero:
        note = batch_note("retrain", training, data.info)
        if kept:
            note = "the network of model.weights is not retrained"
        if note:
            print(f"retrain {method}: {note}", file=sys.stderr)
    teacher = None if teaching is None else Teacher(teaching, training.teacher_weight, training.teacher_temperature)
    trained = weights_file(params.model.weights) if teacher else None
    state = checkpoints(
        f"retrain-{method.replace('/', '-')}",
        *inputs(params.model, PREPARED, params.task),
        start,
        *([trained] if trained else []),
        task=params.task,
        model=params.model.model_dump(),
        channels=allocation.channels,
        start=allocation.start,
        retrain=training.model_dump(),
    )
    tracked = "loss", f"search_{task.score.name}"
    budget = {"budget": requested.budget, "resource": requested.resource, "method": method}
    with (
        distributed_context(params.runtime, state.folder.name) as context,
        context.world.entered_on_rank_zero(state.lock()),
        tracked_stage(
            params,
            "retrain",
            run_name=f"retrain {method} {requested.budget}",
            sections=["retrain", "model"],
            details={**budget, "start": allocation.start, **used},
            tags={**budget, **lineage(SUPERNET / "weights.safetensors")},
            rank_zero=context.world.is_rank_zero,
            run_file=state.run_file,
        ) as tracker,
        memory_errors(context.device, "retrain.batch_size", training.batch_size),
    ):
        common = (network, graph, allocation.channels, data, recipe(training), context)
        origin = allocation.origin(data.digest)
        if kept:
            rows = keep(
                *common, seed=training.seeds[0], start=start, folder=folder / "weights", origin=origin, task=task
            )
        else:
            rows = retrain(
                *common,
                seeds=training.seeds,
                start=None if allocation.start == "scratch" else start,
                teacher=teacher,
                label=f"{method} {requested.budget}",
                folder=folder / "weights",
                origin=origin,
                checkpoints=state,
                observe=lambda seed, row: tracker.metrics(
                    {f"{name}/seed_{seed}": value for name, value in row.items() if name in tracked},
                    step=int(row["epoch"]),
                ),
                task=task,
            )
        if not context.world.is_rank_zero:
            return
        write_rows(folder / "curves.csv", [{"seed": seed, **row} for seed, epochs in rows.items() for row in epochs])
        summary = over_seeds(rows)
        figures = {**allocation.costs, **used, **summary}
        write_json(folder / "metrics.json", figures)
        tracker.metrics({f"{name}/mean": summary[name]["mean"] for name in tracked if name in summary})
        tracker.artifact(CHANNELS / f"{method}.json")
        if params.tracking.log_network:
            plain = resize(network, graph, allocation.channels, seed=None)
            load_weights(plain, folder / "weights" / f"seed-{training.seeds[0]}.safetensors")
            images, _ = next(iter(eval_batches(data, "search", batch_size=4, device=context.device)))
            tracker.network(
                plain,
                images,
                data.info,
                logged_model_name(params, requested.budget, method),
                tags={"seed": str(training.seeds[0]), "classes": str(len(data.info.classes))},
                classifies=isinstance(task, Classification),
            )
        recorded.check()
        state.finish()


@dataclass(frozen=True)
class Retrained:
    """A method's network with the weights of one seed, in evaluation mode on the CPU, and its budget and data."""

    seed: int
    network: nn.Module
    allocation: Allocation
    requested: RequestedBudget
    info: DataInfo


def seeds_of(method: str) -> list[int]:
    """Returns the seeds for which ``method`` has retrained networks.

    Raises:
        UserError: there are no such networks, or there is no such method.
    """
    check_method(method)
    folder = RETRAIN / method / "weights"
    seeds = sorted(int(path.stem.removeprefix("seed-")) for path in folder.glob("seed-*.safetensors"))
    if not seeds:
        methods = sorted(path.parent.relative_to(RETRAIN).as_posix() for path in RETRAIN.rglob("weights"))
        remedy = f"there are networks of {' and '.join(methods)}" if methods else "run `dvc repro`"
        raise UserError(f"there is no retrained network of method {method!r}; {remedy}")
    return seeds


def load_retrained(params: Params, method: str, seed: int) -> Retrained:
    """Loads the network of a method and seed.

    Raises:
        UserError: there is no such network, or it was made from another network than the one that ``params`` names, or
            from other data or initial weights.
    """
    seeds = seeds_of(method)
    if seed not in seeds:
        raise UserError(
            f"method {method} has no network with seed {seed}; its seeds are {', '.join(map(str, seeds))}: choose one "
            "of these, or add it to retrain.seeds and run `dvc repro`"
        )
    info = read_info(PREPARED)
    network, graph = traced_network(params.model, info, find_task(params.task))
    allocation = Allocation.read(CHANNELS, method)
    check_allocation(allocation, params, graph)
    plain = resize(network, graph, allocation.channels, seed=None)
    expected = allocation.origin(data_digest(PREPARED)) | {"seed": str(seed)}
    load_weights(plain, RETRAIN / method / "weights" / f"seed-{seed}.safetensors", expected)
    return Retrained(seed, plain.eval(), allocation, RequestedBudget.read(CHANNELS, method), info)


def evaluate(retrained: Retrained, params: Params, split: str) -> Evaluation:
    """Returns the scores and measures on a split, on the device and in the precision of ``params``."""
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    context, training = run_context(params.runtime), recipe(params.retrain)
    to_device(retrained.network, context.device, training.channels_last)
    return evaluate_split(retrained.network, data, split, training, context, find_task(params.task))
