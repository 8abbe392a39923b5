"""Data: sources, the prepared splits (train, search, test) and the batches drawn from them."""

from autoslim.engine.data.augmentation import Augmentation
from autoslim.engine.data.batches import batches_per_epoch, eval_batches, train_batches
from autoslim.engine.data.info import SPLITS, DataInfo
from autoslim.engine.data.preparation import prepare
from autoslim.engine.data.prepared import PreparedData
from autoslim.engine.data.schemes import check_source

__all__ = [
    "SPLITS",
    "Augmentation",
    "DataInfo",
    "PreparedData",
    "batches_per_epoch",
    "check_source",
    "eval_batches",
    "prepare",
    "train_batches",
]
