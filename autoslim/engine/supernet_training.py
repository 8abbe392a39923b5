"""Training a supernet, from the default network to shared weights on disk."""

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import nn

from autoslim.algorithms.sandwich import sandwich_rule
from autoslim.algorithms.slimming import Score
from autoslim.engine.artifacts import SupernetFile, save_weights
from autoslim.engine.checkpoints import Checkpoints
from autoslim.engine.chunks import search_chunks
from autoslim.engine.data import PreparedData
from autoslim.engine.evaluation import subnet_scorer
from autoslim.engine.recipe import Recipe
from autoslim.engine.runtime import Machine, seed_everything, to_device
from autoslim.engine.training import Row, train
from autoslim.networks.graph import ChannelGraph
from autoslim.networks.initialisation import initialise
from autoslim.networks.resizing import resize
from autoslim.networks.span import Span
from autoslim.networks.supernet import Supernet
from autoslim.vocabulary.channels import Channels

VALIDATION_IMAGES = 2048  # of the search split, kept on the device
VALIDATION_CHUNK = 256  # images that share their batch statistics (paper section 6, row 9)


def subnets_watched(graph: ChannelGraph, levels: Mapping[str, tuple[int, ...]]) -> dict[str, Channels]:
    """The configurations whose accuracy is shown at each epoch; the default one as far as the supernet is that wide."""
    return {
        "widest": {name: options[0] for name, options in levels.items()},
        "default": {name: min(group.size, levels[name][0]) for name, group in graph.groups.items()},
        "narrowest": {name: options[-1] for name, options in levels.items()},
    }


def train_supernet(
    network: nn.Module,
    graph: ChannelGraph,
    data: PreparedData,
    span: Span,
    recipe: Recipe,
    machine: Machine,
    *,
    random_widths: int,
    distillation: bool,
    seed: int,
    name: str,
    folder: Path,
    checkpoints: Checkpoints,
    observe: Callable[[Row], None],
) -> tuple[list[Row], dict[str, Score]]:
    """Trains the supernet of ``network`` by the sandwich rule (paper section 1.2) and writes it to ``folder``.

    Returns:
        A row of figures for each epoch, and the scores of the widest, default and narrowest configuration at the end,
        on the search split under batch statistics.
    """
    levels = span.grid(graph)
    watched = subnets_watched(graph, levels)
    wide = resize(network, graph, watched["widest"])
    initialise(wide, seed)
    seed_everything(seed)
    supernet = Supernet(wide, graph)
    to_device(supernet, machine.device, recipe.channels_last)
    plan = recipe.plan(data, machine)
    chunks = search_chunks(data, machine, images=VALIDATION_IMAGES, chunk=VALIDATION_CHUNK, seed=seed)
    score = subnet_scorer(supernet, chunks, recipe.autocast(machine))

    def validate() -> Row:
        return {f"{which}_top1": 1 - score(channels).error for which, channels in watched.items()}

    step = sandwich_rule(
        supernet,
        levels,
        random_widths=random_widths,
        seed=seed,
        label_smoothing=recipe.label_smoothing,
        distillation=distillation,
        autocast=recipe.autocast(machine),
    )
    rows = train(
        supernet,
        recipe.optimiser(supernet),
        plan,
        step=step,
        batches=recipe.batches(data, seed, machine),
        learning_rate=recipe.rate(plan),
        validate=validate,
        observe=observe,
        checkpoints=checkpoints,
        name="supernet",
        label="supernet",
    )
    supernet.select(supernet.widest)
    save_weights(supernet.network, folder / "weights.safetensors")
    SupernetFile(name, graph.input_shape, levels, graph.default).write(folder)
    return rows, {which: score(channels) for which, channels in watched.items()}
