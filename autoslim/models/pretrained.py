"""Trained weights: from a file, torchvision or timm, and their insertion into a network."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from autoslim.channels.copying import copy_with
from autoslim.channels.graph import IS_OUTPUT, ChannelGraph
from autoslim.channels.resize import initialise
from autoslim.errors import UserError, first_line
from autoslim.models.building import find_constructor

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_NOT_THE_MAKERS = ("num_classes", "in_chans", "aux_logits", "weights", "pretrained")
"""Arguments that named weights do without: their maker would change these to fit, or refuse."""
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


def weights_file(weights: str | None) -> Path | None:
    """The file that ``model.weights`` names; None where it is the name of a maker's weights, or nothing."""
    return Path(weights) if weights is not None and weights.endswith(SUFFIXES) else None


def check_weights(name: str, weights: str) -> None:
    """What can be known of ``model.weights`` without reading them: there is such a file, or the maker knows the name.

    Raises:
        UserError: there is none.
    """
    file = weights_file(weights)
    if file is None:
        _named(name, weights)
    elif not file.is_file():
        raise UserError(
            f"model.weights names the file {weights!r}, which does not exist; give its path from the repository's root"
        )


def load_trained_tensors(network: nn.Module, name: str, kwargs: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """The tensors of a trained network, by name; they need not fit ``network`` yet.

    Args:
        network: what ``name`` and ``kwargs`` build.
        name: ``model.name``.
        kwargs: ``model.kwargs``.
        weights: ``model.weights``: a file of a state dict, or of a mapping with one as ``state_dict`` or ``model``; a
            name of torchvision's weights (``DEFAULT``); timm's ``pretrained`` or the tag of its weights. Named weights
            are downloaded where they are not in the maker's cache.

    Raises:
        UserError: there are none, they cannot be had or read, are not finite, or belong to a network that computes
            otherwise.
    """
    file = weights_file(weights)
    tensors = _of_named(network, name, kwargs, weights) if file is None else _of_file(file, set(network.state_dict()))
    for tensor_name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"model.weights {weights!r}: {tensor_name} holds numbers that are not finite; give others")
    return tensors


def _of_file(file: Path, own: set[str]) -> dict[str, Tensor]:
    how = "save network.state_dict() with safetensors or torch.save"
    try:
        if file.suffix == ".safetensors":
            held: Any = load_file(file)
        else:
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both raise many kinds for files that are damaged or hold code
        raise UserError(f"model.weights {str(file)!r} cannot be read: {first_line(error)}; {how}") from error
    for key in ("state_dict", "model"):
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        what = f"a mapping of {list(held)[:3]}" if isinstance(held, Mapping) else f"one {type(held).__name__}"
        raise UserError(f"model.weights {str(file)!r} holds {what}, not the tensors of a network; {how}")
    tensors = dict(held)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors) and not own.intersection(tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _of_named(network: nn.Module, name: str, kwargs: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """The tensors of the network as its maker builds it with these weights, with their classes and input channels."""
    constructor, argument = _named(name, weights)
    arguments = {key: value for key, value in kwargs.items() if key not in _NOT_THE_MAKERS}
    try:
        trained = find_constructor(constructor)(**arguments, **argument)
    except OSError as error:
        raise UserError(
            f"model.weights {weights!r} of {name!r} are not at hand and cannot be downloaded ({first_line(error)}); "
            "run once where there is a network, or fetch them elsewhere and give the path of the file"
        ) from error
    except Exception as error:
        raise UserError(
            f"model.weights {weights!r} of {name!r} do not go with model.kwargs {dict(kwargs)}: {first_line(error)}; "
            "correct one of them"
        ) from error
    if difference := next(_differences(network, trained), None):
        setting, ours, theirs = difference
        raise UserError(
            f"model.weights {weights!r} belong to a network whose {setting} is {theirs!r}, but that of {name!r} is "
            f"{ours!r}; set it in model.kwargs"
        )
    tensors: dict[str, Tensor] = trained.state_dict()
    return tensors


def _differences(network: nn.Module, trained: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Settings of modules that tensors do not show (an input transform, an epsilon): their name and both values."""
    others = dict(trained.named_modules())
    for path, module in network.named_modules():
        theirs = vars(others.get(path, module))
        for key, value in vars(module).items():
            shows_here_only = isinstance(value, bool | float | str) and key not in ("training", "aux_logits")
            if shows_here_only and theirs.get(key, value) != value:
                yield f"{path}.{key}".lstrip("."), value, theirs[key]


def _named(name: str, weights: str) -> tuple[str, dict[str, Any]]:
    """The constructor, by its import path, and the argument with which it builds a network with these weights.

    Raises:
        UserError: it has no such weights.
    """
    find_constructor(name)
    place, _, model = name.rpartition(":")
    if place == "timm":
        timm = importlib.import_module("timm")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{model.partition('.')[0]}.*")]
        if weights == "pretrained" and tags:
            return name, {"pretrained": True}
        if weights in tags:
            return f"{place}:{model.partition('.')[0]}.{weights}", {"pretrained": True}
        raise _unknown(name, weights, ["pretrained", *tags] if tags else [])
    try:
        known = importlib.import_module("torchvision.models").get_model_weights(find_constructor(name))
    except ValueError:  # no builder of torchvision's
        known = {}
    members = getattr(known, "__members__", {})
    if weights not in members:
        raise _unknown(name, weights, list(members))
    return name, {"weights": members[weights]}


def _unknown(name: str, weights: str, known: Sequence[str]) -> UserError:
    have = f"has weights {', '.join(known)}" if known else "has no weights with a name"
    return UserError(
        f"model.weights {weights!r} is no file ({', '.join(SUFFIXES)}), and {name!r} {have}; "
        f"{'name one of these, or ' if known else ''}give the path of a file"
    )


def insert_weights(
    network: nn.Module, graph: ChannelGraph, tensors: Mapping[str, Tensor], seed: int, *, source: str
) -> tuple[nn.Module, list[str]]:
    """A copy of ``network`` with trained tensors, and the layers for which there were none of the right shape.

    These are the layers that give the classes, where ``tensors`` come from other classes: their weights are drawn anew
    (see ``initialise``). Tensors of an auxiliary head that is switched off in ``network`` (None) are left out.

    Args:
        graph: ``trace`` of ``network``.
        source: names ``tensors`` in messages.

    Raises:
        UserError: they are not of this network: some lack, are too many, or have another shape.
    """
    given = {name: tensor for name, tensor in tensors.items() if not _switched_off(network, name)}
    own = network.state_dict(keep_vars=True)
    _check_names(own, given, source)
    new = _layers_of_other_classes(own, given, graph, source)
    start = copy_with(network, lambda _, tensor: tensor.clone(memory_format=torch.preserve_format))
    start.load_state_dict({name: given[name] for name in given if name.rpartition(".")[0] not in new}, strict=False)
    initialise(nn.ModuleList([start.get_submodule(layer) for layer in new]), seed)
    return start, new


def check_covered(graph: ChannelGraph, widest: Mapping[str, int]) -> None:
    """Raises:
    UserError: a supernet has channels that a trained network at its default sizes has no weights for.
    """
    for name, group in graph.groups.items():
        if widest[name] > group.size:
            raise UserError(
                f"the supernet has {widest[name]} channels in group {name}, but model.weights have {group.size}; set "
                "supernet.width to 1.0, or lower supernet.width and supernet.grid.divisor"
            )


def _switched_off(network: nn.Module, name: str) -> bool:
    top, dot, _ = name.partition(".")
    return bool(dot) and getattr(network, top, network) is None


def _check_names(own: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> None:
    there = {id(own[name]) for name in given if name in own}  # a tensor with several names is given under one of them
    lacking = [n for n, tensor in own.items() if id(tensor) not in there and not n.endswith("num_batches_tracked")]
    if lacking:
        raise UserError(f"{source} lack {_some(lacking)} of this network; give the weights of this network, whole")
    if unknown := [name for name in given if name not in own]:
        raise UserError(f"{source} have {_some(unknown)}, which this network has not; give the weights of this network")


def _layers_of_other_classes(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], graph: ChannelGraph, source: str
) -> list[str]:
    """The layers whose tensors have another shape, as far as that is because they give the classes."""
    layers = []
    for name, theirs in given.items():
        ours = own[name]
        if theirs.shape == ours.shape:
            continue
        layer = name.rpartition(".")[0]
        if graph.not_prunable.get(layer) != IS_OUTPUT or theirs.shape[1:] != ours.shape[1:]:
            raise UserError(f"{source} {_misfit(name, theirs, ours, graph)}")
        layers.append(layer)
    return list(dict.fromkeys(layers))


def _misfit(name: str, theirs: Tensor, ours: Tensor, graph: ChannelGraph) -> str:
    sizes = ("x".join(map(str, tensor.shape)) or "a number" for tensor in (theirs, ours))
    remedy = "correct model.kwargs, or give the weights of this network"
    if ours.dim() == theirs.dim() == 4 and ours.shape[1] == graph.input_shape[0] != theirs.shape[1]:
        remedy = f"they are for images of {theirs.shape[1]} channels: set data.channels and model.kwargs so"
    return "have {} of {}, this network of {}; {}".format(name, *sizes, remedy)


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
