"""Random input: the answer is right, or a one-line ``UserError`` says what is wrong; no other exception, and no hang.

Examples are the same in each run. ``pytest --long`` draws other ones, and more of them.
"""

import copy
import io
import json
import math
import re
import struct
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import long_form
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_data import SPAN, small_network
from tiny import tiny_params

from autoslim.channels.grid import GridSpec
from autoslim.channels.groups import Channels
from autoslim.channels.limits import GroupLimits
from autoslim.channels.resize import resize
from autoslim.cli.terminal import example_inputs, image_size, keyword_values, read_channels
from autoslim.cli.trajectory import print_budgets, print_steps, within
from autoslim.data.images import evaluation_pixels, open_image
from autoslim.errors import UserError
from autoslim.files import read_json, sealed, write_sealed
from autoslim.pipeline.artifacts import Allocation
from autoslim.pipeline.checks import check_allocation, check_trajectory
from autoslim.pipeline.costs import read_table
from autoslim.pipeline.params import Params, check_params, load_params
from autoslim.pipeline.project import read_output
from autoslim.resources.budgets import UNITS, format_amount, parse_budget, parse_budgets
from autoslim.resources.costs import Costs
from autoslim.resources.latency.table import Check, LatencyTable, Target
from autoslim.search.greedy import Option, SlimmingStep
from autoslim.search.trajectory import read_trajectory, step_to_dict
from autoslim.slimming.networks import load_latency_table
from autoslim.tasks.classification import Score

EXAMPLES = 1500 if long_form.LONG else 40  # of each test
PHASES = Phase.explicit, Phase.generate, Phase.shrink
settings.register_profile(
    "fuzzing",
    max_examples=EXAMPLES,
    derandomize=not long_form.LONG,
    database=None,
    deadline=20_000 if long_form.LONG else None,  # ms
    phases=PHASES,
)
settings.load_profile("fuzzing")

Value = TypeVar("Value")


def answer(act: Callable[[], Value]) -> Value | None:
    """Returns the result, or None if ``act`` raises a ``UserError``."""
    try:
        return act()
    except UserError:
        return None


PARAMS = check_params(tiny_params(), "params.yaml")
NETWORK, GRAPH = small_network()
FOLDER = Path()  # for files; set by a fixture


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("fuzzing")


def written(name: str, values: Any, has_digest: bool) -> Path:
    """Writes a JSON file, with a digest that fits it, or without one as users' files."""
    path = FOLDER / name
    path.write_text(json.dumps(sealed(values) if has_digest and isinstance(values, dict) else values))
    return path


# Values that JSON or YAML files can have

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from([0, 1, -1, 10**400, 1e308, float("nan"), "", "1e400", "..", "\x00", "\ud800", "nan%", "٣M"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def changed(draw: st.DrawFn, original: Any) -> Any:
    """Draws a copy of JSON values in which one to three entries are replaced, removed or added."""
    values = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        inner = values
        while True:
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(inner[key], dict | list) and inner[key] and draw(st.integers(0, 3)):
                inner = inner[key]
                continue
            match draw(st.sampled_from(["replace", "replace", "remove", "add", "copy"])):
                case "replace":
                    inner[key] = draw(VALUES)
                case "remove":
                    del inner[key]
                case "add" if isinstance(inner, dict):
                    inner[draw(st.text(max_size=8))] = draw(VALUES)
                case "add":
                    inner.insert(key, draw(VALUES))
                case "copy":
                    inner[key] = copy.deepcopy(inner[draw(st.sampled_from(keys))])
            break
    return values


# Budgets

NUMBERS = st.from_regex(r"[0-9]{0,4}\.?[0-9]{1,4}([eE][+-]?[0-9]{1,3})?", fullmatch=True)
NAMES = sorted({name for units in UNITS.values() for name in units} | {"%", "m", "k", "mb", "S", "x"})
AMOUNTS = st.builds("{}{}{}".format, NUMBERS, st.sampled_from(["", " "]), st.sampled_from(NAMES))


@given(AMOUNTS | st.text(max_size=20) | st.floats() | st.integers(), st.sampled_from([*UNITS]))
def test_a_budget_is_its_number_times_its_unit(text: str | float, resource: str) -> None:
    budget = answer(lambda: parse_budget(text, resource))
    if budget is None:
        return
    assert 0 < budget.amount < math.inf
    match = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*([A-Za-z%]*)\s*", str(text))
    assert match is not None
    units = {"%": 0.01} | UNITS[resource]
    if resource in ("macs", "params"):
        units |= {name.lower(): size for name, size in UNITS[resource].items()}
    expected = Fraction(match[1]) * Fraction(units[match[2]])
    assert budget.amount == pytest.approx(float(expected), rel=1e-9)


@given(st.dictionaries(st.sampled_from([*UNITS, "flops", ""]), AMOUNTS, max_size=4) | AMOUNTS)
def test_several_budgets_are_each_one_budget(budgets: Mapping[str, str] | str) -> None:
    parsed = answer(lambda: parse_budgets(budgets, "macs"))
    if parsed is not None and isinstance(budgets, Mapping):
        assert parsed == {name: parse_budget(text, name) for name, text in budgets.items()}


@given(st.floats(1, 1e15), st.sampled_from([*UNITS]))
def test_a_formatted_amount_is_a_budget_of_nearly_that_amount(value: float, resource: str) -> None:
    assert parse_budget(format_amount(value, resource), resource).amount == pytest.approx(value, rel=0.006)


@pytest.mark.parametrize("text", ["1" * 200_000 + "!", "." * 200_000, " " * 200_000 + "1", "1e" + "9" * 200_000])
def test_long_text_is_no_hang(text: str) -> None:
    assert answer(lambda: parse_budget(text)) is None or text.endswith(" 1")
    assert answer(lambda: image_size(text)) is None


# Parameters


@given(changed(tiny_params()))
def test_changed_parameters_are_valid_or_named(values: Any) -> None:
    params = answer(lambda: check_params(values, "params.yaml"))
    if params is not None:
        assert Params.model_validate(params.model_dump()) == params
        assert params.budgets


SPECIAL = [
    *(b"", b":", b"{", b"[", b"]", b"- ", b"&a ", b"*a", b"<<: ", b"? ", b"|\n", b"\t", b"---\n", b"\x85", b"\xff"),
    *(
        b"!!python/object:os.system ",
        b"!!int ",
        b"!!int x",
        b"!!binary x",
        b"!!set {a}",
        b"!!timestamp x",
        b"!!float x",
    ),
    *(b"!!omap [1]", b"&b [*b]", b"%YAML 9.9\n", b"0x", b"0o9", b"2001-99-99", b"1:99", b"{[1]: 2}"),
    *(b"[" * 1500, b"9" * 5000),
]


@st.composite
def changed_text(draw: st.DrawFn, text: str) -> bytes:
    """Draws text in which some pieces are replaced by others, by YAML's special characters, or by random bytes."""
    content = text.encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = draw(st.integers(start, min(len(content), start + 20)))
        special = st.sampled_from(SPECIAL)
        content = content[:start] + draw(special | st.binary(max_size=8)) + content[end:]
    return content


PARAMS_TEXT = "".join(
    line for line in (Path(__file__).parents[2] / "params.yaml").read_text().splitlines(True) if line.strip()
)


@given(changed_text(PARAMS_TEXT) | st.binary(max_size=60))
def test_changed_parameter_files_are_valid_or_named(content: bytes) -> None:
    path = FOLDER / "params.yaml"
    path.write_bytes(content)
    answer(lambda: load_params(path))


SIZES = st.from_regex(r"([a-c]=)?[0-9]{1,2}(x[0-9]{1,2}){0,3}(:(int64|float32|nn|bool))?", fullmatch=True)
SIZES |= st.integers(10**9).map("{0}x{0}".format)


@given(SIZES | st.text(alphabet="0123456789x:=-abcint3264floatcomplexquint ", max_size=20))
def test_options_are_parsed_or_named(text: str) -> None:
    inputs = answer(lambda: example_inputs([text], None))
    assert inputs is None or isinstance(inputs, torch.Tensor) or len(inputs) == 1
    size = answer(lambda: image_size(text))
    assert size is None or min(size) > 0
    answer(lambda: keyword_values([text]))


# Channels


@st.composite
def configurations(draw: st.DrawFn) -> Any:
    valid = {name: draw(st.integers(1, 24)) for name in GRAPH.groups}
    if draw(st.booleans()):
        return valid
    return draw(changed({"channels": valid} if draw(st.booleans()) else valid))


@given(configurations())
def test_channels_give_a_network_of_their_size_or_an_error(values: Any) -> None:
    def checked() -> Channels:
        channels = read_channels(written("channels.json", values, has_digest=False))
        GRAPH.check(channels)
        return channels

    channels = answer(checked)
    if channels is not None and (count := GRAPH.params(channels)) < 1e7:
        network = resize(NETWORK, GRAPH, channels, seed=None)
        assert count == sum(parameter.numel() for parameter in network.parameters())


LIMITS = st.builds(
    GroupLimits,
    st.booleans(),
    *[st.none() | st.integers(1, 40)] * 3,
    st.none() | st.floats(0, 1),
)


@given(
    width=st.floats(0.01, 4),
    narrowest=st.floats(0.001, 1),
    steps=st.integers(1, 40),
    divisor=st.integers(1, 40),
    anchor=st.sampled_from(["widest", "zero"]),
    limits=st.data(),
)
def test_grids_are_descending_multiples(
    width: float, narrowest: float, steps: int, divisor: int, anchor: Any, limits: st.DataObject
) -> None:
    def grid() -> Any:
        groups = limits.draw(st.dictionaries(st.sampled_from(["*", "features*", "x", "", "[", *GRAPH.groups]), LIMITS))
        return GRAPH.grid(GridSpec(width, narrowest, steps, divisor, anchor, groups))

    found = answer(grid)
    if found is None:
        return
    for levels in found.values():
        assert min(levels) > 0
        assert list(levels) == sorted(set(levels), reverse=True)
    GRAPH.check(found.widest)
    GRAPH.check(found.narrowest)


ALLOCATION = {
    "method": "uniform",
    "channels": GRAPH.default,
    "costs": {name: float(GRAPH.cost(GRAPH.default, name)) for name in ("macs", "params", "memory")},
}


@given(changed(ALLOCATION), st.booleans())
def test_changed_files_of_channels_are_complete_or_named(values: Any, has_digest: bool) -> None:
    path = written("uniform.json", values, has_digest)

    def checked() -> Channels:
        allocation = Allocation.read(path.parent, "uniform")
        check_allocation(allocation, PARAMS, GRAPH)
        return allocation.channels

    channels = answer(checked)
    assert channels is None or all(type(count) is int and count > 0 for count in channels.values())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "9" * 5000, '"\\ud800"', "\x00"])
def test_json_of_any_kind_is_named(text: str) -> None:
    path = FOLDER / "uniform.json"
    path.write_text(text)
    readers: list[Callable[[], object]] = [
        lambda: read_channels(path),
        lambda: read_json(path, "search"),
        lambda: read_output(path, "search"),
        lambda: read_table(path),
        lambda: read_trajectory(path),
        lambda: load_latency_table(path),
        lambda: Allocation.read(FOLDER, "uniform"),
    ]
    for read in readers:
        answer(read)


# Trajectories


def trajectory() -> dict[str, Any]:
    """Returns a trajectory as the stage ``search`` writes it, with made-up scores."""
    grid, costs, score = GRAPH.grid(SPAN), Costs(GRAPH), Score(0.5, 1.0, 10)
    channels, steps = grid.widest, []
    while narrower := grid.narrower(channels):
        options = {name: Option(count, 1.0, 1.0) for name, count in narrower.items()}
        taken = next(iter(narrower))
        step = SlimmingStep((), channels, 1.0, score, options, dict.fromkeys(options, score), (taken,))
        steps.append({"step": len(steps), **step_to_dict(step, costs)})
        channels = step.following
    ends = {"default": GRAPH.default, "widest": grid.widest, "narrowest": grid.narrowest}
    return {
        "format": 2,
        "resource": "macs",
        "limits": {},
        "images": 10,
        **{name: {"channels": each, **costs.all(each)} for name, each in ends.items()},
        "steps": steps[:3] + steps[-1:],
    }


TRAJECTORY = trajectory()


@given(changed(TRAJECTORY), st.booleans(), st.sampled_from(["50%", "30K", "macs=40%,params=90%", "1", "20MB"]))
def test_changed_trajectories_are_complete_or_named(values: Any, has_digest: bool, budget: str) -> None:
    path = written("trajectory.json", values, has_digest)

    def show() -> tuple[dict[str, Any], dict[str, Any]]:
        read = read_trajectory(path)
        check_trajectory(read, path, PARAMS, GRAPH)
        print_steps(read)
        step = within(read, budget, read["resource"])
        print_budgets(read, {budget: step})
        return read, step

    found = answer(show)
    if found is not None:
        read, step = found
        GRAPH.check(step["channels"])
        if budget == "50%":
            assert step[read["resource"]] <= 0.5 * read["default"][read["resource"]]


@given(st.integers(0), st.integers(0, 7))
def test_a_flipped_bit_is_found_by_the_digest(position: int, bit: int) -> None:
    path = FOLDER / "flipped.json"
    write_sealed(path, ALLOCATION)
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    found = answer(lambda: read_json(path, "allocate"))
    # Without its key the digest is an entry like others, which Allocation refuses.
    assert found is None or found == ALLOCATION or "digest" not in json.loads(path.read_text())


# Latency tables


def latency_table() -> dict[str, Any]:
    first, second = list(GRAPH.groups)[:2]
    one = {"inputs": [], "outputs": [first], "input_sizes": [0], "output_sizes": [4, 8, 16], "ms": [[0.1, 0.2, 0.3]]}
    two = {"inputs": [first], "outputs": [second], "input_sizes": [4, 16], "output_sizes": [4, 8]}
    table = LatencyTable(
        "net.py:build",
        GRAPH.input_shape,
        GRAPH.default,
        Target("cpu", "eager", "cpu", 1, 1, "fp32", False, "torch 2"),
        {},
        check=Check((1.0, 2.0), (1.1, 2.1), 0.1, 0.2, 1.0),
    )
    kernels = {"one": one | {"work": "conv"}, "two": two | {"ms": [[0.1, 0.2], [0.3, 0.4]], "work": "conv"}}
    return json.loads(json.dumps(table.to_dict() | {"kernels": kernels}))


@given(changed(latency_table()), st.booleans())
def test_changed_latency_tables_predict_or_are_named(values: Any, has_digest: bool) -> None:
    path = written("latency.json", values, has_digest)

    def predict() -> float:
        table = read_table(path)
        table.summary()
        return Costs(GRAPH, table).of(GRAPH.default, "latency")

    found = answer(predict)
    assert found is None or 0 < found < math.inf


# Images

FORMATS = ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
MODES = {"PNG": ["L", "RGB", "RGBA", "P", "I;16", "1"], "TIFF": ["L", "RGB", "F", "I;16"], "JPEG": ["L", "RGB", "CMYK"]}


@st.composite
def images(draw: st.DrawFn) -> bytes:
    """Draws an image file with changes, mostly in its header."""
    kind = draw(st.sampled_from(FORMATS))
    buffer = io.BytesIO()
    size = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    Image.new(draw(st.sampled_from(MODES.get(kind, ["L", "RGB"]))), size).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, min(len(content), 80)))
        number = st.integers(0, 2**16 - 1).map(lambda value: struct.pack(">H", value))
        new = draw(st.binary(max_size=4) | number | st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\x20\0"]))
        content[start : start + len(new)] = new
    return bytes(content[: draw(st.just(None) | st.integers(0, len(content)))])


@given(images(), st.sampled_from([1, 3]), st.integers(1, 24), st.integers(1, 24))
def test_damaged_images_have_pixels_or_are_named(content: bytes, channels: int, height: int, width: int) -> None:
    path = FOLDER / "image"
    path.write_bytes(content)

    def pixels() -> Any:
        image = open_image(path, None)
        return evaluation_pixels(image, channels, min(height, width), (height, width))

    found = answer(pixels)
    assert found is None or (found.shape == (channels, height, width) and found.dtype == "uint8")
