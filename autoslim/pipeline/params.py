"""``params.yaml``: every parameter typed, described and checked, in one place. Defaults stand in that file alone."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from autoslim.errors import UserError
from autoslim.pipeline.entry import InvalidParametersError
from autoslim.pipeline.validation import validation_messages
from autoslim.resources.budgets import Amount, Budget, parse_budgets
from autoslim.search.methods import check_method

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = NotNegative
Fraction = Annotated[float, Field(ge=0, le=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:[0-9]+)?)$")]
Resource = Literal["macs", "params", "memory", "latency"]


class Section(BaseModel):
    """What a section's own validators say begins with the parameter's name within the section (see ``complaints``)."""

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
        description="arrays: decoded and cropped once; files: as needed, area cuts from whole images; auto: by size"
    )
    seed: Seed = Field(description="fixes the splits")


class Model(Section):
    name: str = Field(description="`package.module:callable`, `timm:NAME` or `path/to/file.py:callable`")
    kwargs: dict[str, Any] = Field(description="arguments of the callable; num_classes is added where it takes one")
    leaves: list[str] = Field(description="modules that tracing shall not look into; channels through them stay")
    weights: str | None = Field(
        description="trained weights that the supernet starts from: a file (.safetensors, .pt, .pth, .bin), or a name: "
        "torchvision's `DEFAULT`, timm's `pretrained` or a tag; null: new weights"
    )


class Augment(Section):
    pad: NotNegative = Field(description="random crop after zero padding of this many pixels")
    flip: bool = Field(description="mirror half of the images")
    area: tuple[Fraction, Fraction] | None = Field(
        description="random resized crop: range of the area kept, [0.25, 1] for ImageNet", strict=False
    )
    jitter: Fraction = Field(description="colour jitter of brightness, contrast and saturation")

    @model_validator(mode="after")
    def _range(self) -> "Augment":
        if self.area is not None and not 0 < self.area[0] <= self.area[1]:
            raise ValueError(f"area is {list(self.area)}; set it to [low, high] with 0 < low <= high, or null")
        return self


class Optimiser(Section):
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="at its highest")
    schedule: Literal["linear", "cosine", "multistep"] = Field(description="changed at every iteration")
    milestones: list[Fraction] = Field(description="multistep: fractions of the run at which the rate falls to a tenth")
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(description="linear increase at the start")
    momentum: Fraction = Field(description="of SGD")
    nesterov: bool = Field(description="Nesterov's momentum")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        description="on the weights of linear layers and of convolutions with more than one input channel a group"
    )

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "Optimiser":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov is true, but momentum is 0; set nesterov to false or raise momentum")
        return self


class Training(Section):
    epochs: Positive = Field(description="passes over the training images")
    batch_size: Annotated[int, Field(gt=1)] = Field(description="images of one optimiser step")
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="probability given to the wrong classes together"
    )
    augment: Augment
    optimiser: Optimiser
    precision: Literal["fp32", "bf16"] = Field(description="bf16: automatic mixed precision")
    channels_last: bool = Field(description="torch's channels-last memory layout")

    @model_validator(mode="after")
    def _warm_in_time(self) -> "Training":
        if self.optimiser.warmup_epochs > self.epochs:
            raise ValueError(
                f"optimiser.warmup_epochs is {self.optimiser.warmup_epochs:g}, but there are {self.epochs} epochs; "
                "lower it or raise epochs"
            )
        return self


class Grid(Section):
    anchor: Literal["widest", "zero"] = Field(
        description="channel numbers are the widest less whole steps, or (zero) multiples of the step and the widest"
    )
    steps: Annotated[int, Field(gt=1)] = Field(description="slimming steps a group has from its widest down")
    divisor: Positive = Field(description="channel numbers go down by multiples of this")
    narrowest: Annotated[float, Field(gt=0, le=1)] = Field(
        description="width multiplier of the narrowest subnet trained"
    )


class SupernetParams(Training):
    width: Annotated[float, Field(gt=0)] = Field(description="width multiplier of the widest network")
    grid: Grid
    random_widths: NotNegative = Field(description="random configurations a step, besides the widest and the narrowest")
    random_widths_per: Literal["group", "network", "both"] = Field(
        description="what a random width is drawn for: each group (the paper's), the whole network, or by turns both"
    )
    widths_by_rank: bool = Field(
        description="each of several processes draws its own random widths, with the batch statistics of its own "
        "images: more widths a step, but a result that depends on the number of processes"
    )
    distillation: bool = Field(description="subnets learn from the widest network's output, not from the labels")
    sort: Literal["l1", "bn_scale"] | None = Field(
        description="order of trained channels, the most important first: by absolute weights, or by batch norms' "
        "scales (by weights where a group has none); null: as they are"
    )
    seed: Seed = Field(description="of weights, random widths and data order")

    @model_validator(mode="after")
    def _narrower(self) -> "SupernetParams":
        if self.grid.narrowest > self.width:
            raise ValueError(
                f"grid.narrowest is {self.grid.narrowest}, but width is {self.width}; "
                "lower grid.narrowest or raise width"
            )
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
    incremental: bool = Field(description="run only the part of the network that a candidate changes")
    risk: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="candidates that are behind drop out after each chunk: the chance, at one comparison, that one as "
        "good as the leader does; null: every candidate sees every image"
    )
    precision: Literal["fp32", "bf16"] = Field(description="bf16: automatic mixed precision")


class Retrain(Training):
    start: Literal["new", "supernet"] = Field(
        description="weights: new ones (the paper's), or the supernet's, cut to the network"
    )
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        description="one training for each: of new weights and of the data's order"
    )

    @model_validator(mode="after")
    def _different(self) -> "Retrain":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {self.seeds}, one of them twice; give each seed once")
        return self


class Latency(Section):
    table: str | None = Field(
        description="a table measured elsewhere (`autoslim latency measure`); null: this machine is measured where the "
        "budget bounds latency"
    )
    runtime: Literal["eager", "compile", "onnxruntime"] = Field(
        description="eager: torch as it is; compile: torch.compile; onnxruntime: ONNX Runtime "
        "(pip install -e '.[onnx]')"
    )
    device: Device = Field(description="that runs the network: auto (the first CUDA device, else cpu), cpu, cuda, ...")
    threads: Positive = Field(description="of the CPU")
    batch: Positive = Field(description="images of one forward pass")
    precision: Literal["fp32", "bf16"] = Field(description="of weights and activations")
    channels_last: bool = Field(description="torch's channels-last memory layout")
    points: Annotated[int, Field(ge=2)] | None = Field(
        description="numbers of channels measured on each axis of a kernel, spread over the grid; null: all of the grid"
    )
    checked_on: Annotated[int, Field(ge=10)] = Field(
        description="random networks that the predictions are compared with"
    )


class Report(Section):
    figure_dpi: Positive = Field(description="pixels an inch of the pictures")


class Tracking(Section):
    enabled: bool = Field(description="one MLflow run for each stage that runs")
    experiment: str = Field(description="MLflow experiment")
    log_network: bool = Field(description="log the retrained network as an MLflow model")


class Runtime(Section):
    device: Device = Field(description="auto (the first CUDA device, else cpu), cpu, cuda, cuda:1, ..., mps or xpu")
    processes: Positive | Literal["auto"] = Field(
        description="that share training and search; auto: one a CUDA device where device is auto or cuda, else 1"
    )
    threads: Positive | Literal["auto"] = Field(
        description="of torch on the CPU; auto: one a core. Small networks are as fast with 1, on a busy machine faster"
    )
    workers: NotNegative | Literal["auto"] = Field(description="processes that decode images (storage: files)")
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(
        description="longest time of training that a kill may cost, besides epochs' ends"
    )


class Params(Section):
    """All of ``params.yaml``. A section that one stage alone reads has its name."""

    resource: Resource = Field(description="what the budget bounds; with several bounds, what pictures show")
    budget: Amount | dict[str, Amount] = Field(
        description="upper bound of the resource: 305M, 12ms, 20MB or 50% of the default network's; or several at "
        "once: {macs: 305M, params: 3.5M}"
    )
    methods: Annotated[list[str], Field(min_length=1)] = Field(
        description="how channel numbers are chosen, side by side: autoslim, uniform (the finest width multiplier that "
        "fits), released/NAME (a list of the paper's authors, at its own budget)"
    )
    data: Data
    model: Model
    supernet: SupernetParams
    search: Search
    latency: Latency
    retrain: Retrain
    report: Report
    tracking: Tracking
    runtime: Runtime

    @field_validator("budget")
    @classmethod
    def _readable(cls, budget: Amount | dict[str, Amount], read: ValidationInfo) -> Amount | dict[str, Amount]:
        if resource := read.data.get("resource"):  # missing where it is wrong itself, which is told then
            parse_budgets(budget, resource)
            if isinstance(budget, dict) and resource not in budget:
                raise ValueError(
                    f"budget bounds {', '.join(budget)}, but resource is {resource}; set resource to one of these"
                )
        return budget

    @model_validator(mode="after")
    def _fit(self) -> "Params":
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods are {', '.join(self.methods)}, one of them twice; name each method once")
        for method in self.methods:
            check_method(method)
        for name, images in (("data.search_images", self.data.search_images), ("search.images", self.search.images)):
            if images < self.search.chunk:
                raise ValueError(
                    f"search.chunk is {self.search.chunk}, but {name} leaves {images} images to score; "
                    f"lower search.chunk or raise {name}"
                )
        return self

    @model_validator(mode="after")
    def _trained_start(self) -> "Params":
        supernet, weights = self.supernet, self.model.weights
        if weights is not None and supernet.width > 1:
            raise ValueError(
                f"supernet.width is {supernet.width:g}, but model.weights are {weights!r}, and what is wider has no "
                "trained weights; set supernet.width to 1.0 or less, or model.weights to null"
            )
        if weights is None and supernet.sort is not None:
            raise ValueError(
                f"supernet.sort is {supernet.sort}, but model.weights is null, and new weights have no order; set "
                "supernet.sort to null, or give model.weights"
            )
        return self

    @property
    def budgets(self) -> dict[str, Budget]:
        """Resource -> its budget."""
        return parse_budgets(self.budget, self.resource)


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
        raise UserError(f"there is no {path} in {Path.cwd()}; run from the repository's root, or restore it from git")
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from error
    except YAMLError as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}; mend that line") from error


def check_params(values: Any, source: str) -> Params:
    """Raises:
    InvalidParametersError: naming every wrong parameter with its value, what was expected, and the file.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InvalidParametersError(source, validation_messages(error, Params, values)) from error
