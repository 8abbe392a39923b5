"""Stage ``supernet``: trains the weights that all subnets share."""

import sys
from dataclasses import fields

from autoslim.data.prepared import PreparedData
from autoslim.distributed.ranks import current_world
from autoslim.files import write_json
from autoslim.models.pretrained import weights_file, write_trained
from autoslim.pipeline.assembly import (
    checkpoints,
    grid_spec,
    initial_network,
    inputs,
    recipe,
    traced_network,
)
from autoslim.pipeline.checks import batch_note, check_methods, check_model, check_reach, check_task, check_teacher
from autoslim.pipeline.launch import distributed_context, launch
from autoslim.pipeline.needs import supernet_is_needed
from autoslim.pipeline.params import SupernetParams, load_params
from autoslim.pipeline.project import PREPARED, SUPERNET, TRAINED, repository_root
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.pipeline.tracking.stage import tracked_stage
from autoslim.pipeline.tracking.tags import fingerprint
from autoslim.supernet.extract import SupernetFile
from autoslim.supernet.sandwich import Sandwich
from autoslim.supernet.train import SUBNETS, guessing_subnets, train_supernet
from autoslim.tasks.building import find_task
from autoslim.training.device import memory_errors
from autoslim.training.loop import write_rows


def run() -> None:
    """Trains the supernet by the sandwich rule with in-place distillation. If no method needs it, writes empty files.

    Raises:
        UserError: a parameter is wrong, an earlier stage has not run, or training diverges.
    """
    recorded = RecordedInputs("supernet")
    params = load_params()
    check_model(params.model)
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    task = find_task(params.task)
    network, graph = traced_network(params.model, data.info, task)
    check_task(params, data.info, task)
    check_reach(params, graph)
    check_teacher(params, network, graph)
    needed = supernet_is_needed()
    if needed and launch(params.runtime, "supernet"):
        return
    start = initial_network(params.model, params.supernet, network, graph)
    check_methods(params, network, graph, start.new)
    if not needed:
        print("supernet: not trained, because no method needs it", file=sys.stderr)
        SupernetFile.write_none(SUPERNET)
        write_trained(SUPERNET / TRAINED, start.trained, start.new, params.model.weights)
        write_json(SUPERNET / "metrics.json", {})
        write_rows(SUPERNET / "curves.csv", [], ("epoch", *(f"{which}_{task.score.name}" for which in SUBNETS)))
        recorded.check()
        return
    if current_world().is_rank_zero:
        for line in filter(None, (start.note, batch_note("supernet", params.supernet, data.info))):
            print(f"supernet: {line}", file=sys.stderr)
    trained = weights_file(params.model.weights)
    used = {"images_per_step": min(params.supernet.batch_size, data.info.counts["train"])}
    state = checkpoints(
        "supernet",
        *inputs(params.model, PREPARED, params.task),
        *([trained] if trained else []),
        task=params.task,
        model=params.model.model_dump(),
        supernet=params.supernet.model_dump(),
    )
    with (
        distributed_context(params.runtime, state.folder.name) as context,
        context.world.entered_on_rank_zero(state.lock()),
        tracked_stage(
            params,
            "supernet",
            run_name=f"supernet {params.model.name.rpartition(':')[2]} x{params.supernet.width}",
            sections=["model", "supernet", "data"],
            details=used,
            rank_zero=context.world.is_rank_zero,
            run_file=state.run_file,
        ) as tracker,
        memory_errors(context.device, "supernet.batch_size", params.supernet.batch_size),
    ):
        rows, scores = train_supernet(
            start.network,
            graph,
            data,
            grid_spec(params.supernet),
            recipe(params.supernet),
            context,
            sandwich=sandwich(params.supernet),
            trained=params.model.weights is not None,
            name=params.model.name,
            folder=SUPERNET,
            checkpoints=state,
            observe=lambda row: tracker.metrics(
                {name: value for name, value in row.items() if name not in ("epoch", "learning_rate")},
                step=int(row["epoch"]),
            ),
            task=task,
        )
        if not context.world.is_rank_zero:
            return
        write_trained(SUPERNET / TRAINED, start.trained, start.new, params.model.weights)
        write_rows(SUPERNET / "curves.csv", rows)
        figures = {
            which: {task.score.name: task.value(score.error), task.loss_name: score.loss}
            for which, score in scores.items()
        }
        write_json(SUPERNET / "metrics.json", {**figures, **used})
        if warning := guessing_subnets(scores, task.chance(data)):
            print(f"supernet: {warning}", file=sys.stderr)
        tracker.tag("supernet", fingerprint(SUPERNET / "weights.safetensors"))
        tracker.artifact(SUPERNET / "supernet.json")
        tracker.artifact(SUPERNET / "metrics.json")
        recorded.check()
        state.finish()


def sandwich(supernet: SupernetParams) -> Sandwich:
    return Sandwich(**{field.name: getattr(supernet, field.name) for field in fields(Sandwich)})
