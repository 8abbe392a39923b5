"""Stage ``search``: slims the supernet greedily; one pass serves every budget."""

import sys

from autoslim.data.prepared import PreparedData
from autoslim.distributed.ranks import current_world
from autoslim.files import write_json, write_sealed
from autoslim.pipeline.assembly import checkpoints, inputs, traced_network
from autoslim.pipeline.checks import check_measured_here, check_reach, check_score, search_note
from autoslim.pipeline.costs import load_costs, load_objective
from autoslim.pipeline.launch import distributed_context, launch
from autoslim.pipeline.needs import supernet_is_needed
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import PREPARED, RESOURCES, SEARCH, SUPERNET, repository_root
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.pipeline.tracking.stage import tracked_stage
from autoslim.pipeline.tracking.tags import fingerprint
from autoslim.search.search import SearchSettings, search
from autoslim.supernet.extract import load_supernet
from autoslim.tasks.building import find_task
from autoslim.training.device import memory_errors, to_device


def run() -> None:
    """Slims the supernet and records every step. If no method needs this, writes empty files.

    Raises:
        UserError: a parameter is wrong, or an earlier stage has not run.
    """
    recorded = RecordedInputs("search")
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    task = find_task(params.task)
    check_score(params, task)
    network, graph = traced_network(params.model, data.info, task)
    costs = load_costs(graph)
    check_measured_here(params, costs.table)
    check_reach(params, graph, costs.table)
    if not supernet_is_needed():
        print("search: nothing is searched, because no method needs it", file=sys.stderr)
        write_sealed(SEARCH / "trajectory.json", {})
        write_json(SEARCH / "metrics.json", {})
        recorded.check()
        return
    objective = load_objective(costs)
    supernet, file = load_supernet(SUPERNET, network, graph, data)
    if launch(params.runtime, "search"):
        return
    if (note := search_note(params.search, data.info)) and current_world().is_rank_zero:
        print(f"search: {note}", file=sys.stderr)
    weights = SUPERNET / "weights.safetensors"
    target = {"resource": objective.resource, "limits": dict(objective.limits)}
    state = checkpoints(
        "search",
        *inputs(params.model, PREPARED, params.task),
        weights,
        SUPERNET / "supernet.json",
        RESOURCES / "latency.json",
        task=params.task,
        search=params.search.model_dump(),
        **target,
    )
    with (
        distributed_context(params.runtime, state.folder.name) as context,
        context.world.entered_on_rank_zero(state.lock()),
        tracked_stage(
            params,
            "search",
            run_name=f"search {objective.resource}",
            sections=["search"],
            details=target,
            tags={"supernet": fingerprint(weights), "resource": objective.resource},
            rank_zero=context.world.is_rank_zero,
            run_file=state.run_file,
        ) as tracker,
        memory_errors(context.device, "search.chunk", params.search.chunk),
    ):
        to_device(supernet, context.device, channels_last=True)  # the faster layout for convolutions, also on CPUs
        trajectory = search(
            supernet,
            file.grid,
            data,
            context,
            objective=objective,
            settings=SearchSettings(**params.search.model_dump()),
            seed=params.data.seed,
            folder=SEARCH,
            checkpoints=state,
            task=task,
            supernet_digest=file.weights,
        )
        if not context.world.is_rank_zero:
            return
        for step in trajectory["steps"]:
            tracker.metrics({name: step[name] for name in (objective.resource, "error", task.loss_name)}, step["step"])
        tracker.artifact(SEARCH / "trajectory.json")
        recorded.check()
        state.finish()
