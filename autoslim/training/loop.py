"""The training loop. Supernet training and retraining pass different step functions to it."""

import copy
import csv
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.channels.batches import call, first_tensor
from autoslim.data.structure import not_finite
from autoslim.distributed.ranks import SINGLE, World
from autoslim.distributed.sync import GradientSynchronizer, synchronised_batch_norm
from autoslim.errors import UserError
from autoslim.files import write_atomically
from autoslim.tasks.measure import Measure
from autoslim.training.averaging import AveragedWeights
from autoslim.training.checkpoints import Checkpoints
from autoslim.training.device import rng_state, seed_step, set_rng_state
from autoslim.training.progress import Progress

Step = Callable[[Any, Any, int], Tensor]
"""(inputs, targets, number of the step) -> loss. It adds the gradients of a batch."""

Batches = Callable[[int, int], Iterator[tuple[Any, Any]]]
Row = dict[str, float]

SYNC_EVERY = 25  # steps between checks of the loss; each check synchronises the host with the device


@dataclass(frozen=True)
class Plan:
    """The length of a training run, and the time between checkpoints within an epoch."""

    epochs: int
    steps_per_epoch: int
    checkpoint_every_s: float = 300.0

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def train(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    plan: Plan,
    *,
    step: Step,
    batches: Batches,
    learning_rate: Callable[[int], float],
    validate: Callable[[], Row],
    observe: Callable[[Row], None],
    checkpoints: Checkpoints,
    name: str,
    label: str,
    world: World = SINGLE,
    synchronise_batch_norm: bool = True,
    measures: Sequence[Measure] = (),
    clip_norm: float | None = None,
    ema: float | None = None,
) -> list[Row]:
    """Trains ``network`` in place, continuing from its last checkpoint, and returns one row of metrics per epoch.

    A run that is killed and resumed gives the same weights as an uninterrupted one: data order, random widths and
    learning rate depend on the number of the step, and checkpoints hold the states of the random number generators.
    A step of several processes equals that of a single one up to rounding and the random draws of dropout: gradients,
    losses and batch statistics are averaged over all images, and all ranks have the same weights. Over many steps,
    rounding grows (docs/guide/distributed.md). Only rank 0 validates and writes.

    Args:
        step: adds the gradients of a batch and returns the loss.
        batches: ``batches(epoch, skip)`` yields this rank's share of each batch of an epoch after the first ``skip``.
        learning_rate: maps the number of a step to its learning rate.
        validate: returns metrics to add to the row of an epoch.
        observe: called with each new row, for tracking. A resumed run calls it again with the earlier rows.
        checkpoints: stores the state of the run.
        name: name of the state in ``checkpoints``.
        label: name of the run in the progress display.
        synchronise_batch_norm: compute batch statistics over the images of all ranks, which must then run the same
            layers in each step. Otherwise each rank uses the statistics of its images.
        measures: how the progress display formats metrics of ``validate``, whose names end in ``_`` and a measure's.
        clip_norm: gradients of a step whose norm over all parameters is larger are scaled to this norm.
        ema: decay of an exponential moving average of the weights (see ``AveragedWeights``). ``network`` has the
            averaged weights when it is validated and at the end.

    Raises:
        UserError: the loss or a weight is no longer finite. The last checkpoint contains the last finite weights.
    """
    root = torch.initial_seed()
    rows: list[Row] = []
    losses: list[Tensor] = []  # of the current epoch, on the device
    number = 0
    average = None if ema is None else AveragedWeights(network, ema)
    if state := checkpoints.restore(name, lambda state: _restored(state, network, optimiser, average, plan)):
        rows, losses, number = state
        for earlier in rows:
            observe(earlier)
    if world.is_rank_zero:
        checkpoints.check_space(network, optimiser, averaged=average is not None)

    if not world.is_single:
        world.agree(f"step {number}, weights {_digest(network)}", "state")
    gradients = GradientSynchronizer(network, world)
    divergence = _Divergence(plan, checkpoints.path(name), batches)

    def save() -> None:
        divergence.check_weights(network, number)
        if not world.is_rank_zero:
            return
        checkpoints.save(
            name,
            {
                "network": network.state_dict(),
                "optimiser": optimiser.state_dict(),
                "rows": rows,
                "step": number,
                "losses": torch.stack(losses).cpu() if losses else torch.empty(0),
                "rng": rng_state(),
            }
            | ({} if average is None else {"average": average.state()}),
        )

    def validate_average() -> Row:
        with nullcontext() if average is None else average.applied(network):
            return validate()

    saved_at = time.monotonic()
    with Progress(label, plan.steps, done=number) as progress:
        for epoch in range(len(rows), plan.epochs):
            network.train()
            for inputs, targets in batches(epoch, number - epoch * plan.steps_per_epoch):
                rate = learning_rate(number)
                for group in optimiser.param_groups:
                    group["lr"] = rate
                if not world.is_single:
                    seed_step(root, number, world.rank)
                with synchronised_batch_norm(world if synchronise_batch_norm else SINGLE):
                    loss = step(inputs, targets, number)
                losses.append(gradients.share(loss, len(first_tensor(inputs))))
                if clip_norm is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), clip_norm)
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
                if average is not None:
                    average.update(network)
                number += 1
                if len(losses) % SYNC_EVERY == 0:
                    progress.show(loss=divergence.mean(losses, number))
                if time.monotonic() - saved_at > plan.checkpoint_every_s:
                    divergence.mean(losses, number)
                    save()
                    saved_at = time.monotonic()
                progress.advance()
            mean = divergence.mean(losses, number)
            metrics = world.on_rank_zero(validate_average)
            row: Row = {"epoch": epoch + 1, "learning_rate": learning_rate(number - 1), "loss": mean, **metrics}
            rows.append(row)
            losses = []
            progress.show(epoch=f"{epoch + 1}/{plan.epochs}", loss=mean, **_written(metrics, measures))
            save()
            saved_at = time.monotonic()
            observe(row)
    if average is not None:
        average.copy_to(network)
    return rows


def _restored(
    state: dict[str, Any],
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    average: AveragedWeights | None,
    plan: Plan,
) -> tuple[list[Row], list[Tensor], int]:
    """Loads a checkpoint into the network, the optimiser, the average and the generators.

    Returns rows, losses and the step.

    Raises an error of any class if ``state`` is not a checkpoint of this run, and then changes nothing.
    """
    rows, number, losses = state["rows"], state["step"], state["losses"]
    if not 0 <= number <= plan.steps or number != len(rows) * plan.steps_per_epoch + len(losses):
        raise ValueError(f"it is at step {number} of {plan.steps}, with {len(rows)} epochs and {len(losses)} losses")
    before = copy.deepcopy(network.state_dict()), copy.deepcopy(optimiser.state_dict()), rng_state()
    try:
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        set_rng_state(state["rng"])
        if average is not None:
            average.load(state["average"])
    except Exception:
        network.load_state_dict(before[0])
        optimiser.load_state_dict(before[1])
        set_rng_state(before[2])
        raise
    return rows, list(losses.to(next(network.parameters()).device).unbind()), number


def _written(metrics: Row, measures: Sequence[Measure]) -> dict[str, float | str]:
    """Returns the metrics, formatted as their measures are."""
    written: dict[str, float | str] = {}
    for name, value in metrics.items():
        fitting = [measure for measure in measures if name.endswith(f"_{measure.name}")]
        written[name] = fitting[0].short(value) if fitting else value
    return written


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().cpu().double().numpy().tobytes())
    return digest.hexdigest()[:12]


class _Divergence:
    """Raises an error that names the last valid checkpoint if the loss or a weight is not finite.

    If the reason are inputs or targets that are not finite, the error names them. They are read again for this.
    """

    def __init__(self, plan: Plan, checkpoint: Path, batches: Batches) -> None:
        self.plan, self.checkpoint, self.batches = plan, checkpoint, batches

    def mean(self, losses: list[Tensor], done: int) -> float:
        """Returns the mean of ``losses``, which are those of the current epoch up to step ``done``."""
        values = torch.stack(losses)
        if not bool(values.isfinite().all()):
            first = int((~values.isfinite()).nonzero()[0])
            step = done - len(losses) + first
            self._stop(f"the loss is {float(values[first])} at step", step + 1, self._wrong_data(step))
        return float(values.mean())

    def check_weights(self, network: nn.Module, done: int) -> None:
        if not bool(torch.stack([parameter.isfinite().all() for parameter in network.parameters()]).all()):
            self._stop("weights are no longer finite after step", done)

    def _wrong_data(self, step: int) -> str:
        """Returns which of this rank's inputs and targets of a step (from 0) are not finite; "" if all are.

        The ranks do not exchange what they find, because they may be at different steps when they look.
        """
        epoch, skip = divmod(step, self.plan.steps_per_epoch)
        batch = next(self.batches(epoch, skip))
        return " and ".join(name for name, part in zip(("inputs", "targets"), batch, strict=True) if not_finite(part))

    def _stop(self, problem: str, step: int, wrong_data: str = "") -> None:
        exists = self.checkpoint.exists()
        weights = f"the last valid weights are in {self.checkpoint}" if exists else "no checkpoint was written before"
        epoch = (step - 1) // self.plan.steps_per_epoch + 1
        if wrong_data:
            raise UserError(
                f"{problem} {step} (epoch {epoch}), because its {wrong_data} have nan or infinite values; {weights}; "
                "correct the data or their transforms"
            )
        raise UserError(f"{problem} {step} (epoch {epoch}); {weights}; lower learning_rate, or set precision to fp32")


def label_step(network: nn.Module, loss: Callable[[Any, Any], Tensor], autocast: Callable[[], torch.autocast]) -> Step:
    """Returns the step function of ordinary training, which computes the loss from the targets."""

    def step(inputs: Any, targets: Any, _: int) -> Tensor:
        with autocast():
            value = loss(call(network, inputs), targets)
        value.backward()
        return value.detach()

    return step


def write_rows(path: Path, rows: Sequence[Row], columns: Sequence[str] = ()) -> None:
    """Writes rows of metrics to a CSV file. The columns are those of the first row, or ``columns`` without rows."""

    def write(to: Path) -> None:
        with to.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else columns)
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)
