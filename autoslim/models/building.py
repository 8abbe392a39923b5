"""Construction of networks from the import paths in ``params.yaml`` and on the command line."""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autoslim.channels.batches import batch_arguments
from autoslim.channels.copying import named_tensors, on_meta
from autoslim.channels.inputs import Arguments
from autoslim.data.prepared import DataInfo
from autoslim.data.structure import in_words, is_tensor
from autoslim.errors import UserError, first_line
from autoslim.tasks.task import Task
from autoslim.user_code import find_callable, importing_from

_FORMATS = "write package.module:callable (torchvision.models:resnet50), timm:NAME or path/to/file.py:callable"


def build_network(name: str, kwargs: Mapping[str, Any], classes: int | None = None) -> nn.Module:
    """Builds a network by calling the constructor that ``name`` refers to.

    Args:
        name: ``package.module:callable``, ``timm:model_name`` or ``path/to/file.py:callable``.
        kwargs: keyword arguments of the callable.
        classes: number of classes of the data, if known. It is passed as ``num_classes`` if the callable accepts that
            argument and ``kwargs`` does not contain it.

    Raises:
        UserError: the callable does not exist, does not accept the arguments, or does not return a network.
    """
    constructor = find_constructor(name)
    try:
        with importing_from(name.rpartition(":")[0]):
            network = _call(constructor, kwargs, classes)
    except Exception as error:
        raise UserError(
            f"model.name {name!r} with model.kwargs {dict(kwargs)} cannot be built: {first_line(error)}; "
            "correct model.kwargs"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"model.name {name!r} returns {type(network).__name__}, not a torch module; "
            "name a callable that returns a module"
        )
    return network


def _call(constructor: Callable[..., Any], kwargs: Mapping[str, Any], classes: int | None) -> Any:
    kinds = _parameters(constructor)
    accepts_classes = "num_classes" in kinds
    accepts_any = inspect.Parameter.VAR_KEYWORD in kinds.values()
    if classes is None or "num_classes" in kwargs or not (accepts_classes or accepts_any):
        return constructor(**kwargs)
    try:
        return constructor(**kwargs, num_classes=classes)
    except TypeError:
        if accepts_classes:
            raise
    return constructor(**kwargs)  # the callable that receives **kwargs does not accept num_classes


def check_network(network: nn.Module, name: str, info: DataInfo, task: Task) -> Any:
    """Checks that a network accepts the data's inputs and returns outputs that fit the task.

    A copy of the network runs on the meta device, without computing values, or on the network's device if its control
    flow depends on data.

    Returns:
        The output in evaluation mode for two samples of zeros, possibly on the meta device.

    Raises:
        UserError: the network does not accept the inputs, or returns other outputs.
    """
    example = batch_arguments(info.example(2))
    required = _required_parameters(network)
    if len(required) > len(example.args) + len(example.kwargs):
        inputs = "a batch of images as the only input" if is_tensor(info.inputs) else f"inputs {in_words(info.inputs)}"
        raise UserError(
            f"model {name!r} has the inputs {', '.join(required)}, but the data have {inputs}; give the other inputs a "
            "default value in forward"
        )
    try:
        try:
            outputs = [_output(on_meta(network), example, mode) for mode in (False, True)]
        except Exception:  # the control flow may depend on data
            outputs = [_output(copy.deepcopy(network), example, mode) for mode in (False, True)]
    except Exception as error:
        own = info.storage == "own"
        remedy = "the data set" if own else "data.channels and data.image_size"
        raise UserError(
            f"model {name!r} does not accept {'inputs' if own else 'images'} of {in_words(info.inputs)}: "
            f"{first_line(error)}; set {remedy}, or model.kwargs, to what the network expects"
        ) from error
    output, in_training = outputs
    if isinstance(output, torch.Tensor) and not isinstance(in_training, torch.Tensor):
        raise UserError(
            f"model {name!r} returns {type(in_training).__name__} in training, not one tensor as in evaluation; switch "
            "auxiliary heads off (for torchvision's networks, set model.kwargs.aux_logits: false)"
        )
    if misfit := task.misfit(info, output) or task.misfit(info, in_training):
        raise UserError(f"model {name!r} {misfit}")
    return output


def _required_parameters(network: nn.Module) -> list[str]:
    """Returns the parameters of ``forward`` without a default value."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # not every callable has a signature
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def _output(network: nn.Module, example: Arguments, training: bool) -> Any:
    """Returns the network's output for an example, in training or evaluation mode."""
    device = next((tensor.device for tensor in named_tensors(network).values()), torch.device("cpu"))
    with torch.no_grad(), device:
        return example.map(lambda tensor: tensor.to(device)).run(network.train(training))


def find_constructor(name: str) -> Callable[..., Any]:
    """Returns the callable that an import path refers to.

    Raises:
        UserError: the callable does not exist or cannot be imported.
    """
    location, _, attribute = name.rpartition(":")
    return _find_timm(attribute) if location == "timm" and attribute else find_callable(name, "model.name", _FORMATS)


def _find_timm(model: str) -> Callable[..., Any]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"model.name 'timm:{model}' needs timm; install it with `pip install timm`") from error
    if not timm.is_model(model):
        similar = timm.list_models(f"*{model[:6]}*")[:5]
        raise UserError(
            f"model.name 'timm:{model}' is not a model of timm {timm.__version__}; "
            f"similar names: {', '.join(similar) or 'none'}"
        )

    def create(**kwargs: Any) -> Any:
        return timm.create_model(model, **kwargs)

    return create


def _parameters(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Returns the kind of each parameter by name."""
    try:
        parameters = inspect.signature(constructor).parameters
    except ValueError:  # some built-in callables have no signature
        return {}
    return {name: parameter.kind for name, parameter in parameters.items()}
