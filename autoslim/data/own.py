"""Data of the user's own: a function in a Python file that returns map-style data sets of (input, target).

The data sets do their own decoding and transforms. Their random numbers are keyed: before each sample, the global
generators of torch, numpy and Python are seeded by (seed, epoch, index), so that a sample does not depend on the number
of workers or on where a run was resumed.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from autoslim.data.structure import (
    Structure,
    StructureError,
    collated,
    in_words,
    is_integer,
    on_tensors,
    structure_of_batch,
)
from autoslim.errors import UserError, first_line, worker_error
from autoslim.files import sha256
from autoslim.user_code import find_callable, importing_from

EVALUATION = 2**32 - 1  # used instead of an epoch outside training, so that no epoch has the same random numbers

PARTS = ("train", "search", "test")
TRANSFORMS = ("train_transforms", "eval_transforms")
_FORM = "write path/to/file.py:function"
_RETURNS = (
    "return (train, test), or a mapping with train, test and optionally search, train_transforms and eval_transforms"
)


@dataclass(frozen=True)
class OwnData:
    """What the user's function returned.

    Attributes:
        source: ``path/to/file.py:function``.
        relative_to: the folder at which the path starts.
        parts: "train", "test" and optionally "search" -> a map-style data set of (input, target).
        transforms: "train_transforms" or "eval_transforms" -> a function of an input and a target that returns both
            changed. The first is used for training, the second for the search and the test split.
    """

    source: str
    relative_to: Path
    parts: Mapping[str, Any]
    transforms: Mapping[str, Callable[[Any, Any], Any]]

    @property
    def file(self) -> str:
        """The path of the user's file."""
        return self.source.rpartition(":")[0]

    @property
    def digest(self) -> str:
        """The SHA-256 digest of the user's file."""
        return sha256(self.relative_to / self.file)

    def part_of(self, split: str) -> str:
        """Returns the name of the data set that a split is chosen from."""
        return split if split in self.parts else "train"

    @property
    def sizes(self) -> dict[str, int]:
        """The number of samples of each data set."""
        return {part: len(dataset) for part, dataset in self.parts.items()}

    def named(self, part: str) -> str:
        """Returns a name of a data set for messages."""
        return f"the {part} data set of {self.source}"


def check_own(source: str, relative_to: Path) -> Callable[[], Any]:
    """Returns the user's function, without calling it.

    Raises:
        UserError: the file or the function does not exist, or the file cannot be imported.
    """
    return find_callable(source, "data.source", _FORM, relative_to=relative_to)


def build_own(source: str, relative_to: Path = Path()) -> OwnData:
    """Calls the user's function.

    Raises:
        UserError: the function cannot be found, raises an error, or does not return data sets of samples.
    """
    function = check_own(source, relative_to)
    try:
        with importing_from(source.rpartition(":")[0], relative_to):
            built = function()
    except Exception as error:
        raise UserError(f"data.source {source} raised {_described(error, source)}; correct the function") from error
    if isinstance(built, tuple | list) and len(built) == 2:
        built = {"train": built[0], "test": built[1]}
    if not isinstance(built, Mapping):
        raise UserError(f"data.source {source} returned an object of type {type(built).__name__}; {_RETURNS}")
    unknown = [key for key in built if key not in (*PARTS, *TRANSFORMS)]
    missing = [key for key in ("train", "test") if built.get(key) is None]
    if unknown or missing:
        problem = f"unknown keys {', '.join(map(repr, unknown))}" if unknown else f"no {' and no '.join(missing)}"
        raise UserError(f"data.source {source} returned a mapping with {problem}; {_RETURNS}")
    given = {key: value for key, value in built.items() if value is not None}
    own = OwnData(
        source,
        relative_to,
        {part: given[part] for part in PARTS if part in given},
        {name: given[name] for name in TRANSFORMS if name in given},
    )
    for part, dataset in own.parts.items():
        _check_map_style(own.named(part), dataset)
    for name, transform in own.transforms.items():
        if not callable(transform):
            raise UserError(
                f"{name} of {source} is of type {type(transform).__name__}; return a function of (input, target)"
            )
    return own


def _check_map_style(name: str, dataset: Any) -> None:
    if isinstance(dataset, DataLoader):
        raise UserError(f"{name} is a DataLoader; return its data set: the pipeline makes the batches")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{name}, of type {type(dataset).__name__}, has no access by index; return a map-style data set with "
            "__getitem__ and __len__"
        )
    try:
        length = len(dataset)
    except Exception as error:
        raise UserError(
            f"{name}, of type {type(dataset).__name__}, has no length ({first_line(error)}); give it a __len__ that "
            "returns the number of samples"
        ) from error
    if length == 0:
        raise UserError(f"{name} is empty; check the path of the data in the file")


def _described(error: Exception, source: str) -> str:
    """Returns the class and message of an error, and the last line of the user's file that led to it."""
    file = Path(source.rpartition(":")[0])
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == file.name]
    place = f" ({file}, line {lines[-1].lineno})" if lines else ""
    message = first_line(error)
    name = type(error).__name__
    return (name if message == name else f"{name}: {message}") + place


# Samples


@dataclass(frozen=True)
class Reading:
    """How samples are read: the transforms, and the key of the random numbers in addition to the index."""

    training: bool
    seed: int
    epoch: int


ASIDE = Reading(training=False, seed=0, epoch=EVALUATION)


Sample = tuple[int, Any, Any]
"""The index of a sample in its data set, its input and its target."""


class Samples(Dataset[Any]):
    """The samples of a data set, or a ``UserError`` for one that cannot be read.

    An error is returned, because the loader would replace one raised in a worker by an error with a traceback. Pickled
    for a worker that is not forked, the data set is built again there, because the user's classes are in no module that
    can be imported.
    """

    def __init__(self, own: OwnData, part: str, reading: Reading) -> None:
        self.own: OwnData | None = own
        self.source, self.relative_to = own.source, own.relative_to
        self.part, self.reading = part, reading

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "own": None}

    def __getitems__(self, indices: Sequence[int]) -> list[Sample | UserError]:
        if self.own is None:
            try:
                self.own = build_own(self.source, self.relative_to)
            except UserError as error:
                return [error]
        with keyed_generators() as seed, importing_from(self.source.rpartition(":")[0], self.relative_to):
            return [self._sample(self.own, int(index), seed) for index in indices]

    def _sample(self, own: OwnData, index: int, seed: Callable[[int, int, int], None]) -> Sample | UserError:
        name = f"sample {index} of {own.named(self.part)}"
        transform = own.transforms.get(TRANSFORMS[0 if self.reading.training else 1])
        seed(self.reading.seed, self.reading.epoch, index)
        try:
            sample = own.parts[self.part][index]
            if not _is_pair(sample):
                return UserError(f"{name} is {_kind(sample)}; return a pair (input, target)")
            if transform is not None:
                sample = transform(*sample)
                if not _is_pair(sample):
                    return UserError(f"{name} is {_kind(sample)} after its transforms; return a pair (input, target)")
        except Exception as error:  # the user's code may raise anything
            return UserError(f"{name} cannot be read: {_described(error, own.source)}; correct the data set")
        return index, sample[0], sample[1]


def _is_pair(sample: Any) -> bool:
    return isinstance(sample, tuple | list) and len(sample) == 2


def _kind(sample: Any) -> str:
    size = f" and length {len(sample)}" if isinstance(sample, tuple | list) else ""
    return f"of type {type(sample).__name__}{size}"


@contextlib.contextmanager
def keyed_generators() -> Iterator[Callable[[int, int, int], None]]:
    """Yields a function that seeds the global generators by a key, and restores their states at the end.

    They are those of torch on the CPU, of numpy and of Python.
    """
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def seed(*key: int) -> None:
        first, second, third = np.random.SeedSequence(key).generate_state(3).tolist()
        torch.default_generator.manual_seed(first)
        np.random.seed(second)
        random.seed(third)

    try:
        yield seed
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


Structures = tuple[Structure, Structure]
"""The structures of a sample's input and target."""


class Batching:
    """Makes batches of samples that have the structures of ``data.json``; used as ``collate_fn``."""

    def __init__(self, name: str, expected: Structures) -> None:
        self.name, self.expected = name, expected

    def __call__(self, samples: Sequence[Sample | UserError]) -> tuple[Any, Any] | UserError:
        pairs = []
        for sample in samples:
            if isinstance(sample, UserError):
                return sample
            pairs.append(sample)
        try:
            batch = collated([sample[1] for sample in pairs]), collated([sample[2] for sample in pairs])
            if structures_of(*batch) == self.expected:
                return batch
            problem = "they differ in structure"
        except StructureError as error:
            problem = str(error)
        for sample in pairs:
            try:
                check_structures(self.name, sample, self.expected)
            except UserError as error:
                return error
        return UserError(
            f"samples of {self.name} cannot be made a batch: {problem}; return equal types for all samples"
        )


def structures_of(inputs: Any, targets: Any) -> Structures:
    """Returns the structures of a batch. Targets of integers are int64, see ``on_device``."""
    return structure_of_batch(inputs), structure_of_batch(targets, wide=True)


def check_structures(name: str, sample: Sample, expected: Structures | None = None) -> Structures:
    """Returns the structures of a sample.

    Raises:
        UserError: it can be no part of a batch, or has other structures than ``expected``.
    """
    index, *pair = sample
    found = []
    for side, value in zip(("input", "target"), pair, strict=True):
        try:
            found.append(structure_of_batch(collated([value]), wide=side == "target"))
        except StructureError as error:
            raise UserError(
                f"the {side} of sample {index} of {name} cannot be part of a batch: {error}; return tensors, arrays "
                "and numbers, or tuples, lists and mappings of them"
            ) from error
        if expected is not None and found[-1] != (wanted := expected[len(found) - 1]):
            raise UserError(
                f"the {side} of sample {index} of {name} is {in_words(found[-1])}, but others are {in_words(wanted)}; "
                "all samples need the same shapes and dtypes: crop, pad or convert them in the file"
            )
    return found[0], found[1]


def loader(
    samples: Dataset[Any], batches: Sequence[np.ndarray], collate: Callable[[Any], Any], workers: int, pin: bool = False
) -> Iterator[Any]:
    """Yields the result of ``collate`` for each array of indices in ``batches``, and raises those that are errors.

    ``workers`` processes read in advance; with 0, this process reads.

    Raises:
        UserError: a sample cannot be read, or a worker was killed.
    """
    loaded: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        generator=torch.Generator(),  # otherwise iterating would draw from torch's global generator
    )
    try:
        for batch in loaded:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        raise worker_error(error) or error from error


def own_batches(
    own: OwnData,
    split: str,
    structures: Structures,
    batches: Sequence[np.ndarray],
    reading: Reading,
    device: torch.device,
    workers: int,
) -> Iterator[tuple[Any, Any]]:
    """Yields inputs and targets on ``device`` for each array of indices in ``batches``.

    Raises:
        UserError: a sample cannot be read, or does not have these structures.
    """
    part = own.part_of(split)
    samples, batching = Samples(own, part, reading), Batching(own.named(part), structures)
    for inputs, targets in loader(samples, batches, batching, workers, pin=device.type == "cuda"):
        yield on_device(inputs, device), on_device(targets, device, wide=True)


def on_device(batch: Any, device: torch.device, *, wide: bool = False) -> Any:
    """Moves all tensors of a batch to ``device``; if ``wide``, integers become int64, as torch's losses expect."""

    def moved(tensor: Tensor) -> Tensor:
        tensor = tensor.to(device, non_blocking=True)
        return tensor.long() if wide and is_integer(tensor.dtype) else tensor

    return on_tensors(batch, moved)
