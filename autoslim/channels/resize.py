"""Changes the numbers of channels of a network (``resize``), and draws its weights (``initialise``)."""

import math
import os
import random
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from autoslim.channels.copying import copy_with, named_tensors
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis, axis_size
from autoslim.channels.wrappers import check_plain
from autoslim.errors import UserError
from autoslim.files import format_bytes


def resize(network: nn.Module, graph: ChannelGraph, channels: Mapping[str, int], *, seed: int | None = 0) -> nn.Module:
    """Returns a plain network of the same class with ``channels`` and the same parameter names.

    If a group shrinks, its leading channels keep their weights. If it grows, all present weights stay, and those of the
    new channels are drawn so that the network computes what it computed before:

    * In layers and in parameters that ``forward`` uses as weights, the weights that produce a new channel are normal
      with mean 0. Their root mean square is that of the present weights, times the square root of (present / new
      inputs), so that new channels have the variance of the present ones; if all present weights are zero, it is the
      square root of 2 / inputs. The weights with which present channels read new ones are zero. They get gradients in
      the first training step, because the new channels differ. Weights that are both, because two layers share them
      with swapped channels, are zero.
    * In weight norm, this holds for the direction; the length of each present weight changes with the norm of its
      direction, so that the weight remains the same.
    * Values for each channel (scales, shifts, biases, running statistics) are the mean over the present channels.

    Layers that mix channels in another way, such as layer normalisation, change the output of a network that grows. The
    argument is not changed and shares no memory with the result.

    Args:
        network: The traced network, or any ``resize`` of it.
        graph: The result of ``trace`` for this network.
        channels: The number of channels of each of the graph's groups.
        seed: Seed of the weights of new channels. Each tensor is drawn from its own generator on the CPU, keyed by the
            seed and the tensor's name. None leaves these weights zero, for code that loads or draws all weights
            afterwards; channels whose weights are all zero stay equal to each other in training.

    Raises:
        UserError: If ``channels`` or ``network`` does not fit the graph, or if the result does not fit into the free
            memory.
    """
    graph.check(channels)
    present = current_channels(network, graph)
    held = named_tensors(network)  # a kernel may have none
    if held and any(count > present[name] for name, count in channels.items()):
        check_memory(graph, channels, next(iter(held.values())).device)

    def replace(name: str, tensor: Tensor) -> Tensor:
        if name not in graph.tensors:
            return tensor.clone()
        axes = graph.tensors[name]
        produces = graph.weights[name] if name in graph.weights else _only_slimmable(axes)
        drawn = name in graph.weights and name in graph.parameter_names
        result = _resized(tensor, axes, present, channels, mean_over=None if drawn else produces)
        if seed is not None and drawn and produces is not None and not tensor.is_meta:
            new = _new_entries(axes[produces], present, channels)
            if bool(new.any()):
                before_drawing[name] = result.clone()
                key = random.Random(f"{seed}/{name}").getrandbits(63)
                _draw(result, tensor, produces, new, torch.Generator().manual_seed(key))
        return result

    before_drawing: dict[str, Tensor] = {}
    result = copy_with(network, replace)
    for attribute in graph.attributes:
        setattr(result.get_submodule(attribute.module), attribute.name, attribute.value(channels))
    for module in result.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN reads weights that are copied one by one more slowly
    tensors = named_tensors(result)
    for name in graph.tensors:
        for of_direction, of_length in _LENGTHS.items():
            if name.endswith(of_direction):
                length = tensors[name.removesuffix(of_direction) + of_length]
                _keep_weight(length, tensors[name], before_drawing.get(name, tensors[name]))
    return result


def check_memory(
    graph: ChannelGraph,
    channels: Mapping[str, int],
    device: torch.device,
    *,
    name: str = "the network with these channels",
    remedy: str = "use fewer channels",
) -> None:
    """Checks that the parameters and buffers of the network at ``channels`` fit into the free memory of ``device``.

    Without this check, the system would end the process without a message.

    Args:
        graph: the result of ``trace``.
        channels: a configuration.
        device: where the tensors will be.
        name: the network's name in the error.
        remedy: the last part of the error.

    Raises:
        UserError: they do not fit.
    """
    needed = graph.other_bytes + sum(
        size * math.prod(axis_size(axis, channels) for axis in graph.tensors[tensor])
        for tensor, size in graph.element_bytes.items()
    )
    free = _free_memory(device)
    if needed > free:
        widest = max(channels, key=lambda group: channels[group])
        raise UserError(
            f"{name} (up to {channels[widest]} channels, in {widest}) needs {format_bytes(needed)} for its weights, "
            f"but only {format_bytes(int(free))} of memory are free on {device}; {remedy}"
        )


_LIMITS = "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"


def _free_memory(device: torch.device) -> float:
    """Returns the free bytes of a device's memory, or all of them; infinity if this is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    if device.type != "cpu":
        return math.inf
    free = math.inf
    with suppress(OSError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, IndexError):  # Linux; it includes the files that the system holds in memory
        free = int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    for limit in _LIMITS:  # of a container
        with suppress(OSError, ValueError):
            free = min(free, int(Path(limit).read_text()))
    return free


@torch.no_grad()
def _keep_weight(length: Tensor, direction: Tensor, before: Tensor) -> None:
    """Sets the length g of a normalised weight, g * v / |v|, so that new entries of v do not change its present ones.

    Where the direction v is zero, as in inputs that are new in all channels, g becomes zero, and v any direction.

    Args:
        length: g, changed in place. The axes along which the norm is computed have the size 1.
        direction: v, with new entries.
        before: v with zeros instead of the new entries.
    """
    normed = [axis for axis in range(direction.dim()) if length.dim() == 0 or length.shape[axis] == 1]
    old, new = (v.square().sum(normed, keepdim=True).sqrt() if normed else v.abs() for v in (before, direction))
    defined = old > 0
    ratio = (length.view(old.shape) / old).where(defined, 0)
    ratio = ratio.where(defined, ratio.sum() / defined.sum().clamp(1))
    length.copy_(torch.where(old == new, length.view(old.shape), ratio * new).view(length.shape))
    direction.masked_fill_(new == 0, 1)
    length.masked_fill_((new == 0).view(length.shape), 0)


_LENGTHS = {"weight_v": "weight_g", "parametrizations.weight.original1": "parametrizations.weight.original0"}
"""Ends of the names of the directions of weights normalised by weight norm, old and new, and of their lengths."""


def current_channels(network: nn.Module, graph: ChannelGraph) -> dict[str, int]:
    """Returns the configuration of ``network``, which is the graph's network or a ``resize`` of it.

    Raises:
        UserError: If the tensors of ``network`` do not fit the graph, or if it is inside a wrapper.
    """
    check_plain(network)
    tensors = named_tensors(network)
    for name, axes in graph.tensors.items():
        if name not in tensors or tensors[name].dim() != len(axes):
            raise UserError(
                f"this is not the network that was traced: it has no tensor {name!r} of {len(axes)} dimensions"
            )
    sizes = dict.fromkeys(
        (axis, size)
        for name, axes in graph.tensors.items()
        for axis, size in zip(axes, tensors[name].shape, strict=True)
    )
    present: dict[str, int] = {}
    solved = -1
    while len(present) > solved:  # an axis with one unknown group determines the size of that group
        solved = len(present)
        for axis, size in sizes:
            unknown = {s.group: s.unit for s in axis if s.group is not None and s.group not in present}
            if len(unknown) == 1:
                [(group, unit)] = unknown.items()
                known = axis_size((s for s in axis if s.group != group), present)
                present[group] = (size - known) // sum(s.count for s in axis if s.group == group) * unit
    present = {name: present.get(name, group.size) for name, group in graph.groups.items()}
    for name, axes in graph.tensors.items():
        expected = tuple(axis_size(axis, present) for axis in axes)
        if tuple(tensors[name].shape) != expected:
            raise UserError(
                f"this is not the network that was traced: {name} is {tuple(tensors[name].shape)}, "
                f"but its groups require {expected}"
            )
    return present


def common_spans(axis: Axis, wide: Mapping[str, int], narrow: Mapping[str, int]) -> list[tuple[int, int, int]]:
    """Returns, for each segment, (start in the wide tensor, start in the narrow one, number of common channels)."""
    spans = []
    at_wide = at_narrow = 0
    for segment in axis:
        size_wide, size_narrow = segment.size(wide), segment.size(narrow)
        spans.append((at_wide, at_narrow, min(size_wide, size_narrow)))
        at_wide, at_narrow = at_wide + size_wide, at_narrow + size_narrow
    return spans


def _resized(
    tensor: Tensor,
    axes: tuple[Axis, ...],
    present: Mapping[str, int],
    channels: Mapping[str, int],
    mean_over: int | None,
) -> Tensor:
    """Returns the tensor at ``channels``. New entries along ``mean_over`` are the mean of the present, others zero."""
    for dimension, axis in enumerate(axes):
        if all(segment.size(channels) == segment.size(present) for segment in axis):
            continue
        shape = [*tensor.shape]
        shape[dimension] = axis_size(axis, channels)
        grows = any(segment.size(channels) > segment.size(present) for segment in axis)
        average = grows and dimension == mean_over
        fill = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).mean(dimension, True) if average else None
        fill = torch.zeros(()) if fill is None else fill
        target = fill.to(tensor).expand(shape).clone(memory_format=torch.contiguous_format)
        for start, to, length in common_spans(axis, present, channels):
            target.narrow(dimension, to, length).copy_(tensor.narrow(dimension, start, length))
        tensor = target
    return tensor.clone(memory_format=torch.preserve_format)


def _only_slimmable(axes: tuple[Axis, ...]) -> int | None:
    """Returns the only axis that depends on a group, or None if there are several."""
    slimmable = [dimension for dimension, axis in enumerate(axes) if any(segment.group for segment in axis)]
    return slimmable[0] if len(slimmable) == 1 else None


def _new_entries(axis: Axis, present: Mapping[str, int], channels: Mapping[str, int]) -> Tensor:
    """Returns which entries of an axis are new at ``channels``: (size,), bool, on the CPU."""
    new = torch.ones(axis_size(axis, channels), dtype=torch.bool)
    for _, to, length in common_spans(axis, present, channels):
        new[to : to + length] = False
    return new


def _draw(weight: Tensor, before: Tensor, outputs: int, new: Tensor, generator: torch.Generator) -> None:
    """Draws the weights that produce the ``new`` channels of dimension ``outputs`` in place (see ``resize``)."""
    inputs = weight.numel() // weight.shape[outputs]
    variance = float(before.double().square().sum()) / (before.shape[outputs] * inputs) or 2 / inputs
    rows = new.nonzero().flatten()
    shape = [len(rows) if dimension == outputs else size for dimension, size in enumerate(weight.shape)]
    drawn = torch.empty(shape).normal_(0, variance**0.5, generator=generator)
    weight.index_copy_(outputs, rows.to(weight.device), drawn.to(weight))


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Draws all weights in place: the same values for the same seed and sizes, on any device.

    The scheme is that of the AutoSlim authors' code and of torchvision's MobileNetV2. Convolution weights are normal
    with variance 2 / (kernel area * output channels), also in depthwise convolutions. Linear weights are normal with
    standard deviation 0.01. Biases are 0, and the scales of normalisation layers 1. Running statistics are reset. Other
    parameters (such as layer scales) keep their value if they are constant; otherwise they are drawn from a normal
    distribution with their present mean and standard deviation.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        parameters = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.modules.conv._ConvNd) and "weight" in parameters:
            weight = parameters.pop("weight")
            drawn = torch.empty(weight.shape)  # on the CPU, so that the values depend on no device or memory format
            mode: Literal["fan_in", "fan_out"] = "fan_in" if module.transposed else "fan_out"
            weight.copy_(nn.init.kaiming_normal_(drawn, mode=mode, nonlinearity="relu", generator=generator))
        elif isinstance(module, nn.Linear) and "weight" in parameters:
            _normal(parameters.pop("weight"), 0, 0.01, generator)
        elif "weight" in parameters and _is_normalisation(module):
            parameters.pop("weight").fill_(1)
        if (bias := parameters.pop("bias", None)) is not None:
            bias.zero_()
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        for parameter in parameters.values():
            mean, deviation = float(parameter.mean()), float(parameter.std(correction=0))
            if deviation > 1e-6 * abs(mean):
                _normal(parameter, mean, deviation, generator)
            else:
                parameter.fill_(mean)


def _is_normalisation(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.RMSNorm | nn.GroupNorm)


def _normal(parameter: nn.Parameter, mean: float, deviation: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.empty(parameter.shape).normal_(mean, deviation, generator=generator))
