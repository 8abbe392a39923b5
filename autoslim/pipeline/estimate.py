"""What a run of the parameters will do, in closed form: passes, images and multiply-adds of every stage.

Only the search is an estimate: how many candidates it scores depends on their scores.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from autoslim.channels.graph import ChannelGraph, Layer
from autoslim.channels.groups import Channels, Segment
from autoslim.data.batches import even_chunk
from autoslim.pipeline.params import Params, Training
from autoslim.resources.costs import Costs, Objective
from autoslim.search.methods import allocate
from autoslim.supernet.train import VALIDATION_CHUNK, VALIDATION_IMAGES, validated_subnets
from autoslim.training.retrain import EVALUATION_BATCH

Cost = Callable[[Channels], float]
Kind = Literal["supernet", "validation", "search", "retrain", "evaluation"]
TRAINING: tuple[Kind, ...] = "supernet", "retrain"


@dataclass(frozen=True)
class Sizes:
    """Images by split; ``test`` is None where nobody has said."""

    train: int
    search: int
    test: int | None


@dataclass(frozen=True)
class Work:
    """Passes of one kind: a step of training, or a look at images of a split.

    ``images`` are those of one pass, ``at_once`` those of them that go through the network together, ``kept`` images
    that stay on the device besides. ``macs`` are forward and for one image, of all configurations in a pass together.
    ``configurations`` are what it runs (a supernet's step draws others beside them).
    """

    name: str
    kind: Kind
    passes: int
    images: int
    at_once: int
    kept: int
    macs: float
    configurations: tuple[Channels, ...]

    @property
    def petamacs(self) -> float:
        """Forward, of all passes. The backward pass of a training step takes about twice that on top."""
        return self.passes * self.images * self.macs / 1e15

    def hours(self, seconds: float, images: int) -> float:
        """Of all passes, where one with ``images`` takes ``seconds``: linear in the images."""
        return self.passes * self.images / images * seconds / 3600


def plan(params: Params, costs: Costs, levels: Mapping[str, tuple[int, ...]], sizes: Sizes) -> list[Work]:
    """The work of supernet, search, retrain and report (of report only where the test split's size is known)."""
    limits = proxy_limits(params, costs)
    resource = params.resource if params.resource in limits else next(iter(limits))
    lowered = Objective(costs, resource, limits if len(limits) > 1 else {})
    return [
        *_supernet_work(params, costs.graph, levels, sizes),
        _search_work(params, lowered, levels, sizes),
        *(work for method in params.methods for work in _retrain_work(method, params, costs, limits, levels, sizes)),
    ]


def proxy_limits(params: Params, costs: Costs) -> dict[str, float]:
    """The budgets in their resources' units. What bounds latency is left out where that is not known; if nothing else
    is bounded, so many percent of the default network's MACs stand in for it, or (of milliseconds) all of them."""
    known = {name: b for name, b in params.budgets.items() if name != "latency" or costs.table is not None}
    if not known:
        budget = params.budgets["latency"]
        return {"macs": (budget.amount if budget.relative else 1.0) * costs.graph.macs()}
    return {name: budget.absolute(costs.of(costs.graph.default, name)) for name, budget in known.items()}


def _supernet_work(
    params: Params, graph: ChannelGraph, levels: Mapping[str, tuple[int, ...]], sizes: Sizes
) -> list[Work]:
    asked = params.supernet
    steps, batch = training_steps(asked, sizes.train)
    subnets = validated_subnets(graph, levels)
    fixed = graph.macs(subnets["widest"]) + graph.macs(subnets["narrowest"])
    drawn = asked.random_widths * expected_macs(graph, levels)
    looked_at = min(VALIDATION_IMAGES, sizes.search)
    chunk = even_chunk(looked_at, VALIDATION_CHUNK)
    watched = tuple(subnets.values())
    macs = sum(graph.macs(channels) for channels in watched)
    looks = asked.epochs + 1  # after each epoch, and at the end
    return [
        Work("supernet: training", "supernet", steps, batch, batch, looked_at, fixed + drawn, watched),
        Work("supernet: validation", "validation", looks, looked_at, chunk, looked_at - chunk, macs, watched),
    ]


def _search_work(params: Params, lowered: Objective, levels: Mapping[str, tuple[int, ...]], sizes: Sizes) -> Work:
    images = min(params.search.images, sizes.search)
    chunk = even_chunk(images, params.search.chunk)
    graph = lowered.costs.graph
    scored, macs, typical = expected_search(
        graph, levels, lowered.cost, lowered.stop(params.search.stop, graph.default)
    )
    return Work("search", "search", scored, images, chunk, images - chunk, macs, (typical,))


def _retrain_work(
    method: str,
    params: Params,
    costs: Costs,
    limits: Mapping[str, float],
    levels: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
) -> list[Work]:
    """For autoslim with the uniform network at the budget, for that one's own is not known yet."""
    widest, narrowest = ({name: options[end] for name, options in levels.items()} for end in (0, -1))
    stand_in = "uniform" if method == "autoslim" else method
    channels = allocate(stand_in, costs, [widest], limits, params.supernet.grid.divisor, narrowest)
    asked, seeds, macs = params.retrain, len(params.retrain.seeds), costs.graph.macs(channels)
    steps, batch = training_steps(asked, sizes.train)
    work = [Work(f"retrain {method}: training", "retrain", seeds * steps, batch, batch, 0, macs, (channels,))]
    looks = [(f"retrain {method}: validation", seeds * asked.epochs, sizes.search)]
    if sizes.test is not None:
        looks.append((f"report {method}", seeds, sizes.test))
    for name, passes, images in looks:
        at_once = min(images, EVALUATION_BATCH)
        work.append(Work(name, "evaluation", passes, images, at_once, 0, macs, (channels,)))
    return work


def training_steps(training: Training, images: int) -> tuple[int, int]:
    """Steps of a training on so many images, and the images of each (``engine.data.batches_per_epoch``)."""
    return training.epochs * max(1, images // training.batch_size), min(images, training.batch_size)


def expected_macs(graph: ChannelGraph, levels: Mapping[str, Sequence[int]]) -> float:
    """The mean multiply-adds of a configuration drawn group by group, each level equally likely: exact.

    A layer's MACs are a product of two sizes, so the first two moments of a group's levels are enough.
    """

    def mean(segment: Segment) -> float:
        if segment.group is None:
            return segment.count
        return fmean(segment.size({segment.group: level}) for level in levels[segment.group])

    def mean_product(a: Segment, b: Segment) -> float:
        if a.group is None or a.group != b.group:  # groups are drawn independently
            return mean(a) * mean(b)
        sizes = ({a.group: level} for level in levels[a.group])
        return fmean(a.size(size) * b.size(size) for size in sizes)

    def macs(layer: Layer) -> float:
        inputs = layer.inputs or (Segment(None, 1),)
        return layer.factor * sum(mean_product(a, b) for a in inputs for b in layer.outputs)

    return sum(macs(layer) for layer in graph.layers if layer.kind != "avgpool")


def expected_search(
    graph: ChannelGraph, levels: Mapping[str, Sequence[int]], cost: Cost, stop: float
) -> tuple[int, float, Channels]:
    """How many configurations a search down to a cost scores, their mean MACs, and one on its way of about so many.

    It is an estimate, of a search that slims all groups evenly: the path depends on the scores.
    """
    path = even_path(levels, cost, stop)
    macs = [graph.macs(path[0]), *(graph.macs(c) for passed in path[:-1] for c in candidates(levels, passed).values())]
    mean = fmean(macs)
    return len(macs), mean, min(path, key=lambda channels: abs(graph.macs(channels) - mean))


def even_path(levels: Mapping[str, Sequence[int]], cost: Cost, stop: float) -> list[Channels]:
    """The configurations that a search passes which always slims the group that keeps the largest share of its levels.

    To the smallest budget of the paper's families it has as many steps as the authors' lists lie below the widest,
    within 15 %.
    """
    path = [{name: options[0] for name, options in levels.items()}]
    while cost(path[-1]) > stop and (slimmer := candidates(levels, path[-1])):

        def kept(name: str) -> float:
            return 1 - levels[name].index(path[-1][name]) / len(levels[name])

        path.append(slimmer[max(slimmer, key=kept)])
    return path


def candidates(levels: Mapping[str, Sequence[int]], channels: Channels) -> dict[str, Channels]:
    """Group -> the configuration with one level less of it, for each group that has one."""
    lower = {name: levels[name].index(count) + 1 for name, count in channels.items()}
    return {name: channels | {name: levels[name][at]} for name, at in lower.items() if at < len(levels[name])}
