"""Retrained networks, read back from what the stage ``retrain`` wrote."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from autoslim.engine.artifacts import Allocation, Asked, load_weights
from autoslim.engine.data import PreparedData
from autoslim.engine.data.info import DataInfo, read_info
from autoslim.engine.retraining import split_score
from autoslim.engine.runtime import to_device
from autoslim.networks.resizing import resize
from autoslim.shell.assembly import machine, recipe, traced_network
from autoslim.shell.checks import check_allocation
from autoslim.shell.params import Params
from autoslim.shell.places import CHANNELS, PREPARED, RETRAIN, repository_root
from autoslim.vocabulary.errors import UserError
from autoslim.vocabulary.scores import Score


@dataclass(frozen=True)
class Retrained:
    """A method's network with the weights of one seed, in evaluation mode on the CPU, and what it is for."""

    seed: int
    network: nn.Module
    chosen: Allocation
    asked: Asked
    info: DataInfo


def seeds_of(method: str) -> list[int]:
    """The seeds whose weights lie there.

    Raises:
        UserError: none do.
    """
    folder = RETRAIN / method / "weights"
    seeds = sorted(int(path.stem.removeprefix("seed-")) for path in folder.glob("seed-*.safetensors"))
    if not seeds:
        methods = sorted(path.parent.relative_to(RETRAIN).as_posix() for path in RETRAIN.rglob("weights"))
        remedy = f"there are networks of {' and '.join(methods)}" if methods else "run `dvc repro`"
        raise UserError(f"there is no retrained network of method {method!r}; {remedy}")
    return seeds


def load_retrained(params: Params, method: str, seed: int) -> Retrained:
    """Raises:
    UserError: there is no such network, or it is not of the network that ``params`` names.
    """
    seeds = seeds_of(method)
    if seed not in seeds:
        raise UserError(
            f"method {method} has no network of seed {seed}; its seeds are {', '.join(map(str, seeds))}: name one of "
            "these, or add it to retrain.seeds and run `dvc repro`"
        )
    info = read_info(PREPARED)
    network, graph = traced_network(params.model, info)
    chosen = Allocation.read(CHANNELS, method)
    check_allocation(chosen, params, graph)
    plain = resize(network, graph, chosen.channels)
    load_weights(plain, RETRAIN / method / "weights" / f"seed-{seed}.safetensors")
    return Retrained(seed, plain.eval(), chosen, Asked.read(CHANNELS, method), info)


def score(retrained: Retrained, params: Params, split: str) -> Score:
    """Top-1 error and cross-entropy on a split, on the device and in the precision that ``params`` ask for."""
    data = PreparedData.open(PREPARED, relative_to=repository_root())
    place, asked = machine(params.runtime), recipe(params.retrain)
    to_device(retrained.network, place.device, asked.channels_last)
    return split_score(retrained.network, data, split, asked, place)


def exported(retrained: Retrained) -> torch.export.ExportedProgram:
    """The network as a graph of torch's own operators, for any batch size: it runs without its class, and autoslim."""
    network = retrained.network.to("cpu").to(memory_format=torch.contiguous_format)
    info = retrained.info
    images = torch.zeros(2, info.channels, info.image_size, info.image_size)  # a batch of one would become a constant
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=({0: batch},))


def description(retrained: Retrained) -> dict[str, object]:
    """What a user of the network needs beside the weights: its channels, its input and its classes."""
    info = retrained.info
    return {
        "seed": retrained.seed,
        **dataclasses.asdict(retrained.chosen),
        **dataclasses.asdict(retrained.asked),
        "input": {
            "shape": [info.channels, info.image_size, info.image_size],
            "range": [0, 1],  # of pixels before normalisation
            "shorter_side": info.shorter_side,  # resized to, before the centre crop
            "mean": list(info.mean),  # of pixels in [0, 1]
            "std": list(info.std),
        },
        "classes": list(info.classes),
    }
