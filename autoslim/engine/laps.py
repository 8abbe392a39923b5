"""The chunks of search images as laps of a race between candidates."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from autoslim.algorithms.racing import CURRENT, Lap, Outcome
from autoslim.algorithms.slimming import Option, SlimmingStep
from autoslim.engine.evaluation import Chunk, check_finite
from autoslim.engine.processes import ALONE, Processes
from autoslim.engine.runtime import evaluating
from autoslim.networks.supernet import Supernet
from autoslim.networks.tails import Tails
from autoslim.networks.trusting import trusted_tails

TRIED = 8  # images


def search_laps(
    supernet: Supernet,
    chunks: Sequence[Chunk],
    autocast: Callable[[], torch.autocast],
    *,
    incremental: bool,
    say: Callable[[str], None],
    processes: Processes = ALONE,
) -> list[Lap]:
    """One lap for each chunk of images, under the batch statistics of that chunk.

    Of several processes each runs some of the configurations, on the whole chunk, and all get all outcomes: the very
    numbers that one process would have had.

    Args:
        incremental: run only what a candidate changes (see ``Tails``), not each candidate as a whole. It is tried
            first; a network that it does not work on is run whole.
        say: is told of that.
    """
    tails = None
    if incremental:
        with evaluating(supernet):
            tails, reason = trusted_tails(supernet, chunks[0][0][:TRIED])
        if tails is None:
            say(f"search: each candidate is run whole, because the network does not run in parts: {reason}")
    return [_lap(supernet, tails, chunk, autocast, processes) for chunk in chunks]


def _lap(
    supernet: Supernet, tails: Tails | None, chunk: Chunk, autocast: Callable[[], torch.autocast], processes: Processes
) -> Lap:
    images, labels = chunk

    def lap(current: SlimmingStep, options: Mapping[str, Option], wanted: Collection[str]) -> dict[str, Outcome]:
        names = [name for name in (*options, CURRENT) if name in wanted]
        own = names[processes.rank :: processes.size]  # in the network's order: each gets long tails and short ones
        slimmer = {name: options[name].channels for name in own if name != CURRENT}
        shared = torch.zeros(len(names), 2, len(labels), device=labels.device)
        with evaluating(supernet), autocast():
            if tails is not None and len(names) > 1:
                runs = _branching(tails, images, current, own, slimmer)
            else:
                runs = _one_by_one(supernet, images, current, own, slimmer)
            for name, logits in runs:
                shared[names.index(name)] = _judged(logits, labels)
        table = processes.add(shared).cpu().double()  # the others' rows are zero; the host waits once a lap
        for name, (_, nats) in zip(names, table, strict=True):
            if not bool(nats.isfinite().all()):
                slimmed = f"{options[name].channels} channels of {name}" if name != CURRENT else "no group slimmed"
                check_finite(float(nats.mean()), f"the subnet of cost {current.cost:,} with {slimmed}")
        return {name: Outcome(*rows.unbind()) for name, rows in zip(names, table, strict=True)}

    return lap


def _branching(
    tails: Tails, images: Tensor, current: SlimmingStep, own: Sequence[str], slimmer: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    left = len(own)
    runs = tails.run(images, current.channels, slimmer)
    while left:  # and no further: the current network's end is only run where it is asked for
        name, logits = next(runs)
        left -= 1
        yield CURRENT if name is None else name, logits


def _one_by_one(
    supernet: Supernet, images: Tensor, current: SlimmingStep, own: Sequence[str], slimmer: Mapping[str, int]
) -> Iterator[tuple[str, Tensor]]:
    for name in own:
        supernet.select({**current.channels, **({name: slimmer[name]} if name != CURRENT else {})})
        yield name, supernet(images)


def _judged(logits: Tensor, labels: Tensor) -> Tensor:
    """(2, N): whether each image is wrong at top-1, and its cross-entropy in nats."""
    logits = logits.float()
    return torch.stack([(logits.argmax(1) != labels).float(), F.cross_entropy(logits, labels, reduction="none")])
