"""Stage ``search``: slims the supernet greedily; one pass serves every budget."""

from autoslim.data.prepared import PreparedData
from autoslim.pipeline.assembly import checkpoints, inputs, traced_network
from autoslim.pipeline.checks import check_measured_here, check_reach
from autoslim.pipeline.costs import load_costs, load_objective
from autoslim.pipeline.launch import distributed_context, launch
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import PREPARED, RESOURCES, SEARCH, SUPERNET, repository_root
from autoslim.pipeline.tracking import fingerprint, tracked
from autoslim.search.search import search
from autoslim.supernet.extract import load_supernet
from autoslim.training.device import to_device


def run() -> None:
    """Slims the supernet greedily and writes every step."""
    params = load_params()
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    network, graph = traced_network(params.model, data.info)
    costs = load_costs(graph)
    check_measured_here(params, costs.table)
    check_reach(params, graph, costs.table)
    lowered = load_objective(costs)
    supernet, file = load_supernet(SUPERNET, network, graph)
    if launch(params.runtime, "search"):
        return
    asked = params.search
    sections = {"search": asked.model_dump(), "resource": lowered.resource, "limits": dict(lowered.limits)}
    weights = SUPERNET / "weights.safetensors"
    kept = checkpoints(
        "search",
        *inputs(params.model, PREPARED),
        weights,
        SUPERNET / "supernet.json",
        RESOURCES / "latency.json",
        **sections,
    )
    with (
        distributed_context(params.runtime) as context,
        context.world.entered_on_rank_zero(kept.lock()),
        tracked(
            "search",
            run_name=f"search {lowered.resource}",
            params=sections,
            tags={"source": params.data.source, "supernet": fingerprint(weights), "resource": lowered.resource},
            enabled=params.tracking.enabled and context.world.is_rank_zero,
            experiment=params.tracking.experiment,
        ) as tracker,
    ):
        to_device(supernet, context.device, channels_last=True)  # the faster layout for convolutions, on CPUs too
        trajectory = search(
            supernet,
            file.grid,
            data,
            context,
            objective=lowered,
            stop=asked.stop,
            images=asked.images,
            chunk=asked.chunk,
            by=asked.score,
            per_cost=asked.per_cost,
            incremental=asked.incremental,
            risk=asked.risk,
            precision=asked.precision,
            seed=params.data.seed,
            folder=SEARCH,
            checkpoints=kept,
        )
        if not context.world.is_rank_zero:
            return
        for step in trajectory["steps"]:
            shown = ("macs", "params", "memory", "latency", "error", "cross_entropy")
            tracker.metrics({name: step[name] for name in shown if name in step}, step["step"])
        tracker.artifact(SEARCH / "trajectory.json")
        kept.clear()
