"""Construction of networks from the import paths in ``params.yaml`` and on the command line."""

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from autoslim.channels.copying import named_tensors, on_meta
from autoslim.errors import UserError, first_line
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


def check_network(network: nn.Module, name: str, input_shape: tuple[int, ...], classes: int) -> None:
    """Checks that a network accepts the data's images and returns one logit for each class.

    A copy of the network runs on the meta device, without computing values, or on the network's device if its control
    flow depends on data.

    Raises:
        UserError: the network does not accept images of ``input_shape`` (C, H, W), or returns other outputs.
    """
    required = _required_parameters(network)
    if len(required) > 1:
        raise UserError(
            f"model {name!r} has the inputs {', '.join(required)}, but the pipeline trains classifiers with a batch of "
            "images as the only input; give the other inputs a default value in forward"
        )
    try:
        try:
            outputs = [_output(on_meta(network), input_shape, mode) for mode in (False, True)]
        except Exception:  # the control flow may depend on data
            outputs = [_output(copy.deepcopy(network), input_shape, mode) for mode in (False, True)]
    except Exception as error:
        raise UserError(
            f"model {name!r} does not accept images of {'x'.join(map(str, input_shape))}: {first_line(error)}; "
            "set data.channels and data.image_size, or model.kwargs, to what the network expects"
        ) from error
    output, in_training = outputs
    if isinstance(output, torch.Tensor) and not isinstance(in_training, torch.Tensor):
        raise UserError(
            f"model {name!r} returns {type(in_training).__name__} in training, not one tensor of logits; switch "
            "auxiliary heads off (for torchvision's networks, set model.kwargs.aux_logits: false)"
        )
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (2, classes):
        raise UserError(
            f"model {name!r} returns {shape[1] if isinstance(shape, tuple) and len(shape) == 2 else shape} outputs "
            f"for {classes} classes of data; set model.kwargs.num_classes: {classes}"
        )


def _required_parameters(network: nn.Module) -> list[str]:
    """Returns the parameters of ``forward`` without a default value."""
    try:
        parameters = inspect.signature(network.forward).parameters.values()
    except (TypeError, ValueError):  # not every callable has a signature
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def _output(network: nn.Module, input_shape: tuple[int, ...], training: bool) -> Any:
    """Returns the network's output for two black images, in training or evaluation mode."""
    device = next((tensor.device for tensor in named_tensors(network).values()), torch.device("cpu"))
    with torch.no_grad(), device:
        return network.train(training)(torch.zeros((2, *input_shape)))


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
