"""Times single passes of a run on this device with synthetic images, and measures their memory."""

import gc
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.resize import initialise, resize
from autoslim.data.prepared import PreparedData
from autoslim.errors import UserError
from autoslim.pipeline import assembly
from autoslim.pipeline.estimate import TRAINING, Work
from autoslim.pipeline.params import Params
from autoslim.resources.budgets import format_amount
from autoslim.supernet.sandwich import sandwich_rule
from autoslim.supernet.supernet import Supernet
from autoslim.supernet.train import initial_supernet, subnet_scorer
from autoslim.tasks.classification import evaluate, smoothed_cross_entropy
from autoslim.training.device import RunContext, autocast, to_device
from autoslim.training.loop import Step, label_step
from autoslim.training.recipe import Recipe

Act = Callable[[Tensor, Tensor], object]
REPEATS = 25  # at most
LOADED_AT_ONCE = 32  # images, to see what loading them takes


@dataclass(frozen=True)
class Measured:
    """A pass with so many images: the median of its seconds, and on CUDA the most bytes allocated meanwhile."""

    images: int
    seconds: float
    peak_bytes: int | None


@dataclass(frozen=True)
class DryRun:
    """The stages' own steps and scores, on new weights that no step changes."""

    params: Params
    network: nn.Module
    graph: ChannelGraph
    levels: Mapping[str, tuple[int, ...]]
    classes: int
    context: RunContext

    def measure(self, work: Work, images: int, limit_s: float) -> Measured:
        """Runs a pass of ``work`` with ``images`` again and again, after a first one, for about ``limit_s`` seconds.

        Raises:
            UserError: so many images do not fit into the device's memory.
        """
        gc.collect()  # the networks of earlier passes, which hold on to themselves
        least = self.least_bytes(work, images) if work.kind in TRAINING else 0
        if least > (there := device_bytes(self.context.device)):
            raise _too_many(work, images, f"needs {_gigabytes(least)} at least, of {_gigabytes(there)} there are")
        try:
            return self._timed(self._act(work), images, limit_s)
        except torch.OutOfMemoryError as error:
            raise _too_many(work, images, f"needs more than the {_gigabytes(there)} there are") from error

    def least_bytes(self, work: Work, images: int) -> int:
        """What a step of training holds at the least: weights, gradients, momentum, and what autograd keeps.

        Autograd keeps it from the forward to the backward pass, of the widest network here; its size is affine in the
        images, so two small batches tell. Temporary tensors and workspaces of libraries come on top.
        """
        supernet = work.kind == "supernet"
        recipe = assembly.recipe(self.params.supernet if supernet else self.params.retrain)
        network = self._supernet(recipe.channels_last) if supernet else self._plain(work, recipe)
        few, more = (kept_bytes(network, recipe.autocast(self.context), *self._batch(count)) for count in (2, 4))
        each = (more - few) // 2
        weights = sum(parameter.nbytes for parameter in network.parameters())
        return 3 * weights + few + (images - 2) * each

    def _timed(self, act: Act, images: int, limit_s: float) -> Measured:
        batch, device = self._batch(images), self.context.device
        act(*batch)  # memory is taken, kernels are chosen
        _wait(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds: list[float] = []
        while not seconds or (sum(seconds) < limit_s and len(seconds) < REPEATS):
            started = time.perf_counter()
            act(*batch)
            _wait(device)
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Measured(images, median(seconds), peak)

    def _act(self, work: Work) -> Act:
        asked = self.params.supernet
        supernet, retrain = assembly.recipe(asked), assembly.recipe(self.params.retrain)
        match work.kind:
            case "supernet":
                shared = self._supernet(supernet.channels_last)
                sandwich = sandwich_rule(
                    shared,
                    self.levels,
                    random_widths=asked.random_widths,
                    random_widths_per=asked.random_widths_per,
                    seed=asked.seed,
                    label_smoothing=asked.label_smoothing,
                    distillation=asked.distillation,
                    autocast=supernet.autocast(self.context),
                )
                return _stepping(shared, supernet, sandwich)
            case "validation":
                return _scoring(self._supernet(supernet.channels_last), work, supernet.autocast(self.context))
            case "search":
                precision = autocast(self.context.device, self.params.search.precision)
                return _scoring(self._supernet(channels_last=True), work, precision)
            case "retrain":
                plain = self._plain(work, retrain)
                loss = partial(smoothed_cross_entropy, smoothing=retrain.label_smoothing)
                return _stepping(plain, retrain, label_step(plain, loss, retrain.autocast(self.context)))
            case "evaluation":
                plain = self._plain(work, retrain)
                return lambda images, labels: evaluate(plain, [(images, labels)], retrain.autocast(self.context))

    def _supernet(self, channels_last: bool) -> Supernet:
        widest = {name: options[0] for name, options in self.levels.items()}
        supernet = initial_supernet(self.network, self.graph, widest, self.params.supernet.seed, trained=False)
        to_device(supernet, self.context.device, channels_last)
        return supernet

    def _plain(self, work: Work, recipe: Recipe) -> nn.Module:
        plain = resize(self.network, self.graph, work.configurations[0])
        initialise(plain, self.params.retrain.seeds[0])
        return to_device(plain, self.context.device, recipe.channels_last)

    def _batch(self, count: int) -> tuple[Tensor, Tensor]:
        device = self.context.device
        images = torch.randn(count, *self.graph.input_shape, device=device)  # (n, C, S, S)
        return images, torch.arange(count, device=device) % self.classes


def _stepping(network: nn.Module, recipe: Recipe, step: Step) -> Act:
    """A step as the training loop makes it, at a learning rate of 0."""
    optimiser = replace(recipe, learning_rate=0.0).optimiser(network)
    numbers = itertools.count()

    def act(images: Tensor, labels: Tensor) -> None:
        step(images, labels, next(numbers))
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    network.train()
    return act


def _scoring(supernet: Supernet, work: Work, precision: Callable[[], torch.autocast]) -> Act:
    def act(images: Tensor, labels: Tensor) -> None:
        score = subnet_scorer(supernet, [(images, labels)], precision)
        for channels in work.configurations:
            score(channels)

    return act


def loading_rate(data: PreparedData, recipe: Recipe, context: RunContext, limit_s: float) -> float:
    """Images a second that come from the train split to the device, augmented; the start of the workers included."""
    started, count = time.perf_counter(), 0
    for images, _ in replace(recipe, batch_size=LOADED_AT_ONCE).batches(data, 0, context)(0, 0):
        count += len(images)
        if time.perf_counter() - started > limit_s:
            break
    return count / (time.perf_counter() - started)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _gigabytes(amount: float) -> str:
    return format_amount(amount, "memory")


def _too_many(work: Work, images: int, why: str) -> UserError:
    return UserError(
        f"{work.name} with {images} images at once {why}; measure with fewer images, as with --batch "
        f"{max(2, images // 4)}, and lower the batch_size that a run is to have here"
    )


def kept_bytes(network: nn.Module, precision: Callable[[], torch.autocast], images: Tensor, labels: Tensor) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of this batch, weights not counted."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    network.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), precision():
        loss = smoothed_cross_entropy(network(images), labels, 0.0)
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert loss.requires_grad  # it still holds all that was noted, so that no address was given twice
    return sum(size for address, size in kept.items() if address not in own)


def device_bytes(device: torch.device) -> float:
    """Bytes of the device's memory; infinite where nothing tells."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu" and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf
