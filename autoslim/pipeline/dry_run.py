"""Dry run: times single passes of each stage with synthetic images on this device, and measures their memory."""

import gc
import itertools
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from autoslim.channels.batches import call, first_tensor
from autoslim.channels.batches import to_device as batch_to_device
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import Grid
from autoslim.channels.resize import initialise, resize
from autoslim.data.prepared import DataInfo, PreparedData
from autoslim.data.structure import on_tensors, zeros
from autoslim.errors import UserError
from autoslim.pipeline import assembly
from autoslim.pipeline.estimate import TRAINING, Work
from autoslim.pipeline.params import Params
from autoslim.pipeline.supernet import sandwich
from autoslim.resources.budgets import format_amount
from autoslim.supernet.sandwich import Loss, sandwich_rule
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import initial_supernet, subnet_scorer
from autoslim.tasks.building import find_task
from autoslim.tasks.evaluation import evaluate
from autoslim.tasks.task import Task
from autoslim.training.averaging import AveragedWeights
from autoslim.training.device import RunContext, autocast, to_device
from autoslim.training.distillation import Teacher
from autoslim.training.loop import Step
from autoslim.training.recipe import Recipe
from autoslim.training.retrain import retrain_step

Pass = Callable[[Any, Any], object]
MAX_REPEATS = 25
LOADING_BATCH = 32  # images


@dataclass(frozen=True)
class PassTiming:
    """The median time in seconds of a pass with ``images`` images, and on CUDA devices the peak of allocated bytes."""

    images: int
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class DryRun:
    """Runs the same training steps and evaluations as the stages, with random weights that no step changes."""

    params: Params
    network: nn.Module
    graph: ChannelGraph
    grid: Grid
    info: DataInfo
    context: RunContext

    def measure(self, work: Work, images: int, limit_s: float) -> PassTiming:
        """Repeats a pass of ``work`` with ``images`` images for about ``limit_s`` seconds, after one warm-up pass.

        Raises:
            UserError: the images do not fit into the device's memory.
        """
        gc.collect()  # frees the networks of earlier passes, which are in reference cycles
        minimum = self.least_bytes(work, images) if work.kind in TRAINING else 0
        if minimum > (available := device_bytes(self.context.device)):
            raise _out_of_memory(
                work, images, f"needs at least {_gigabytes(minimum)}, but the device has {_gigabytes(available)}"
            )
        try:
            return self._timed(self._pass(work), images, limit_s)
        except torch.OutOfMemoryError as error:
            raise _out_of_memory(work, images, f"needs more than the {_gigabytes(available)} of the device") from error

    def least_bytes(self, work: Work, images: int) -> int:
        """Returns a lower bound on a training step's memory: weights, gradients, momentum and saved activations.

        The bytes that autograd saves for the backward pass (of the widest network) are affine in the number of images,
        so two small batches determine them. Temporary tensors and workspaces of libraries are not included.
        """
        supernet = work.kind == "supernet"
        recipe = assembly.recipe(self.params.supernet if supernet else self.params.retrain)
        network = self._supernet(recipe.channels_last) if supernet else self._plain(work, recipe)
        precision = recipe.autocast(self.context)
        two, four = (saved_bytes(network, precision, *self._batch(count), self._task.loss) for count in (2, 4))
        per_image = (four - two) // 2
        weights = sum(parameter.nbytes for parameter in network.parameters())
        return 3 * weights + two + (images - 2) * per_image

    def _timed(self, run: Pass, images: int, limit_s: float) -> PassTiming:
        batch, device = self._batch(images), self.context.device
        run(*batch)  # allocates memory and selects kernels
        _wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds: list[float] = []
        while not seconds or (sum(seconds) < limit_s and len(seconds) < MAX_REPEATS):
            started = time.perf_counter()
            run(*batch)
            _wait(device)
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return PassTiming(images, median(seconds), peak)

    def _pass(self, work: Work) -> Pass:
        supernet, retrain = assembly.recipe(self.params.supernet), assembly.recipe(self.params.retrain)
        match work.kind:
            case "supernet":
                shared = self._supernet(supernet.channels_last)
                rule = sandwich_rule(
                    shared,
                    self.grid,
                    sandwich(self.params.supernet),
                    task=self._task,
                    label_smoothing=supernet.label_smoothing,
                    autocast=supernet.autocast(self.context),
                )
                return _stepping(shared, supernet, rule)
            case "validation":
                return _scoring(
                    self._supernet(supernet.channels_last), work, supernet.autocast(self.context), self._task
                )
            case "search":
                precision = autocast(self.context.device, self.params.search.precision)
                return _scoring(self._supernet(channels_last=True), work, precision, self._task)
            case "retrain":
                plain = self._plain(work, retrain)
                return _stepping(plain, retrain, self._retrain_step(plain, retrain))
            case "evaluation":
                plain = self._plain(work, retrain)
                return lambda inputs, targets: evaluate(
                    self._task, plain, [(inputs, targets)], retrain.autocast(self.context)
                )

    def _supernet(self, channels_last: bool) -> Supernet:
        supernet = initial_supernet(
            self.network, self.graph, self.grid.widest, self.params.supernet.seed, trained=False
        )
        to_device(supernet, self.context.device, channels_last)
        return supernet

    def _plain(self, work: Work, recipe: Recipe) -> nn.Module:
        plain = resize(self.network, self.graph, work.configurations[0], seed=None)
        initialise(plain, self.params.retrain.seeds[0])
        return to_device(plain, self.context.device, recipe.channels_last)

    @cached_property
    def _task(self) -> Task:
        return find_task(self.params.task)

    def _retrain_step(self, plain: nn.Module, recipe: Recipe) -> Step:
        teacher = None
        if self.params.retrain.teacher is not None:
            teacher = Teacher(resize(self.network, self.graph, self.graph.default, seed=None))
        return retrain_step(plain, self._task, recipe, self.context, teacher)

    def _batch(self, count: int) -> tuple[Any, Any]:
        inputs = on_tensors(self.info.example(count), lambda t: torch.randn_like(t) if t.is_floating_point() else t)
        device = self.context.device
        return batch_to_device(inputs, device), batch_to_device(zeros(self.info.targets, count), device)


def _stepping(network: nn.Module, recipe: Recipe, step: Step) -> Pass:
    """Returns a training step as in the training loop, with a learning rate of 0."""
    optimiser = replace(recipe, learning_rate=0.0).optimiser(network)
    average = None if recipe.ema is None else AveragedWeights(network, recipe.ema)
    numbers = itertools.count()

    def run(inputs: Any, targets: Any) -> None:
        step(inputs, targets, next(numbers))
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(network.parameters(), recipe.clip_norm)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if average is not None:
            average.update(network)

    network.train()
    return run


def _scoring(supernet: Supernet, work: Work, precision: Callable[[], torch.autocast], task: Task) -> Pass:
    def run(inputs: Any, targets: Any) -> None:
        score = subnet_scorer(supernet, [(inputs, targets)], precision, task)
        for channels in work.configurations:
            score(channels)

    return run


def loading_rate(data: PreparedData, recipe: Recipe, context: RunContext, limit_s: float) -> float:
    """Returns the rate in images/s at which augmented training images reach the device, including worker start-up."""
    started, count = time.perf_counter(), 0
    for inputs, _ in replace(recipe, batch_size=LOADING_BATCH).batches(data, 0, context)(0, 0):
        count += len(first_tensor(inputs))
        if time.perf_counter() - started > limit_s:
            break
    return count / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _gigabytes(amount: float) -> str:
    return format_amount(amount, "memory")


def _out_of_memory(work: Work, images: int, reason: str) -> UserError:
    return UserError(
        f"{work.name} with {images} images at once {reason}; measure with fewer images, for example --batch "
        f"{max(2, images // 4)}, and lower batch_size for a run on this device"
    )


def saved_bytes(
    network: nn.Module, precision: Callable[[], torch.autocast], inputs: Any, targets: Any, loss: Loss
) -> int:
    """Returns the bytes that autograd saves for the backward pass of this batch, without weights."""
    saved: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor), precision():
        value = loss(call(network, inputs), targets)
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert value.requires_grad  # the graph still holds all saved tensors, so no address was used twice
    return sum(size for address, size in saved.items() if address not in weights)


def device_bytes(device: torch.device) -> float:
    """Returns the size of the device's memory in bytes; infinity if it is not known."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf
