"""Computes the work of a run in closed form: passes, images and multiply-adds of every stage.

Only the search is estimated, because the number of candidates that it scores depends on their scores.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from autoslim.channels.graph import ChannelGraph, Layer
from autoslim.channels.grid import Grid
from autoslim.channels.groups import Channels, Segment
from autoslim.channels.limits import group_ranges
from autoslim.data.batches import even_chunk
from autoslim.pipeline.assembly import group_limits
from autoslim.pipeline.params import Params, Training
from autoslim.resources.costs import Costs, Objective
from autoslim.search.greedy import cost_to_reach
from autoslim.search.methods import DEFAULT, ON_SUPERNET, ON_TRAINED, allocate, need_supernet
from autoslim.supernet.train import VALIDATION_CHUNK, VALIDATION_IMAGES, validated_subnets
from autoslim.training.retrain import EVALUATION_BATCH

Cost = Callable[[Channels], float]
REFINEMENT_PASSES = 6  # configurations that a refinement evaluates, for each group: 2 to 10 were observed
Kind = Literal["supernet", "validation", "search", "retrain", "evaluation"]
TRAINING: tuple[Kind, ...] = "supernet", "retrain"


@dataclass(frozen=True)
class Sizes:
    """Number of images in each split; ``test`` is None if it is not known."""

    train: int
    search: int
    test: int | None


@dataclass(frozen=True)
class Work:
    """Passes of one kind: training steps, or evaluations of a split.

    Attributes:
        name: the name that the table shows.
        kind: what a pass does.
        passes: number of passes.
        images: number of images in a pass.
        at_once: number of images that go through the network together.
        resident_images: number of further images that stay on the device.
        macs: forward multiply-adds for one image, summed over all configurations of a pass.
        configurations: the configurations that a pass runs. A step of the supernet draws further ones.
    """

    name: str
    kind: Kind
    passes: int
    images: int
    at_once: int
    resident_images: int
    macs: float
    configurations: tuple[Channels, ...]

    @property
    def petamacs(self) -> float:
        """Forward petaMACs of all passes. The backward pass of a training step adds about twice as much."""
        return self.passes * self.images * self.macs / 1e15

    def hours(self, seconds: float, images: int) -> float:
        """Returns the hours of all passes if one with ``images`` images takes ``seconds``, assuming linear time."""
        return self.passes * self.images / images * seconds / 3600


def plan(params: Params, costs: Costs, grid: Grid, sizes: Sizes, *, trained: bool = False) -> list[Work]:
    """Returns the work of the stages supernet, search, retrain and (if the size of the test split is known) report.

    Args:
        trained: whether ``model.weights`` are those of the default network for these classes. It is then not retrained
            unless ``retrain.start`` is ``scratch``.
    """
    limits = proxy_limits(params, costs)
    resource = params.resource if params.resource in limits else next(iter(limits))
    objective = Objective(costs, resource, limits if len(limits) > 1 else {})
    uniform = _uniform(params, costs, limits, grid)
    searched = need_supernet(params.methods)
    return [
        *(_supernet_work(params, costs.graph, grid, sizes) if searched else ()),
        *(_search_work(params, objective, grid, sizes, uniform) if searched else ()),
        *_sensitivity_work(params, costs.graph, grid, sizes),
        *(
            work
            for method in params.methods
            for work in _retrain_work(method, params, costs, limits, grid, sizes, trained)
        ),
    ]


def proxy_limits(params: Params, costs: Costs) -> dict[str, float]:
    """Returns the budgets in their resources' units, without latency if it has not been measured.

    If latency is the only limit and is not known, a limit of MACs replaces it: the same share of the default network's
    MACs, or all of them if the budget is in milliseconds.
    """
    known = {name: b for name, b in params.budgets.items() if name != "latency" or costs.table is not None}
    if not known:
        budget = params.budgets["latency"]
        return {"macs": (budget.amount if budget.relative else 1.0) * costs.graph.macs()}
    return {name: budget.absolute(costs.of(costs.graph.default, name)) for name, budget in known.items()}


def _supernet_work(params: Params, graph: ChannelGraph, grid: Grid, sizes: Sizes) -> list[Work]:
    training = params.supernet
    steps, batch = training_steps(training, sizes.train)
    validated = validated_subnets(graph, grid)
    always = graph.macs(grid.widest) + graph.macs(grid.narrowest)
    drawn = training.random_widths * expected_macs(graph, grid)
    images = min(VALIDATION_IMAGES, sizes.search)
    chunk = even_chunk(images, VALIDATION_CHUNK)
    configurations = tuple(validated.values())
    macs = sum(graph.macs(channels) for channels in configurations)
    passes = training.epochs + 1  # after each epoch, and at the end
    return [
        Work("supernet: training", "supernet", steps, batch, batch, images, always + drawn, configurations),
        Work("supernet: validation", "validation", passes, images, chunk, images - chunk, macs, configurations),
    ]


def _uniform(params: Params, costs: Costs, limits: Mapping[str, float], grid: Grid) -> Channels:
    """Returns the uniform network, which stands in for those that are not known yet."""
    return _allocated("uniform", params, costs, limits, grid)


def _allocated(method: str, params: Params, costs: Costs, limits: Mapping[str, float], grid: Grid) -> Channels:
    ranges = group_ranges(costs.graph.groups, group_limits(params.supernet.grid))
    return allocate(method, costs, [grid.widest], limits, params.supernet.grid.divisor, grid.narrowest, ranges)


def _search_work(params: Params, objective: Objective, grid: Grid, sizes: Sizes, uniform: Channels) -> list[Work]:
    images = min(params.search.images, sizes.search)
    chunk = even_chunk(images, params.search.chunk)
    graph = objective.costs.graph
    scored, macs, typical = expected_search(
        graph, grid, objective.cost, objective.stop(params.search.stop, graph.default), params.search.step
    )
    work = [Work("search", "search", scored, images, chunk, images - chunk, macs, (typical,))]
    after = [(method, scored) for method in params.methods if method in ("random", "evolution")]
    if params.allocate.refine and "autoslim" in params.methods:
        after.append(("refinement", REFINEMENT_PASSES * len(grid)))
    for name, passes in after:
        work.append(Work(name, "search", passes, images, chunk, images - chunk, graph.macs(uniform), (uniform,)))
    return work


def _sensitivity_work(params: Params, graph: ChannelGraph, grid: Grid, sizes: Sizes) -> list[Work]:
    """Returns the work of ``sensitivity``: each group at each number, and the widest network once for each number."""
    if "sensitivity" not in params.methods:
        return []
    images = min(params.search.images, sizes.search)
    chunk = even_chunk(images, params.search.chunk)
    passes, macs = grid.steps + max(map(len, grid.values())) - 1, graph.macs(grid.widest)
    return [Work("sensitivity", "search", passes, images, chunk, images - chunk, macs, (grid.widest,))]


def _retrain_work(
    method: str, params: Params, costs: Costs, limits: Mapping[str, float], grid: Grid, sizes: Sizes, trained: bool
) -> list[Work]:
    """Returns the work for one method. The default network is only evaluated if it is ``trained`` (see ``plan``)."""
    channels = _uniform(params, costs, limits, grid)
    if method not in (*ON_SUPERNET, *ON_TRAINED):
        channels = _allocated(method, params, costs, limits, grid)
    training, seeds, macs = params.retrain, len(params.retrain.seeds), costs.graph.macs(channels)
    steps, batch = training_steps(training, sizes.train)
    work = [Work(f"retrain {method}: training", "retrain", seeds * steps, batch, batch, 0, macs, (channels,))]
    evaluations = [(f"retrain {method}: validation", seeds * training.epochs, sizes.search)]
    if method == DEFAULT and trained and training.start != "scratch":
        seeds, work, evaluations = 1, [], [(f"retrain {method}: evaluation", 1, sizes.search)]
    if sizes.test is not None:
        evaluations.append((f"report {method}", seeds, sizes.test))
    for name, passes, images in evaluations:
        at_once = min(images, EVALUATION_BATCH)
        work.append(Work(name, "evaluation", passes, images, at_once, 0, macs, (channels,)))
    return work


def training_steps(training: Training, images: int) -> tuple[int, int]:
    """Returns the number of training steps on ``images`` images, and the images per step."""
    return training.epochs * max(1, images // training.batch_size), min(images, training.batch_size)


def expected_macs(graph: ChannelGraph, grid: Mapping[str, Sequence[int]]) -> float:
    """Returns the exact mean MACs of a configuration whose groups are drawn independently and uniformly from the grid.

    The MACs of a layer are a product of two sizes, so the first two moments of each group's numbers suffice.
    """

    def mean(segment: Segment) -> float:
        if segment.group is None:
            return segment.count
        return fmean(segment.size({segment.group: level}) for level in grid[segment.group])

    def mean_product(a: Segment, b: Segment) -> float:
        if a.group is None or a.group != b.group:  # groups are drawn independently
            return mean(a) * mean(b)
        sizes = ({a.group: level} for level in grid[a.group])
        return fmean(a.size(size) * b.size(size) for size in sizes)

    def macs(layer: Layer) -> float:
        inputs = layer.inputs or (Segment(None, 1),)
        return layer.factor * sum(mean_product(a, b) for a in inputs for b in layer.outputs)

    return sum(macs(layer) for layer in graph.layers if layer.kind != "avgpool")


def expected_search(
    graph: ChannelGraph, grid: Mapping[str, Sequence[int]], cost: Cost, stop: float, step: float
) -> tuple[int, float, Channels]:
    """Estimates how many configurations a search down to the cost ``stop`` scores.

    The estimate assumes that all groups are slimmed evenly; the actual path depends on the scores.

    Args:
        step: the share of the cost that each step removes (see ``greedy_slim``).

    Returns:
        The number of configurations, their mean MACs, and the configuration on the path that is closest to that mean.
    """
    path = even_path(grid, cost, stop, step, coarse_above=cost(graph.default))
    macs = [graph.macs(c) for current in path[:-1] for c in (current, *candidates(grid, current).values())]
    macs.append(graph.macs(path[-1]))
    mean = fmean(macs)
    return len(macs), mean, min(path, key=lambda channels: abs(graph.macs(channels) - mean))


def even_path(
    grid: Mapping[str, Sequence[int]], cost: Cost, stop: float, step: float, coarse_above: float = math.inf
) -> list[Channels]:
    """Returns the configurations of a search that always slims the groups with the largest share of their steps left.

    Down to the smallest budget of each of the paper's families, its number of steps is within 15 % of the number of
    steps that the authors' lists are below the widest configuration.
    """
    grid = Grid(grid)
    path = [grid.widest]
    while cost(path[-1]) > stop and (slimmer := grid.narrower(path[-1])):
        target = cost_to_reach(cost(path[-1]), stop, step, coarse_above) if step else math.inf
        channels = path[-1]
        for name in sorted(slimmer, key=lambda name: grid[name].index(path[-1][name]) / len(grid[name])):
            channels = channels | {name: slimmer[name]}
            if cost(channels) <= target:
                break
        path.append(channels)
    return path


def candidates(grid: Mapping[str, Sequence[int]], channels: Channels) -> dict[str, Channels]:
    """Returns group -> ``channels`` with that group slimmed by one step, for each group that can be slimmed."""
    return {name: channels | {name: count} for name, count in Grid(grid).narrower(channels).items()}
