"""Trained weights from a file, torchvision or timm, and their insertion into a network."""

import importlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from autoslim.channels.copying import copy_with
from autoslim.channels.graph import IS_OUTPUT, ChannelGraph
from autoslim.channels.resize import initialise, resize
from autoslim.errors import UserError, first_line
from autoslim.files import sha256
from autoslim.models.building import find_constructor
from autoslim.training.checkpoints import has_weights, load_weights, save_weights

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_IGNORED_KWARGS = ("num_classes", "in_chans", "aux_logits", "weights", "pretrained")
"""Arguments not passed when named weights are loaded: torchvision and timm would adapt the weights to them or raise."""
_NEW = "new_layers"
_PREFIXES = ("module.", "_orig_mod.")  # added by DistributedDataParallel and torch.compile


def weights_file(weights: str | None) -> Path | None:
    """Returns the file that ``model.weights`` names, or None if it is null or names weights of torchvision or timm."""
    return Path(weights) if weights is not None and weights.endswith(SUFFIXES) else None


def check_weights(name: str, weights: str) -> None:
    """Checks ``model.weights`` without reading them: the file or the named weights have to exist.

    Raises:
        UserError: they do not exist.
    """
    file = weights_file(weights)
    if file is None:
        _constructor_with_weights(name, weights)
    elif not file.is_file():
        raise UserError(
            f"model.weights names the file {weights!r}, which does not exist; give its path from the repository's root"
        )


def load_trained_tensors(network: nn.Module, name: str, kwargs: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """Loads the tensors of a trained network by name. It does not check that they fit ``network``.

    Args:
        network: the network that ``name`` and ``kwargs`` build.
        name: ``model.name``.
        kwargs: ``model.kwargs``.
        weights: ``model.weights``: a file with a state dict, or with a mapping that has one under ``state_dict`` or
            ``model``; a name of torchvision's weights (``DEFAULT``); timm's ``pretrained`` or a tag of its weights.
            Named weights are downloaded if they are not in the library's cache.

    Raises:
        UserError: the weights do not exist, cannot be downloaded or read, are not finite, or belong to a network with
            other settings.
    """
    file = weights_file(weights)
    if file is None:
        tensors = _load_named(network, name, kwargs, weights)
    else:
        tensors = _load_file(file, set(network.state_dict()))
    for tensor_name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(
                f"model.weights {weights!r}: {tensor_name} has values that are not finite; use other weights"
            )
    return tensors


def _load_file(file: Path, names: set[str]) -> dict[str, Tensor]:
    """Loads a state dict from a file, without the prefixes of wrappers unless the network's own ``names`` have them."""
    remedy = "save network.state_dict() with safetensors or torch.save"
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.weights {str(file)!r} cannot be read: it is damaged, or it contains Python objects, such as a "
            f"whole network, which are not loaded because they may run any code; {remedy}"
        ) from error
    except Exception as error:  # damaged files, or files that contain code, raise many kinds of errors
        raise UserError(f"model.weights {str(file)!r} cannot be read: {first_line(error)}; {remedy}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    is_mapping = isinstance(content, Mapping)
    if not is_mapping or not content or not all(isinstance(value, Tensor) for value in content.values()):
        description = f"a mapping of {list(content)[:3]}" if is_mapping else f"one {type(content).__name__}"
        raise UserError(f"model.weights {str(file)!r} contains {description}, not the tensors of a network; {remedy}")
    tensors = dict(content)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in tensors) and not names.intersection(tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _load_named(network: nn.Module, name: str, kwargs: Mapping[str, Any], weights: str) -> dict[str, Tensor]:
    """Loads named weights by building the network with them, with the weights' own classes and input channels."""
    constructor, argument = _constructor_with_weights(name, weights)
    arguments = {key: value for key, value in kwargs.items() if key not in _IGNORED_KWARGS}
    try:
        trained = find_constructor(constructor)(**arguments, **argument)
    except OSError as error:
        raise UserError(
            f"model.weights {weights!r} of {name!r} are not cached and cannot be downloaded ({first_line(error)}); "
            "run once with an internet connection, or download them elsewhere and set model.weights to the file"
        ) from error
    except Exception as error:
        raise UserError(
            f"model.weights {weights!r} of {name!r} do not fit model.kwargs {dict(kwargs)}: {first_line(error)}; "
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
    """Yields the name and both values of settings that differ and are not tensors, such as an epsilon."""
    others = dict(trained.named_modules())
    for path, module in network.named_modules():
        theirs = vars(others.get(path, module))
        for key, value in vars(module).items():
            is_setting = isinstance(value, bool | float | str) and key not in ("training", "aux_logits")
            if is_setting and theirs.get(key, value) != value:
                yield f"{path}.{key}".lstrip("."), value, theirs[key]


def _constructor_with_weights(name: str, weights: str) -> tuple[str, dict[str, Any]]:
    """Returns the import path of the constructor and the argument that builds a network with the named weights.

    Raises:
        UserError: the network has no weights of that name.
    """
    find_constructor(name)
    location, _, model = name.rpartition(":")
    if location == "timm":
        timm = importlib.import_module("timm")
        tags = [full_name.partition(".")[2] for full_name in timm.list_pretrained(f"{model.partition('.')[0]}.*")]
        if weights == "pretrained" and tags:
            return name, {"pretrained": True}
        if weights in tags:
            return f"{location}:{model.partition('.')[0]}.{weights}", {"pretrained": True}
        raise _unknown_weights(name, weights, ["pretrained", *tags] if tags else [])
    try:
        choices = importlib.import_module("torchvision.models").get_model_weights(find_constructor(name))
    except ValueError:  # not a torchvision network
        choices = {}
    members = getattr(choices, "__members__", {})
    if weights not in members:
        raise _unknown_weights(name, weights, list(members))
    return name, {"weights": members[weights]}


def _unknown_weights(name: str, weights: str, choices: Sequence[str]) -> UserError:
    available = f"has weights {', '.join(choices)}" if choices else "has no named weights"
    return UserError(
        f"model.weights {weights!r} is not a file ({', '.join(SUFFIXES)}), and {name!r} {available}; "
        f"{'name one of these, or ' if choices else ''}set model.weights to the path of a file"
    )


def insert_weights(
    network: nn.Module, graph: ChannelGraph, tensors: Mapping[str, Tensor], seed: int, *, source: str
) -> tuple[nn.Module, list[str]]:
    """Returns a copy of ``network`` with trained tensors, and the names of the layers that were initialised instead.

    The latter are the layers that compute the logits, if ``tensors`` are for other classes (see ``initialise``).
    Tensors of an auxiliary head that is switched off in ``network`` (None) are ignored.

    Args:
        graph: ``trace`` of ``network``.
        seed: seed of the initialisation.
        source: name of ``tensors`` in messages.

    Raises:
        UserError: tensors of the network are missing, unknown or of another shape.
    """
    loaded = {name: tensor for name, tensor in tensors.items() if not _switched_off(network, name)}
    expected = network.state_dict(keep_vars=True)
    _check_names(expected, loaded, source)
    initialised = _layers_of_other_classes(expected, loaded, graph, source)
    copy = copy_with(network, lambda _, tensor: tensor.clone(memory_format=torch.preserve_format))
    fitting = {name: tensor for name, tensor in loaded.items() if name.rpartition(".")[0] not in initialised}
    copy.load_state_dict(fitting, strict=False)
    initialise(nn.ModuleList([copy.get_submodule(layer) for layer in initialised]), seed)
    return copy, initialised


def write_trained(path: Path, network: nn.Module | None, new: Sequence[str], weights: str | None = None) -> None:
    """Writes a network with trained weights, and the names of its layers that have random ones (``insert_weights``).

    Without a network the file is empty.

    Args:
        weights: ``model.weights``.
    """
    save_weights(network, path, {_NEW: json.dumps(list(new)), **_identity(weights)})


def _identity(weights: str | None) -> dict[str, str]:
    """Returns what identifies ``model.weights`` in the metadata of a file: its digest, or the name of the weights."""
    file = weights_file(weights)
    if weights is None or (file is not None and not file.is_file()):
        return {}
    return {"model.weights": weights if file is None else sha256(file)}


def read_trained(
    path: Path, network: nn.Module, graph: ChannelGraph, weights: str | None = None
) -> tuple[nn.Module, list[str]] | None:
    """Returns the network and the names that ``write_trained`` wrote; None if the file is empty.

    Args:
        network: the default network. It is not changed.
        graph: ``trace`` of it.
        weights: ``model.weights``. If they are a file that does not exist, they are not compared.

    Raises:
        UserError: the file is missing, damaged, or belongs to another network or to other weights.
    """
    if not has_weights(path):
        return None
    trained = resize(network, graph, graph.default, seed=None)
    load_weights(trained, path, _identity(weights))
    with safe_open(path, framework="pt") as file:
        return trained, json.loads((file.metadata() or {}).get(_NEW, "[]"))


def check_covered(graph: ChannelGraph, widest: Mapping[str, int]) -> None:
    """Checks that trained weights at the default sizes cover all channels of a supernet.

    Raises:
        UserError: a group of the supernet has more channels than the trained network.
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


def _check_names(expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor], source: str) -> None:
    # A tensor that has several names may be stored under only one of them.
    present = {id(expected[name]) for name in loaded if name in expected}
    missing = [
        n for n, tensor in expected.items() if id(tensor) not in present and not n.endswith("num_batches_tracked")
    ]
    if missing:
        raise UserError(f"{source} lack {_first_of(missing)}; use a complete state dict of this network")
    if unknown := [name for name in loaded if name not in expected]:
        raise UserError(
            f"{source} have {_first_of(unknown)}, which this network does not have; use weights of this network"
        )


def _layers_of_other_classes(
    expected: Mapping[str, Tensor], loaded: Mapping[str, Tensor], graph: ChannelGraph, source: str
) -> list[str]:
    """Returns the layers that compute the logits and whose tensors have another number of classes.

    Raises:
        UserError: a shape differs in any other way.
    """
    layers = []
    for name, theirs in loaded.items():
        ours = expected[name]
        if theirs.shape == ours.shape:
            continue
        layer = name.rpartition(".")[0]
        if graph.not_prunable.get(layer) != IS_OUTPUT or theirs.shape[1:] != ours.shape[1:]:
            raise UserError(f"{source} {_shape_mismatch(name, theirs, ours, graph)}")
        layers.append(layer)
    return list(dict.fromkeys(layers))


def _shape_mismatch(name: str, theirs: Tensor, ours: Tensor, graph: ChannelGraph) -> str:
    sizes = ("x".join(map(str, tensor.shape)) or "a scalar" for tensor in (theirs, ours))
    remedy = "correct model.kwargs, or use weights of this network"
    if ours.dim() == theirs.dim() == 4 and ours.shape[1] == graph.input_shape[0] != theirs.shape[1]:
        remedy = (
            f"the weights are for images of {theirs.shape[1]} channels: set data.channels and model.kwargs accordingly"
        )
    return "have {} of shape {}, but this network has {}; {}".format(name, *sizes, remedy)


def _first_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"
