"""Networks from their import path, as ``params.yaml`` and the command line name them."""

import contextlib
import copy
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoslim.channels.copying import named_tensors, on_meta
from autoslim.errors import UserError, first_line

_HOW = "write package.module:callable (torchvision.models:resnet50), timm:NAME or path/to/file.py:callable"


def build_network(name: str, kwargs: Mapping[str, Any], classes: int | None = None) -> nn.Module:
    """Calls the constructor that ``name`` points to.

    Args:
        name: ``package.module:callable``, ``timm:model_name`` or ``path/to/file.py:callable``.
        kwargs: for the callable. Where it takes ``num_classes`` and none is given, ``classes`` is added as that.
        classes: number of classes of the data, if known.

    Raises:
        UserError: there is no such callable, it does not take the arguments, or what it returns is not a network.
    """
    constructor = find_constructor(name)
    try:
        with _importing_from(_folder(name.rpartition(":")[0])):
            network = _called(constructor, kwargs, classes)
    except Exception as error:
        raise UserError(
            f"model.name {name!r} with model.kwargs {dict(kwargs)} cannot be built: {first_line(error)}; "
            "correct model.kwargs"
        ) from error
    if not isinstance(network, nn.Module):
        raise UserError(
            f"model.name {name!r} returns {type(network).__name__}, not a torch module; name a callable that builds one"
        )
    return network


def _called(constructor: Callable[..., Any], kwargs: Mapping[str, Any], classes: int | None) -> Any:
    kinds = _parameters(constructor)
    by_name = "num_classes" in kinds
    handed_on = inspect.Parameter.VAR_KEYWORD in kinds.values()
    if classes is None or "num_classes" in kwargs or not (by_name or handed_on):
        return constructor(**kwargs)
    try:
        return constructor(**kwargs, num_classes=classes)
    except TypeError:
        if by_name:
            raise
    return constructor(**kwargs)  # what it hands its arguments on to does not take that one


def check_network(network: nn.Module, name: str, input_shape: tuple[int, int, int], classes: int) -> None:
    """Runs the network's structure on the meta device, without arithmetic; one that depends on data runs as it is.

    Raises:
        UserError: it does not take images of ``input_shape`` (C, H, W), or does not give one logit for each class.
    """
    try:
        try:
            outputs = [_output(on_meta(network), input_shape, mode) for mode in (False, True)]
        except Exception:  # it may depend on data
            outputs = [_output(copy.deepcopy(network), input_shape, mode) for mode in (False, True)]
    except Exception as error:
        raise UserError(
            f"model {name!r} does not take images of {'x'.join(map(str, input_shape))}: {first_line(error)}; "
            "set data.channels and data.image_size, or model.kwargs, to what it expects"
        ) from error
    output, in_training = outputs
    if isinstance(output, torch.Tensor) and not isinstance(in_training, torch.Tensor):
        raise UserError(
            f"model {name!r} gives {type(in_training).__name__} in training, not one tensor of logits; switch "
            "auxiliary heads off, with model.kwargs.aux_logits: false for torchvision's"
        )
    shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
    if shape != (2, classes):
        raise UserError(
            f"model {name!r} gives {shape[1] if isinstance(shape, tuple) and len(shape) == 2 else shape} outputs "
            f"for {classes} classes of data; set model.kwargs.num_classes: {classes}"
        )


def _output(network: nn.Module, input_shape: tuple[int, int, int], training: bool) -> Any:
    """What the network, put in a mode, makes of two black images."""
    device = next((tensor.device for tensor in named_tensors(network).values()), torch.device("cpu"))
    with torch.no_grad(), device:
        return network.train(training)(torch.zeros((2, *input_shape)))


def find_constructor(name: str) -> Callable[..., Any]:
    """The callable that an import path names.

    Raises:
        UserError: there is none.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise UserError(f"model.name {name!r} is not an import path; {_HOW}")
    if place == "timm":
        return _find_timm(attribute)
    try:
        with _importing_from(_folder(place)):
            module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.name {name!r} cannot be imported: {first_line(error)}; {_HOW}") from error
    constructor: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(constructor):
        near = difflib.get_close_matches(attribute, [n for n in dir(module) if callable(getattr(module, n))], 5)
        known = f"it has {', '.join(near)}" if near else "look up its names"
        raise UserError(f"model.name {name!r}: {place} has no callable {attribute!r}; {known}")
    return constructor


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """The user's own packages, and files beside their file, can be imported, as they cannot from a stage's script."""
    added = [str(folder.resolve()), str(Path.cwd())]
    sys.path[:0] = added
    try:
        yield
    finally:
        for path in added:
            sys.path.remove(path)


def _find_timm(model: str) -> Callable[..., Any]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f"model.name 'timm:{model}' needs timm; install it with `pip install timm`") from error
    if not timm.is_model(model):
        near = timm.list_models(f"*{model[:6]}*")[:5]
        raise UserError(
            f"model.name 'timm:{model}' is not a model of timm {timm.__version__}; "
            f"near it: {', '.join(near) or 'nothing'}"
        )

    def create(**kwargs: Any) -> Any:
        return timm.create_model(model, **kwargs)

    return create


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"model.name names the file {str(path)!r}, which does not exist; give its path from the repository's root"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    others = sys.modules.get(spec.name)
    sys.modules[spec.name] = module  # dataclasses look their module up there; it stays no longer than that
    try:
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop(spec.name)
        if others is not None:
            sys.modules[spec.name] = others
    return module


def _folder(place: str) -> Path:
    """Where else than on the path a module may find what it imports."""
    return Path(place).parent if place.endswith(".py") else Path()


def _parameters(constructor: Callable[..., Any]) -> dict[str, Any]:
    """Name -> kind."""
    try:
        parameters = inspect.signature(constructor).parameters
    except ValueError:  # some built-in callables have none
        return {}
    return {name: parameter.kind for name, parameter in parameters.items()}
