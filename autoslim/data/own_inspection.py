"""Inspects the user's data sets before anything is trained on them: structures, class numbers and identical samples."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import ConcatDataset, Subset

from autoslim.data.own import ASIDE, OwnData, Reading, Sample, Samples, Structures, check_structures, loader
from autoslim.data.structure import collated, is_class_number, not_finite
from autoslim.errors import UserError

_log = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]

READ = 10_000  # samples of each data set that are read; all of them if the class numbers are found in no attribute
_BATCH = 32
_PROBES = 4  # samples that are read again with other and with the same random numbers
_LABELS = ("targets", "labels", "_labels", "y")  # attributes in which data sets store their class numbers
_PAIRS = ("samples", "_samples", "imgs")  # attributes with lists of (path, class number)

WrongValues = Callable[[Any, int], str]
"""``Task.wrong_values``."""

Check = Callable[[str, Sample], None]
"""Raises an error that names the data set, the first argument, if a sample has wrong values."""


@dataclass(frozen=True)
class Inspected:
    """What was found by reading samples of the data.

    Attributes:
        structures: of a sample's input and target.
        numbered: whether the targets are class numbers.
        classes: the names of the classes; () if there are none.
        labels: part -> class numbers, int64 (N,); zeros if the targets are not class numbers.
        contents: part -> index -> a digest of the input, for the samples that were read.
        digest: of the class numbers and of the inputs that were read.
    """

    structures: Structures
    numbered: bool
    classes: tuple[str, ...]
    labels: Mapping[str, np.ndarray]
    contents: Mapping[str, Mapping[int, bytes]]
    digest: str


@dataclass(frozen=True)
class _Read:
    """A sample as a worker returns it: without the sample."""

    index: int
    label: int | None
    content: bytes


def inspect_own(
    own: OwnData, class_targets: bool, workers: int, progress: Progress, wrong_values: WrongValues | None = None
) -> Inspected:
    """Reads samples of each data set: all up to ``READ``, or else as many, drawn at random.

    Targets are class numbers if they are single integers, and with ``class_targets`` or if the train data set has an
    attribute ``classes`` with their names.

    Args:
        wrong_values: returns what is wrong with the values of a target (see ``Task.wrong_values``).

    Raises:
        UserError: a sample cannot be read, samples differ in structure, class numbers are out of range, inputs are not
            finite, targets have wrong values, or data sets have the same samples.
    """
    _check_distinct(own)
    firsts = {part: _first(own, part, ASIDE, workers) for part in own.parts}
    structures = check_structures(own.named("train"), firsts["train"])
    for part, sample in firsts.items():
        check_structures(own.named(part), sample, structures)
    training = _first(own, "train", Reading(True, 0, 0), workers)
    check_structures(f"{own.named('train')}, after train_transforms,", training, structures)
    names = class_names(own.parts["train"], own.source)
    check = partial(_check_values, wrong_values, len(names or ()))
    check(f"{own.named('train')}, after train_transforms,", training)
    numbered = is_class_number(structures[1]) and (class_targets or names is not None)
    labels: dict[str, np.ndarray] = {}
    contents: dict[str, dict[int, bytes]] = {}
    for part, count in own.sizes.items():
        chosen = np.arange(count)
        if count > READ:
            chosen = np.sort(np.random.default_rng(0).choice(chosen, READ, replace=False))
        found = {read.index: read for read in _inspected(own, part, chosen, structures, check, workers, progress)}
        contents[part] = {index: read.content for index, read in found.items()}
        labels[part] = np.zeros(count, np.int64)
        if numbered:
            known = {index: read.label for index, read in found.items()}
            stored = stored_labels(own.parts[part])
            if stored is None or any(stored[index] != label for index, label in known.items()):
                rest = np.setdiff1d(np.arange(count), chosen)
                known |= {
                    read.index: read.label for read in _inspected(own, part, rest, structures, check, workers, progress)
                }
                stored = np.array([known[index] for index in range(count)])
            labels[part] = stored.astype(np.int64)
    _check_copies(own, contents)
    _warn_of_randomness(own, contents["train"], structures, check, workers)
    classes = _classes(own, labels, names) if numbered else names or ()
    digest = hashlib.sha256()
    for part in own.parts:
        digest.update(labels[part].tobytes())
        digest.update(b"".join(contents[part][index] for index in sorted(contents[part])))
    return Inspected(structures, numbered, classes, labels, contents, digest.hexdigest())


def _check_distinct(own: OwnData) -> None:
    """Raises ``UserError`` if two parts are one data set, or subsets of one that share samples."""
    parts = list(own.parts)
    for at, part in enumerate(parts):
        for other in parts[:at]:
            (base, indices), (other_base, others) = (_base(own.parts[name]) for name in (part, other))
            shared = len(np.intersect1d(indices, others)) if base is other_base else 0
            if shared:
                raise UserError(
                    f"{shared} samples of {own.named(part)} are also in its {other} data set; return data sets without "
                    "common samples"
                )


def _check_copies(own: OwnData, contents: Mapping[str, Mapping[int, bytes]]) -> None:
    """Raises ``UserError`` if most inputs of one data set are also in another one."""
    for part, other in (("test", "train"), ("search", "train"), ("test", "search")):
        if part in contents and other in contents:
            inputs, others = contents[part].values(), set(contents[other].values())
            shared = sum(content in others for content in inputs)
            if 2 * shared > len(inputs):
                raise UserError(
                    f"{shared} of the {len(inputs)} inputs that were read from {own.named(part)} are also in its "
                    f"{other} data set; return data sets without common samples"
                )


def _base(dataset: Any) -> tuple[Any, np.ndarray]:
    """Returns the data set that a subset of any depth belongs to, and the indices in it."""
    if isinstance(dataset, Subset):
        base, indices = _base(dataset.dataset)
        return base, indices[np.asarray(dataset.indices, dtype=np.int64)]
    return dataset, np.arange(len(dataset))


def _first(own: OwnData, part: str, reading: Reading, workers: int) -> Sample:
    """Returns the first sample of a data set."""
    [sample] = loader(Samples(own, part, reading), [np.array([0])], _only, min(workers, 1))
    found: Sample = sample
    return found


def _only(samples: Sequence[Sample | UserError]) -> Sample | UserError:
    return samples[0]


def _inspected(
    own: OwnData,
    part: str,
    indices: np.ndarray,
    structures: Structures,
    check: Check,
    workers: int,
    progress: Progress,
) -> Iterator[_Read]:
    batches = [indices[start : start + _BATCH] for start in range(0, len(indices), _BATCH)]
    collate = partial(_summarised, own.named(part), structures, check)
    summaries = (read for batch in loader(Samples(own, part, ASIDE), batches, collate, workers) for read in batch)
    yield from progress(summaries, f"reading {part}", len(indices)) if len(indices) else ()


def _summarised(
    name: str, structures: Structures, check: Check, samples: Sequence[Sample | UserError]
) -> list[_Read] | UserError:
    """Checks samples, and returns what is kept of them; used as ``collate_fn``."""
    found = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        try:
            check_structures(name, sample, structures)
            check(name, sample)
        except UserError as error:
            return error
        label = int(sample[2]) if is_class_number(structures[1]) else None
        found.append(_Read(sample[0], label, content_of(sample[1])))
    return found


def _check_values(wrong_values: WrongValues | None, classes: int, name: str, sample: Sample) -> None:
    """Raises ``UserError`` if an input has nan or infinite values (see ``not_finite``), or a target wrong values."""
    index, *pair = sample
    if found := not_finite(collated([pair[0]])):
        raise UserError(
            f"the input of sample {index} of {name} has {found}; correct the data set, for example with "
            "torch.nan_to_num"
        )
    problem = "" if wrong_values is None else wrong_values(collated([pair[1]]), classes)
    if problem:
        raise UserError(f"the target of sample {index} of {name} {problem}; correct the data set")


def content_of(value: Any) -> bytes:
    """Returns a digest of the tensors and texts of an input: 16 bytes."""
    digest = hashlib.sha256()
    for leaf in tree_leaves(collated([value])):
        tensor = isinstance(leaf, Tensor)
        digest.update(leaf.contiguous().reshape(-1).view(torch.uint8).numpy() if tensor else repr(leaf).encode())
    return digest.digest()[:16]


def stored_labels(dataset: Any) -> np.ndarray | None:
    """Returns the class numbers (N,) in an attribute of a data set, through subsets and concatenations; else None.

    They may differ from the targets of the samples, which ``target_transform`` changes, for example.
    """
    if isinstance(dataset, Subset):
        whole = stored_labels(dataset.dataset)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [stored_labels(part) for part in dataset.datasets]
        return None if any(part is None for part in parts) else np.concatenate([p for p in parts if p is not None])
    candidates = [getattr(dataset, name, None) for name in _LABELS]
    for name in _PAIRS:
        pairs = getattr(dataset, name, None)
        if isinstance(pairs, list) and all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
            candidates.append([pair[1] for pair in pairs])
    for values in candidates:
        try:
            labels = np.asarray(values)
        except (TypeError, ValueError, RuntimeError):  # such as a ragged list, or a tensor on another device
            continue
        if labels.shape == (len(dataset),) and labels.dtype.kind in "iu":
            return labels
    return None


def class_names(dataset: Any, source: str) -> tuple[str, ...] | None:
    """Returns the names in the attribute ``classes`` of a data set, or of the one that it is a subset of; else None.

    Raises:
        UserError: the attribute is not a list of at least two names.
    """
    names = getattr(_base(dataset)[0], "classes", None)
    if names is None:
        return None
    if not isinstance(names, list | tuple) or len(names) < 2:
        raise UserError(
            f"the attribute classes of the train data set of {source} is {names!r}; make it a list of two or more names"
        )
    return tuple(", ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names)


def _classes(own: OwnData, labels: Mapping[str, np.ndarray], names: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the names of the classes, by default their numbers, after checking the class numbers.

    Raises:
        UserError: a class number is out of range, or there is only one class.
    """
    count = int(labels["train"].max()) + 1 if names is None else len(names)
    rule = "the largest class number of the train data set" if names is None else "from the attribute classes"
    for part, numbers in labels.items():
        wrong = np.flatnonzero((numbers < 0) | (numbers >= count))
        if len(wrong):
            number = int(numbers[wrong[0]])
            span = "start at 0" if number < 0 else f"are from 0 to {count - 1} ({rule})"
            raise UserError(
                f"the target of sample {wrong[0]} of {own.named(part)} is {number}, and {len(wrong)} of its "
                f"{len(numbers)} targets are out of range; class numbers {span}: correct the targets"
            )
    present = np.bincount(labels["train"], minlength=count) > 0
    if present.sum() < 2:
        raise UserError(f"{own.named('train')} has only one class; at least two are required")
    classes = names or tuple(map(str, range(count)))
    if missing := [classes[index] for index in np.flatnonzero(~present)]:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        _log.warning("%s has no samples of %d of its %d classes: %s", own.named("train"), len(missing), count, shown)
    return classes


def _warn_of_randomness(
    own: OwnData, contents: Mapping[int, bytes], structures: Structures, check: Check, workers: int
) -> None:
    """Warns if samples depend on random numbers that are not keyed, or if the search split would be augmented."""
    probes = np.array(sorted(contents)[:_PROBES])[::-1]  # in another order than before

    def read(reading: Reading) -> list[bytes]:
        [batch] = loader(
            Samples(own, "train", reading),
            [probes],
            partial(_summarised, own.named("train"), structures, check),
            min(1, workers),
        )
        return [sample.content for sample in batch]

    first = [contents[int(index)] for index in probes]
    if read(ASIDE) != first:
        _log.warning(
            "%s returns other samples each time: its random numbers are not those of the global generators of torch, "
            "numpy or random, so that a resumed run is not the same as an undisturbed one",
            own.named("train"),
        )
    elif "search" not in own.parts and read(replace(ASIDE, seed=1)) != first:
        _log.warning(
            "%s augments its samples, and the search split is held out of it: return a search data set, or move the "
            "augmentation into train_transforms",
            own.named("train"),
        )
