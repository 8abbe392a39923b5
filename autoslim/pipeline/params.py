"""The schema of ``params.yaml``: each parameter's type, range and description. The schema has no default values."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from autoslim.data.augmentation import MAX_MAGNITUDE
from autoslim.errors import UserError, first_line
from autoslim.pipeline.entry import InvalidParametersError
from autoslim.pipeline.validation import validation_messages
from autoslim.resources.budgets import Amount, Budget, parse_budgets
from autoslim.search.methods import ON_TRAINED
from autoslim.search.methods import check_method as check_method
from autoslim.user_code import file_of

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = NotNegative
Fraction = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[float, Field(ge=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|mps|(cuda|xpu)(:[0-9]+)?)$")]
Resource = Literal["macs", "params", "memory", "latency"]


# Former names of parameters and values. The error message for an old name states the new one.
RENAMED = {
    "report.picture_dpi": "report.figure_dpi",
    "latency.checked_on": "latency.check_networks",
    "retrain.start: new": "scratch",
}
MOVED_NETWORKS = {
    f"autoslim.networks.{old}": "autoslim.models.architectures" for old in ("zoo", "families")
}  # module -> module


class Section(BaseModel):
    """Base class of all sections.

    The message of a section's validator starts with the name of a parameter within the section (see
    ``validation_messages``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Data(Section):
    source: str = Field(
        description="Data set: `digits`, `scenes`, `torchvision:NAME`, `folder:PATH` with folders train/ and val/ or "
        "test/, `hf:PATH` that save_to_disk of Hugging Face's datasets wrote, or `path/to/file.py:function`, a "
        "function that returns data sets of your own."
    )
    image_size: Positive | list[Positive] | None = Field(
        description="Height and width of the network's input in pixels, or [height, width]; null: as in the source."
    )
    channels: Literal[1, 3] | None = Field(description="1 for grey images, 3 for colour; null: as in the source.")
    search_images: Annotated[int, Field(gt=1)] = Field(
        description="Number of training images held out for the search, balanced over the classes; at most half of "
        "the images of each class."
    )
    train_images: Positive | None = Field(description="Size of a class-balanced training subset; null: all images.")
    test_images: Positive | None = Field(description="Size of a class-balanced test subset; null: all images.")
    storage: Literal["auto", "arrays", "files"] = Field(
        description="arrays: images are decoded and cropped once; files: images are decoded on demand, and random "
        "resized crops are taken from whole images; auto: the size of the data decides."
    )
    seed: Seed = Field(description="Seed of the splits.")

    @model_validator(mode="after")
    def _check_size(self) -> "Data":
        if isinstance(self.image_size, list) and len(self.image_size) != 2:
            raise ValueError(f"image_size is {self.image_size}; set it to one number or to [height, width]")
        return self

    @model_validator(mode="after")
    def _check_own(self) -> "Data":
        for name, value in (("image_size", None), ("channels", None), ("storage", "auto")):
            if self.own_file is not None and (given := getattr(self, name)) != value:
                raise ValueError(
                    f"{name} is {given}, but it has no effect on the data sets of {self.source}, which do their own "
                    f"transforms; set it to {value or 'null'}"
                )
        return self

    @property
    def own_file(self) -> str | None:
        """The path of the Python file that ``source`` names; None for other sources."""
        return file_of(self.source)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of ``image_size``."""
        if self.image_size is None:
            return None
        height, width = self.image_size if isinstance(self.image_size, list) else (self.image_size,) * 2
        return height, width


class Model(Section):
    name: str = Field(description="Import path: `package.module:callable`, `timm:NAME` or `path/to/file.py:callable`.")
    kwargs: dict[str, Any] = Field(
        description="Keyword arguments of the callable; num_classes is added if the callable accepts it."
    )
    leaves: list[str] = Field(
        description="Modules that tracing treats as one operation; their channels are not slimmed."
    )
    part: str | None = Field(
        description="The module to slim, such as backbone, for a network that cannot be traced as a whole. The rest of "
        "the network is trained with it and keeps its size. Costs and budgets are those of the part; null: the whole "
        "network is slimmed."
    )
    weights: str | None = Field(
        description="Trained weights from which the supernet starts: a file (.safetensors, .pt, .pth, .bin) or a name "
        "(torchvision: `DEFAULT`, timm: `pretrained` or a tag); null: the supernet is trained from scratch."
    )

    @model_validator(mode="after")
    def _current_module(self) -> "Model":
        module, _, function = self.name.partition(":")
        if module in MOVED_NETWORKS:
            raise ValueError(f"name: {self.name} is now {MOVED_NETWORKS[module]}:{function}")
        return self


POLICY_SETTINGS = ("operations", "magnitude")
"""The parameters of ``augment`` that are no transforms."""


class Augment(Section):
    pad: NotNegative = Field(description="Zero padding in pixels before a random crop.")
    flip: bool = Field(description="Random horizontal flip with probability 0.5.")
    area: tuple[Fraction, Fraction] | None = Field(
        description="Range of a random resized crop's share of the image area, such as [0.25, 1] for ImageNet; "
        "null: no random resized crop.",
        strict=False,
    )
    jitter: Fraction = Field(description="Strength of the colour jitter (brightness, contrast and saturation).")
    policy: Literal["trivial_augment", "rand_augment"] | None = Field(
        description="Random transforms of torchvision: `trivial_augment` applies one of random strength to each image, "
        "`rand_augment` several of one strength; null: none. Translations of trivial_augment are up to 32 pixels."
    )
    operations: Positive = Field(description="For rand_augment: number of transforms per image.")
    magnitude: Annotated[int, Field(ge=0, le=MAX_MAGNITUDE)] = Field(
        description="For rand_augment: strength of the transforms."
    )
    erase: Fraction = Field(
        description="Probability that a random rectangle of an image is erased (random erasing); 0: off."
    )
    mixup: Alpha = Field(
        description="Alpha of the Beta distribution from which the proportion of two mixed images and of their labels "
        "is drawn (mixup); 0: off."
    )
    cutmix: Alpha = Field(
        description="The same for a rectangle of another image (CutMix); 0: off. With mixup too, each batch gets one "
        "of the two."
    )

    @model_validator(mode="after")
    def _check_area(self) -> "Augment":
        if self.area is not None and not 0 < self.area[0] <= self.area[1]:
            raise ValueError(f"area is {list(self.area)}; set it to [low, high] with 0 < low <= high, or null")
        return self

    @property
    def active(self) -> dict[str, Any]:
        """The transforms that are on, with their values."""
        return {name: value for name, value in self if value and name not in POLICY_SETTINGS}


class Optimiser(Section):
    name: Literal["sgd", "adamw"] = Field(description="sgd: SGD with momentum; adamw: AdamW.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "multistep"] = Field(
        description="Learning rate schedule, updated at every iteration."
    )
    milestones: list[Fraction] = Field(
        description="For multistep: fractions of the training at which the learning rate is divided by 10."
    )
    warmup_epochs: Annotated[float, Field(ge=0)] = Field(description="Number of epochs of linear warm-up.")
    momentum: Fraction = Field(description="For sgd: momentum.")
    nesterov: bool = Field(description="For sgd: use Nesterov momentum.")
    betas: tuple[Beta, Beta] = Field(
        description="For adamw: decays of the running averages of the gradient and of its square.", strict=False
    )
    eps: Annotated[float, Field(gt=0)] = Field(
        description="For adamw: number added to the root of the squared gradient's average."
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        description="Weight decay of linear and convolution weights; not applied to depthwise convolutions, batch "
        "norms and biases."
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        description="Largest norm of a step's gradient, to which longer ones are scaled; null: no clipping."
    )

    @model_validator(mode="after")
    def _check_nesterov(self) -> "Optimiser":
        if self.name == "sgd" and self.nesterov and self.momentum == 0:
            raise ValueError("nesterov is true, but momentum is 0; set nesterov to false or raise momentum")
        return self


class Training(Section):
    epochs: Positive = Field(description="Number of passes over the training images.")
    batch_size: Annotated[int, Field(gt=1)] = Field(
        description="Number of images per optimiser step; all images if the train split has fewer."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="Total probability assigned to the wrong classes."
    )
    augment: Augment
    optimiser: Optimiser
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="Decay of an exponential moving average of the weights, which is evaluated and saved in their "
        "place, such as 0.999; at most (1 + n) / (10 + n) after step n; null: none."
    )
    precision: Literal["fp32", "bf16"] = Field(description="Training precision; bf16: automatic mixed precision.")
    channels_last: bool = Field(description="Use torch's channels-last memory layout.")

    @model_validator(mode="after")
    def _check_warmup(self) -> "Training":
        if self.optimiser.warmup_epochs > self.epochs:
            raise ValueError(
                f"optimiser.warmup_epochs is {self.optimiser.warmup_epochs:g}, but there are only {self.epochs} "
                "epochs; lower it or raise epochs"
            )
        return self


class GroupLimits(Section):
    """Limits of the channel groups that a pattern matches. Each of them may be left out."""

    freeze: bool = Field(False, description="The group keeps the channels of the default network.")
    minimum: Positive | None = Field(None, description="Smallest number of channels.")
    maximum: Positive | None = Field(None, description="Largest number of channels.")
    multiple: Positive | None = Field(None, description="Numbers of channels are multiples of this number.")
    max_shrink: Fraction | None = Field(None, description="Largest share of the default channels that is removed.")

    @model_validator(mode="after")
    def _check_bounds(self) -> "GroupLimits":
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError(f"minimum is {self.minimum}, but maximum is {self.maximum}; lower minimum")
        return self


class Grid(Section):
    anchor: Literal["widest", "zero"] = Field(
        description="widest: numbers of channels are the widest number minus multiples of the slimming step; zero: "
        "they are multiples of the slimming step, and the widest number."
    )
    steps: Annotated[int, Field(gt=1)] = Field(
        description="The slimming step of a group is its widest number of channels divided by this number."
    )
    divisor: Positive = Field(
        description="Slimming steps, and the numbers of channels at widths other than 1, are multiples of this number."
    )
    narrowest: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Width multiplier of the narrowest subnet that is trained."
    )
    groups: dict[str, GroupLimits] = Field(
        description="Limits of channel groups by pattern, such as {'stem*': {freeze: true}, '*': {multiple: 8, "
        "max_shrink: 0.5}}. A pattern is compared with the names of groups and of their layers (see `autoslim "
        "profile`). Limits: freeze, minimum, maximum, multiple, max_shrink."
    )


class SupernetParams(Training):
    width: Annotated[float, Field(gt=0)] = Field(description="Width multiplier of the widest network.")
    grid: Grid
    random_widths: NotNegative = Field(
        description="Number of random configurations per step, in addition to the widest and the narrowest."
    )
    random_widths_per: Literal["group", "network", "both"] = Field(
        description="group: one random width for each channel group, as in the paper; network: one for the whole "
        "network; both: alternates between the two."
    )
    widths_by_rank: bool = Field(
        description="Each process draws its own random widths and uses the batch statistics of its own images. Each "
        "step then trains more widths, but the result depends on the number of processes."
    )
    distillation: bool = Field(
        description="Subnets are trained on the widest network's output (in-place distillation) instead of the labels."
    )
    sort: Literal["l1", "bn_scale"] | None = Field(
        description="Sorts trained channels by importance. l1: by absolute weights; bn_scale: by the scales of batch "
        "norms, or by absolute weights in groups without batch norm; null: the channels are not sorted."
    )
    seed: Seed = Field(description="Seed of the weights, the random widths and the data order.")

    @model_validator(mode="after")
    def _check_narrowest(self) -> "SupernetParams":
        if self.grid.narrowest > self.width:
            raise ValueError(
                f"grid.narrowest is {self.grid.narrowest}, but width is {self.width}; "
                "lower grid.narrowest or raise width"
            )
        return self


class Search(Section):
    stop: Annotated[float, Field(gt=0, le=1)] = Field(
        description="The search ends at this fraction of the default network's cost."
    )
    images: Annotated[int, Field(gt=1)] = Field(
        description="Number of search images on which options are scored; all images if the search split has fewer."
    )
    chunk: Annotated[int, Field(gt=1)] = Field(
        description="Number of images that share their batch statistics; at least 256 is recommended. If fewer images "
        "are scored, they are one chunk."
    )
    score: Literal["error", "loss", "cross_entropy"] = Field(
        description="The score that ranks the options; the other one breaks ties. error: the task's error (top-1, "
        "wrong pixels, ...); loss: its loss, also called cross_entropy for classification and segmentation."
    )
    per_cost: bool = Field(description="Rank by the increase of the score per unit of cost saved.")
    step: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        description="Share of the cost that a step removes by slimming several groups, and twice as much above the "
        "default network's cost; 0: each step slims one group, as in the paper."
    )
    incremental: bool = Field(description="Run only the part of the network that an option changes.")
    risk: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        description="Significance level of each comparison in the race, in which options that are clearly taken or "
        "clearly not taken are not run on further chunks; null: every option is run on all images."
    )
    precision: Literal["fp32", "bf16"] = Field(description="Precision of the scores; bf16: automatic mixed precision.")


class Allocate(Section):
    refine: bool = Field(
        description="Start from the channels that the search found, use the budget that it left unused, and exchange "
        "channels between groups, as long as this improves the score; false: as in the paper."
    )


class Retrain(Training):
    start: Literal["scratch", "supernet", "weights"] = Field(
        description="scratch: training starts from random initialisation, as in the paper; supernet: from the "
        "supernet's weights of these channels, or, for networks that need no supernet, from model.weights; weights: "
        "from the most important of these channels in model.weights. See docs/guide/methods.md."
    )
    teacher: Literal["default"] | None = Field(
        description="A network whose outputs the retrained networks learn too. default: the default network with "
        "model.weights; null: none."
    )
    teacher_weight: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Share of the teacher in the loss; the labels have the rest."
    )
    teacher_temperature: Annotated[float, Field(gt=0)] = Field(
        description="Both networks' outputs are divided by this number in the teacher's part of the loss, which is "
        "multiplied by its square."
    )
    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(
        description="Seeds of the weights and the data order; each network is trained once with each seed."
    )

    @model_validator(mode="after")
    def _check_seeds(self) -> "Retrain":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds contains duplicates: {self.seeds}; list each seed once")
        return self


class Latency(Section):
    table: str | None = Field(
        description="Latency table that `autoslim latency measure` wrote, here or on another machine; null: the table "
        "is measured on this machine if a budget limits latency."
    )
    runtime: Literal["eager", "compile", "onnxruntime", "openvino", "tensorrt"] = Field(
        description="eager: torch without a compiler; compile: torch.compile; onnxruntime: ONNX Runtime "
        "(pip install -e '.[onnx]'); openvino: OpenVINO (pip install -e '.[openvino]'); tensorrt: TensorRT, which has "
        "not been tested."
    )
    device: Device = Field(
        description="Device whose latency is measured: auto (the first CUDA device, else cpu), cpu, cuda, cuda:1, ..., "
        "mps or xpu."
    )
    threads: Positive = Field(description="Number of CPU threads.")
    batch: Positive = Field(description="Number of images in a forward pass.")
    precision: Literal["fp32", "bf16", "int8"] = Field(
        description="Dtype of weights and activations. bf16: runtime eager or compile; int8: runtime onnxruntime or "
        "openvino, quantised on random inputs for the measurement."
    )
    channels_last: bool = Field(description="Use torch's channels-last memory layout.")
    points: Annotated[int, Field(ge=2)] | None = Field(
        description="Number of grid points at which each axis of a kernel is measured, spread over the grid; null: the "
        "whole grid."
    )
    check_networks: Annotated[int, Field(ge=10)] = Field(
        description="Number of random networks whose measured latency is compared with the prediction."
    )


class Report(Section):
    figure_dpi: Positive = Field(description="Resolution of the figures in dots per inch.")


class Tracking(Section):
    enabled: bool = Field(description="Log an MLflow run for each stage that runs.")
    experiment: str = Field(description="Name of the MLflow experiment.")
    log_network: bool = Field(description="Log the retrained network as an MLflow model.")


class Runtime(Section):
    device: Device = Field(
        description="Device of training and search: auto (the first CUDA device, else cpu), cpu, cuda, cuda:1, ..., "
        "mps or xpu."
    )
    processes: Positive | Literal["auto"] = Field(
        description="Number of processes that share training and search; auto: one for each CUDA device if device is "
        "auto or cuda, else 1."
    )
    threads: Positive | Literal["auto"] = Field(
        description="Number of torch's CPU threads; auto: one for each core. Small networks do not run faster with "
        "more than 1."
    )
    workers: NotNegative | Literal["auto"] = Field(
        description="Number of processes that decode images (data.storage: files), or that read your own data sets."
    )
    checkpoint_minutes: Annotated[float, Field(ge=0)] = Field(
        description="Longest time in minutes between two checkpoints of a training run, which also writes one after "
        "each epoch."
    )


class Params(Section):
    """The contents of ``params.yaml``. A section that only one stage reads has the name of the stage."""

    resource: Resource = Field(
        description="Resource that the budget limits; with several limits, the resource that the figures show."
    )
    budget: Amount | dict[str, Amount] = Field(
        description="Upper limit of the resource, such as 305M, 12ms, 20MB, or 50% of the default network's cost; or "
        "several limits, such as {macs: 305M, params: 3.5M}."
    )
    methods: Annotated[list[str], Field(min_length=1)] = Field(
        description="Methods to compare: default (the network as it is, whatever the budget), uniform (the largest "
        "width multiplier within the budget), autoslim, random and evolution (other searches on the supernet), l1, "
        "bn_scale, taylor and sensitivity (which prune the network of model.weights and need no supernet), "
        "released/NAME (channels released by the paper's authors, at their own budget). See docs/guide/methods.md."
    )
    task: str = Field(
        description="What networks are trained for: classification, multilabel, segmentation, regression, or "
        "`path/to/file.py:Class` for a class derived from `autoslim.Task`."
    )
    data: Data
    model: Model
    supernet: SupernetParams
    search: Search
    allocate: Allocate
    latency: Latency
    retrain: Retrain
    report: Report
    tracking: Tracking
    runtime: Runtime

    @field_validator("budget")
    @classmethod
    def _check_budget(cls, budget: Amount | dict[str, Amount], info: ValidationInfo) -> Amount | dict[str, Amount]:
        if resource := info.data.get("resource"):  # missing if it is invalid; pydantic reports that separately
            parse_budgets(budget, resource)
            if isinstance(budget, dict) and resource not in budget:
                raise ValueError(
                    f"budget limits {', '.join(budget)}, but resource is {resource}; set resource to one of these"
                )
        return budget

    @model_validator(mode="after")
    def _check_methods(self) -> "Params":
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"methods contains duplicates: {', '.join(self.methods)}; list each method once")
        for method in self.methods:
            check_method(method)
        return self

    @model_validator(mode="after")
    def _check_augment(self) -> "Params":
        for stage, training in (("supernet", self.supernet), ("retrain", self.retrain)):
            if self.data.own_file is not None and (active := training.augment.active):
                shown = ", ".join(f"{name}: {value}" for name, value in active.items())
                raise ValueError(
                    f"{stage}.augment has {shown}, but it has no effect on the data sets of {self.data.source}, which "
                    f"do their own augmentation; set {', '.join(active)} to 0, false or null"
                )
        return self

    @model_validator(mode="after")
    def _check_weights(self) -> "Params":
        supernet, weights = self.supernet, self.model.weights
        if weights is not None and supernet.width > 1:
            raise ValueError(
                f"supernet.width is {supernet.width:g}, but model.weights is {weights!r}, and trained weights exist "
                "only up to a width of 1; set supernet.width to 1.0 or less, or model.weights to null"
            )
        if weights is None and (pruning := [method for method in self.methods if method in ON_TRAINED]):
            raise ValueError(
                f"methods has {pruning[0]}, which prunes a trained network, but model.weights is null; set "
                "model.weights (methods: [default] trains the network, to outputs/retrain/default/weights), or remove "
                f"{', '.join(pruning)}"
            )
        if weights is None and self.retrain.start == "weights":
            raise ValueError(
                "retrain.start is weights, but model.weights is null; set model.weights, or set retrain.start to "
                "supernet or scratch"
            )
        if weights is None and supernet.sort is not None:
            raise ValueError(
                f"supernet.sort is {supernet.sort}, but model.weights is null, and random weights cannot be sorted by "
                "importance; set supernet.sort to null, or set model.weights"
            )
        if weights is None and self.retrain.teacher is not None:
            raise ValueError(
                f"retrain.teacher is {self.retrain.teacher}, the default network with model.weights, but model.weights "
                "is null, and random weights cannot teach; set retrain.teacher to null, or set model.weights"
            )
        return self

    @property
    def budgets(self) -> dict[str, Budget]:
        """The budget of each limited resource."""
        return parse_budgets(self.budget, self.resource)


def load_params(path: Path = Path("params.yaml")) -> Params:
    """Reads and validates a parameter file.

    Raises:
        UserError: The file is missing or not YAML, or parameters are wrong. The message names all of them.
    """
    return check_params(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """Reads a YAML file as DVC does (ruamel, YAML 1.2: ``1e-3`` is a number, ``on`` is text).

    Raises:
        UserError: The file is missing or not YAML.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist in {Path.cwd()}; run from the repository's root, or restore the file from git"
        )
    try:
        return YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not encoded in UTF-8 ({error}); save it as UTF-8") from error
    except YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}; correct that line") from error
    except (RecursionError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        # ruamel raises many classes, for example for impossible dates, integers of 5,000 digits and nested brackets.
        raise UserError(f"{path} is not valid YAML: {first_line(error)}; correct this value") from error


def check_params(values: Any, source: str) -> Params:
    """Validates the parameters ``values``, which were read from ``source``.

    Raises:
        InvalidParametersError: Parameters are wrong. The message states the value and the expected type of each.
    """
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise InvalidParametersError(source, validation_messages(error, Params, values, RENAMED)) from error
