"""``params.yaml``: every parameter typed, described and checked, in one place. Defaults stand in ``params.yaml`` alone."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from autoslim.vocabulary.budgets import Budget, parse_budget
from autoslim.vocabulary.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Resource = Literal["macs", "params"]
Method = Literal["autoslim", "uniform"]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(Section):
    source: str = Field(
        description="`digits`, `torchvision:NAME`, or `folder:PATH` with train/ and val/ or test/ inside"
    )
    image_size: Positive | None = Field(
        description="height and width the network gets, pixels; null: as the source has them"
    )
    channels: Literal[1, 3] | None = Field(description="1 grey, 3 colour; null: as the source has them")
    search_images: Positive = Field(description="held out of train for the search, class-balanced")
    train_images: Positive | None = Field(description="a class-balanced part of the training images; null: all")
    test_images: Positive | None = Field(description="a class-balanced part of the test images; null: all")
    storage: Literal["auto", "arrays", "files"] = Field(
        description="arrays: decoded once; files: decoded as needed; auto: by size"
    )
    seed: int = Field(description="fixes the splits")


class Model(Section):
    name: str = Field(description="`package.module:callable`, `timm:NAME` or `path/to/file.py:callable`")
    kwargs: dict[str, Any] = Field(description="arguments of the callable; num_classes is added where it takes one")
    leaves: list[str] = Field(description="modules that tracing shall not look into; channels through them stay")


class Augment(Section):
    pad: NotNegative = Field(description="random crop after zero padding of this many pixels")
    flip: bool = Field(description="mirror half of the images")
    area: tuple[float, float] | None = Field(
        description="random resized crop: range of the area kept, [0.25, 1] for ImageNet", strict=False
    )
    jitter: Fraction = Field(description="colour jitter of brightness, contrast and saturation")


class Optimiser(Section):
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="at its highest")
    schedule: Literal["linear", "cosine", "multistep"] = Field(description="changed at every iteration")
    milestones: list[Fraction] = Field(description="multistep: fractions of the run at which the rate falls to a tenth")
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(description="linear increase at the start")
    momentum: Fraction
    nesterov: bool
    weight_decay: Annotated[float, Field(ge=0)] = Field(description="on dense convolution and linear weights only")


class Training(Section):
    epochs: Positive
    batch_size: Annotated[int, Field(gt=1)] = Field(description="images of one optimiser step")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="probability given to the wrong classes together"
    )
    augment: Augment
    optimiser: Optimiser
    precision: Literal["fp32", "bf16"] = Field(description="bf16: automatic mixed precision")
    channels_last: bool


class Grid(Section):
    steps: Annotated[int, Field(gt=1)] = Field(description="slimming steps a group has from its widest down")
    divisor: Positive = Field(description="channel numbers go down by multiples of this")
    narrowest: Annotated[float, Field(gt=0, le=1)] = Field(
        description="width multiplier of the narrowest subnet trained"
    )


class SupernetParams(Training):
    width: Annotated[float, Field(gt=0)] = Field(description="width multiplier of the widest network")
    grid: Grid
    random_widths: NotNegative = Field(description="random configurations a step, besides the widest and the narrowest")
    distillation: bool = Field(description="subnets learn from the widest network's output, not from the labels")
    seed: int

    @model_validator(mode="after")
    def _narrower(self) -> "SupernetParams":
        if self.grid.narrowest > self.width:
            raise ValueError(f"grid.narrowest {self.grid.narrowest} is above width {self.width}; lower it")
        return self


class Search(Section):
    stop: Annotated[float, Field(gt=0, le=1)] = Field(
        description="the search ends at this fraction of the default network's cost"
    )
    images: Positive = Field(description="search images scored for each candidate (fewer where the split has fewer)")
    chunk: Annotated[int, Field(gt=1)] = Field(
        description="images that share their batch statistics; at least 256 is advised"
    )
    score: Literal["error", "cross_entropy"] = Field(description="what candidates are ranked by; the other breaks ties")
    per_cost: bool = Field(description="rank by the increase of the score for each unit of cost saved")
    precision: Literal["fp32", "bf16"]


class Retrain(Training):
    seeds: Annotated[list[int], Field(min_length=1)] = Field(description="one training from new weights for each")


class Report(Section):
    picture_dpi: Positive = Field(description="pixels an inch of the pictures")


class Tracking(Section):
    enabled: bool
    experiment: str = Field(description="MLflow experiment")
    log_network: bool = Field(description="log the retrained network as an MLflow model")


class Runtime(Section):
    device: str = Field(description="auto, cpu, cuda, cuda:1, ...")
    workers: NotNegative | Literal["auto"] = Field(description="processes that decode images (storage: files)")
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(
        description="longest time of training that a kill may cost, besides epochs' ends"
    )


class Params(Section):
    """All of ``params.yaml``. Sections are named after the stage that reads them first."""

    budget: str | int | float = Field(
        description="upper bound of the resource: 305M, 0.57G or 50% of the default network's"
    )
    resource: Resource = Field(description="what the budget bounds")
    methods: Annotated[list[Method], Field(min_length=1)] = Field(
        description="how channel numbers are chosen, side by side"
    )
    data: Data
    model: Model
    supernet: SupernetParams
    search: Search
    retrain: Retrain
    report: Report
    tracking: Tracking
    runtime: Runtime

    @model_validator(mode="after")
    def _fit(self) -> "Params":
        parse_budget(self.budget, self.resource)
        if self.search.chunk > min(self.search.images, self.data.search_images):
            raise ValueError(
                f"search.chunk {self.search.chunk} is above the {min(self.search.images, self.data.search_images)} images scored "
                "(search.images, data.search_images); lower search.chunk or hold out more images"
            )
        return self

    @property
    def parsed_budget(self) -> Budget:
        return parse_budget(self.budget, self.resource)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Reads and checks the whole file.

    Raises:
        UserError: the file is missing or not YAML, or parameters are wrong: all of them, by dotted name.
    """
    return check_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file, read as DVC reads it (ruamel, YAML 1.2: ``1e-3`` is a number, ``on`` is text).

    Raises:
        UserError: it is missing or not YAML.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}; run from the repository's root")
    try:
        return YAML(typ="safe").load(path.read_text())
    except YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}; mend that line") from error


def check_params(values: Any, source: str) -> Params:
    """Raises:
    UserError: naming every wrong parameter with its value, what was expected, and the file.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())  # type: ignore[arg-type]
        count = error.error_count()
        raise UserError(f"{source} has {count} wrong parameter{'s' if count > 1 else ''}: {problems}") from error


def _problem(error: dict[str, Any]) -> str:
    parts = [str(part) for part in error["loc"] if not str(part).startswith("function-")]
    # a union's alternatives end up in the location; people know only the parameter
    name = ".".join(
        part for part in parts if part not in ("int", "float", "str") and "constrained" not in part and "[" not in part
    )
    kind, message = error["type"], error["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        return f"{name} is unknown; remove it or correct its spelling"
    if kind == "missing":
        return f"{name} is missing; add it"
    value = "" if isinstance(error["input"], dict) else f" is {error['input']!r}"
    return f"{name or 'params'}{value}: {message[:1].lower()}{message[1:]}"
