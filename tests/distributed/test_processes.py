"""Several processes against one: the same weights, the same search, and the error reported if one of them fails."""

import contextlib
import faulthandler
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from failures import KilledError
from small_data import SPAN, prepared_digits, recipe, search_settings, small_network
from small_project import change_params, stage, start_project
from small_project import error_of as error_of_command
from specimens import shuffle_weights
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure, record

from autoslim import Supernet, resize
from autoslim.data.augmentation import Augmentation
from autoslim.data.prepared import PreparedData
from autoslim.distributed.ranks import SINGLE, LostRankError, World, current_world, world_from_environment
from autoslim.distributed.sync import GradientSynchronizer
from autoslim.errors import UserError
from autoslim.pipeline.launch import _reason, rank_count
from autoslim.pipeline.params import Runtime
from autoslim.resources.costs import Costs, Objective
from autoslim.search.search import search
from autoslim.supernet.sandwich import Sandwich, random_width_seed, sandwich_rule
from autoslim.supernet.train import train_supernet
from autoslim.training.checkpoints import Checkpoints, load_weights
from autoslim.training.device import RunContext, autocast, select_device
from autoslim.training.loop import Plan, label_step, train
from autoslim.training.recipe import sgd
from autoslim.training.retrain import retrain

SIZE = 2
MIXED = Augmentation(1, policy="trivial_augment", erase=0.3, mixup=0.4, cutmix=1.0)
STEPS, EPOCHS = 3, 2
SEARCHES: dict[str, dict[str, Any]] = {
    "plain": {"score": "error", "per_cost": False, "step": 0.0, "incremental": False, "risk": None},
    "incremental": {"score": "cross_entropy", "per_cost": True, "step": 0.0, "incremental": True, "risk": None},
    "racing": {"score": "cross_entropy", "per_cost": True, "step": 0.1, "incremental": True, "risk": 0.1},
}


PLANTED: list[int] = []


def planted() -> None:
    PLANTED.append(1)


class Planted:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return planted, ()


# The jobs, run by every rank and by a single process


def everything(world: World, folder: Path, prepared: Path) -> dict[str, Any]:
    """Returns the results of each job by name."""
    torch.set_num_threads(1)
    data = PreparedData.open(prepared)
    context = RunContext(torch.device("cpu"), workers=0, world=world)
    return {
        "supernet, even batches": double_supernet(world, folder / "even", 12),
        "supernet, odd batches": double_supernet(world, folder / "odd", 13),
        "plain network, even batches": double_network(world, folder / "plain-even", 12),
        "plain network, odd batches": double_network(world, folder / "plain-odd", 13),
        "plain network, averaged": double_network(world, folder / "averaged", 13, clip_norm=0.5, ema=0.9),
        "widths by rank": widths_by_rank(world, folder / "by-rank"),
        "digits": digits(context, data, folder / "digits"),
        "digits mixed": digits(context, data, folder / "digits-mixed", augmentation=MIXED, optimiser_name="adamw"),
        "digits by rank": digits(context, data, folder / "digits-by-rank", widths_by_rank=True),
        "searches": searches(context, data, folder / "searches"),
        "whole run": mortal_run(world, folder / "whole", None),
        "resumed run": mortal_run(world, folder / "torn", 4),
        "unused": unused_parameter(world),
        "late": error_of(lambda: late_gradient(world)),
        "disagreement": error_of(lambda: world.agree(min(world.rank, 1), "weights")),
        "broadcast": [world.on_rank_zero(partial(long_value, world, n)) for n in (1, 100_000)],
    }


def long_value(world: World, length: int) -> list[Any]:
    return [world.rank, "x" * length]


def error_of(act: Callable[[], object]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def run(
    world: World,
    network: nn.Module,
    step: Any,
    folder: Path,
    batch: int,
    label: str = "run",
    synchronise_batch_norm: bool = True,
    **options: float,
) -> dict[str, Any]:
    """Trains in double precision on random images, and returns weights, running statistics and rows."""

    def batches(epoch: int, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(skip, STEPS):
            generator = torch.Generator().manual_seed(10 * epoch + number)
            images = torch.randn(batch, 1, 8, 8, generator=generator, dtype=torch.float64)
            labels = torch.randint(10, (batch,), generator=generator)
            yield (
                images.tensor_split(world.world_size)[world.rank],
                labels.tensor_split(world.world_size)[world.rank],
            )

    rows = train(
        network,
        sgd(network, learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
        Plan(EPOCHS, STEPS),
        step=step,
        batches=batches,
        learning_rate=lambda step: 0.1 / (step + 1),
        validate=lambda: {"validated_by": world.rank},
        observe=lambda row: None,
        checkpoints=Checkpoints(folder, label, "key"),
        name="run",
        label=label,
        world=world,
        synchronise_batch_norm=synchronise_batch_norm,
        **options,
    )
    return {"state": network.state_dict(), "rows": rows}


def start_supernet() -> Supernet:
    network, graph = small_network()
    wide = resize(network, graph, {name: options[0] for name, options in graph.grid(SPAN).items()})
    shuffle_weights(wide)
    return Supernet(wide.double(), graph)


def sandwich(supernet: Supernet, seed: int = 0) -> Any:
    return sandwich_rule(
        supernet,
        supernet.graph.grid(SPAN),
        Sandwich(random_widths=2, seed=seed),
        label_smoothing=0.1,
        autocast=autocast(torch.device("cpu"), "fp32"),
    )


def double_supernet(world: World, folder: Path, batch: int) -> dict[str, Any]:
    supernet = start_supernet()
    return run(world, supernet, sandwich(supernet), folder, batch)


def widths_by_rank(world: World, folder: Path) -> dict[str, Any]:
    """Trains with widths by rank. A single process sums the gradients of each rank's images at that rank's widths."""
    supernet = start_supernet()
    steps = [sandwich(supernet, random_width_seed(0, rank)) for rank in range(SIZE)]

    def all_in_one(images: Tensor, labels: Tensor, number: int) -> Tensor:
        shares = zip(images.chunk(SIZE), labels.chunk(SIZE), strict=True)
        losses = [step(*share, number) for step, share in zip(steps, shares, strict=True)]
        for parameter in supernet.parameters():
            assert parameter.grad is not None
            parameter.grad /= SIZE
        return torch.stack(losses).mean()

    step = all_in_one if world.is_single else steps[world.rank]
    return run(world, supernet, step, folder, 12, synchronise_batch_norm=False)


def double_network(world: World, folder: Path, batch: int, **options: float) -> dict[str, Any]:
    network, graph = small_network()
    plain = resize(network, graph, graph.default)
    shuffle_weights(plain)
    step = label_step(plain.double(), F.cross_entropy, autocast(torch.device("cpu"), "fp32"))
    return run(world, plain, step, folder, batch, **options)


def digits(
    context: RunContext, data: PreparedData, folder: Path, widths_by_rank: bool = False, **changes: Any
) -> dict[str, Any]:
    """Trains a supernet and retrains networks as the stages do, in single precision."""
    network, graph = small_network()
    rows, scores = train_supernet(
        network,
        graph,
        data,
        SPAN,
        recipe(epochs=1, **changes),
        context,
        sandwich=Sandwich(random_widths=1, widths_by_rank=widths_by_rank),
        name="net",
        folder=folder / "supernet",
        checkpoints=Checkpoints(folder, "supernet", "key"),
        observe=lambda row: None,
    )
    retrained = retrain(
        network,
        graph,
        graph.default,
        data,
        recipe(epochs=1, **changes),
        context,
        seeds=[0],
        label="net",
        folder=folder / "retrain",
        checkpoints=Checkpoints(folder, "retrain", "key"),
        observe=lambda seed, row: None,
    )
    errors = {which: score.error for which, score in scores.items()}
    return {"supernet": rows, "scores": errors, "retrain": retrained[0]}


def searches(context: RunContext, data: PreparedData, folder: Path) -> dict[str, Any]:
    network, graph = small_network()
    levels = graph.grid(SPAN)
    wide = resize(network, graph, {name: options[0] for name, options in levels.items()})
    shuffle_weights(wide, seed=3)
    supernet = Supernet(wide, graph)
    return {
        name: search(
            supernet,
            levels,
            data,
            context,
            objective=Objective(Costs(supernet.graph), "macs"),
            settings=search_settings(stop=0.5, **options),
            seed=0,
            folder=folder / name,
            checkpoints=Checkpoints(folder, name, "key"),
        )
        for name, options in SEARCHES.items()
    }


def mortal_run(world: World, folder: Path, kill_at: int | None) -> dict[str, Any]:
    """Trains with dropout, killed at step ``kill_at`` and resumed. Also returns the random draws of the last epoch."""
    draws: list[Tensor] = []

    def network() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Dropout(0.5), nn.BatchNorm1d(10)).double()

    def mortal(trained: nn.Module, kill_at: int | None) -> Any:
        step = label_step(trained, F.cross_entropy, autocast(torch.device("cpu"), "fp32"))

        def dying(images: Tensor, labels: Tensor, number: int) -> Tensor:
            if number == kill_at:
                raise KilledError
            if number >= STEPS:
                draws.append(torch.rand(2))
            return step(images, labels, number)

        return dying

    if kill_at is not None:
        first = network()
        with contextlib.suppress(KilledError):
            run(world, first, mortal(first, kill_at), folder, 12)
        draws.clear()
    again = network()
    return run(world, again, mortal(again, None), folder, 12) | {"draws": torch.stack(draws)}


def unused_parameter(world: World) -> dict[str, Any]:
    """Returns averaged gradients: one parameter has a gradient only on the last rank, and one on no rank."""
    network = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("both", "last", "none")})
    network["both"].grad = torch.full((2,), float(world.rank + 1))
    if world.rank == world.world_size - 1:
        network["last"].grad = torch.ones(2)
    loss = GradientSynchronizer(network, world).share(torch.tensor(float(world.rank)), images=world.rank + 1)
    return {"loss": loss, "grads": {name: parameter.grad for name, parameter in network.items()}}


def late_gradient(world: World) -> None:
    network = nn.ParameterDict({name: nn.Parameter(torch.zeros(2)) for name in ("early", "late")})
    shared = GradientSynchronizer(network, world)
    network["early"].grad = torch.ones(2)
    shared.share(torch.zeros(()), 1)
    network["late"].grad = torch.ones(2)
    shared.share(torch.zeros(()), 1)


def work(rank: int, port: int, folder: Path, prepared: Path) -> None:
    """Runs one rank in the environment that torchrun sets."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(SIZE), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(SIZE))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    world = current_world()
    with world.process_group(torch.device("cpu")):
        torch.save(everything(world, folder, prepared), folder / f"rank-{rank}.pt")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "prepared"
    prepared_digits(folder)
    return folder


@pytest.fixture(scope="module")
def together(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder with the files and the results of two ranks."""
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (port, folder, prepared), nprocs=SIZE)
    return folder


@pytest.fixture(scope="module")
def ranks(together: Path) -> list[dict[str, Any]]:
    return [torch.load(together / f"rank-{rank}.pt", weights_only=False) for rank in range(SIZE)]


@pytest.fixture(scope="module")
def alone_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(prepared: Path, alone_in: Path) -> dict[str, Any]:
    return everything(SINGLE, alone_in, prepared)


@pytest.mark.parametrize(
    "job",
    [
        "supernet, even batches",
        "supernet, odd batches",
        "plain network, even batches",
        "plain network, odd batches",
        "plain network, averaged",
        "widths by rank",
    ],
)
def test_training_equals_one_process_with_the_whole_batch(
    job: str, ranks: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    """Results are equal in double precision for 6 + 6 or 7 + 6 images, including losses and running statistics.

    With widths by rank, the single process does the work of both ranks.
    """
    expected = alone[job]
    for figures in (rank[job] for rank in ranks):
        assert figures["state"].keys() == expected["state"].keys()
        for name, value in expected["state"].items():
            torch.testing.assert_close(figures["state"][name], value, rtol=1e-9, atol=1e-11, msg=name)
        for row, wanted in zip(figures["rows"], expected["rows"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-9)
    first, second = (rank[job]["state"] for rank in ranks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    statistics = [name for name in first if name.endswith(("running_mean", "running_var"))]
    assert bool(statistics) == job.startswith("plain")
    assert all(not torch.equal(first[name], torch.full_like(first[name], first[name][0])) for name in statistics)


def test_the_stages_trainings_on_several_processes(
    together: Path, ranks: list[dict[str, Any]], alone_in: Path, alone: dict[str, Any]
) -> None:
    """Metrics and files agree in single precision on digits."""
    for rank in ranks:
        for training in ("supernet", "retrain"):
            for job in ("digits", "digits mixed"):
                for row, wanted in zip(rank[job][training], alone[job][training], strict=True):
                    assert row == pytest.approx(wanted, rel=1e-4)
        assert rank["digits"]["scores"] == alone["digits"]["scores"]
        assert rank["digits by rank"]["supernet"][0]["loss"] != pytest.approx(
            alone["digits"]["supernet"][0]["loss"], rel=1e-4
        )
    assert ranks[0]["digits by rank"] == ranks[1]["digits by rank"]
    assert alone["digits by rank"] == alone["digits"]
    files = [
        {path.relative_to(folder) for path in (folder / "digits").rglob("*") if path.is_file()}
        for folder in (together, alone_in)
    ]
    assert files[0] == files[1]
    network, graph = small_network()
    plain = [resize(network, graph, graph.default) for _ in range(2)]
    for one, folder in zip(plain, (together, alone_in), strict=True):
        load_weights(one, folder / "digits/retrain/seed-0.safetensors")
    for (name, value), wanted in zip(plain[0].state_dict().items(), plain[1].state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_search_gives_the_identical_trajectory(
    name: str, together: Path, ranks: list[dict[str, Any]], alone_in: Path, alone: dict[str, Any]
) -> None:
    assert len(alone["searches"][name]["steps"]) > 5
    for rank in ranks:
        assert rank["searches"][name] == alone["searches"][name]
    file = f"searches/{name}/trajectory.json"
    assert (together / file).read_bytes() == (alone_in / file).read_bytes()


def test_a_resumed_run_of_several_processes_equals_an_uninterrupted_one(ranks: list[dict[str, Any]]) -> None:
    """The network has dropout, whose draws differ between ranks."""
    for rank in ranks:
        whole, resumed = rank["whole run"], rank["resumed run"]
        assert torch.equal(whole["draws"], resumed["draws"][-STEPS:])
        assert all(torch.equal(value, resumed["state"][name]) for name, value in whole["state"].items())
    first, second = (rank["whole run"]["draws"] for rank in ranks)
    assert not bool((first == second).any())


def test_gradients_are_averaged_over_all_images(ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Rank 0 has one image, rank 1 two. A parameter without a gradient on any rank keeps none."""
    for rank in ranks:
        assert float(rank["unused"]["loss"]) == pytest.approx((0 * 1 + 1 * 2) / 3)
        grads = rank["unused"]["grads"]
        torch.testing.assert_close(grads["both"], torch.full((2,), (1 * 1 + 2 * 2) / 3))
        torch.testing.assert_close(grads["last"], torch.full((2,), 2 / 3))
        assert grads["none"] is None
    assert alone["unused"]["grads"]["none"] is None
    assert alone["late"] == ""


def test_no_value_of_another_rank_can_run_code() -> None:
    """Other processes can write to the store, so what is read from it must be data. Here it is a pickle with a call."""

    class Store:
        def check(self, keys: list[str]) -> bool:
            return True

        def get(self, key: str) -> bytes:
            return pickle.dumps(Planted())

    world = World(rank=1, world_size=2)
    world._store = Store()
    with pytest.raises(ValueError, match=r"utf|JSON|decode"):
        world.on_rank_zero(lambda: None)
    assert not PLANTED


def test_values_of_rank_zero_are_broadcast_and_differences_are_errors(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["broadcast"] == [[0, "x"], [0, "x" * 100_000]]
        assert rank["late"].startswith("late had no gradient at the first step and has one now; ")
        for job in ("supernet, even batches", "whole run"):
            assert {row["validated_by"] for row in rank[job]["rows"]} == {0}
    assert ranks[0]["disagreement"] == ""
    assert ranks[1]["disagreement"].startswith("rank 1 of 2 differs from rank 0 in its weights: 1 instead of 0; start")


# Ranks and devices


def test_ranks_are_read_from_torchruns_variables() -> None:
    def ranks_of(**environment: str) -> list[int] | None:
        world = world_from_environment(environment)
        return world and [world.rank, world.world_size, world.local_rank, world.local_world_size]

    assert ranks_of() is None
    assert ranks_of(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", LOCAL_WORLD_SIZE="4") == [5, 8, 1, 4]
    assert ranks_of(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1") == [1, 2, 1, 2]
    for missing in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | {missing: ""}
        with pytest.raises(UserError, match=rf"^RANK is set, but {missing} is ''; .* torchrun"):
            ranks_of(**environment)


def test_several_tasks_of_srun_require_torchrun() -> None:
    """Without it, each task would be a separate run that writes the same files."""
    assert world_from_environment({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) is None  # a batch script: one process
    assert world_from_environment({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    with pytest.raises(UserError, match=r"SLURM_STEP_NUM_TASKS is 8, .* srun .*torchrun .*stages/supernet\.py$"):
        world_from_environment({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"})
    by_torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    world = world_from_environment({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | by_torchrun)
    assert world is not None
    assert (world.rank, world.world_size) == (5, 8)


@pytest.mark.parametrize(
    ("device", "processes", "visible", "expected"),
    [
        ("auto", "auto", 0, 1),
        ("auto", "auto", 4, 4),
        ("cuda", "auto", 2, 2),
        ("cuda:1", "auto", 2, 1),
        ("cpu", "auto", 2, 1),
        ("cpu", 3, 2, 3),
        ("cuda", 2, 4, 2),
        ("auto", 3, 2, "runtime.processes is 3, but 2 CUDA devices are visible; set runtime.processes to auto, or "),
        ("cuda:0", 2, 2, "runtime.processes is 2, but runtime.device 'cuda:0' is one device; set runtime.device to"),
    ],
)
def test_the_number_of_processes_is_the_parameter_or_that_of_devices(
    device: str, processes: Any, visible: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    runtime = Runtime(device=device, processes=processes, threads=1, workers=0, checkpoint_minutes=5)
    if isinstance(expected, int):
        assert rank_count(runtime) == expected
    else:
        with pytest.raises(UserError) as error:
            rank_count(runtime)
        assert str(error.value).startswith(expected)


def test_more_processes_than_devices_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for rank in (0, 3):
        with pytest.raises(
            UserError, match=r"^there are 4 processes on this node, but 2 CUDA devices are visible; sta"
        ):
            select_device("auto", World(rank, 4, rank, 4))


class TestReason:
    """Tests which of several failures the parent process reports."""

    @pytest.fixture
    def failure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ProcessFailure]:
        def make(rank: int, at: int, error: Exception | None = None, exitcode: int = 1) -> ProcessFailure:
            """Returns the failure of a rank that raised ``error`` under @record, or ended without an error file."""
            file = tmp_path / f"{rank}.json"
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
            monkeypatch.setattr(time, "time", lambda: float(at))
            monkeypatch.setattr(faulthandler, "enable", lambda **_: None)  # pytest enables faulthandler itself

            def work() -> None:
                if error is not None:
                    raise error

            with contextlib.suppress(Exception):
                record(work)()
            return ProcessFailure(local_rank=rank, pid=1, exitcode=exitcode, error_file=str(file))

        return make

    def test_another_ranks_error_comes_before_a_lost_connection(self, failure: Callable[..., ProcessFailure]) -> None:
        lost = failure(0, 1, LostRankError("rank 0 lost the others"))
        assert _reason([lost, failure(1, 2, UserError("weights are infinite: no"))], 3) == "weights are infinite: no"
        assert _reason([lost, failure(2, 3, exitcode=-9)], 3).startswith("rank 2 of 3 was killed (SIGKILL)")
        assert _reason([lost, failure(2, 3, exitcode=7)], 3).startswith("rank 2 of 3 ended with exit code 7")
        assert _reason([lost], 3) == "rank 0 lost the others"

    def test_the_first_error_is_reported(self, failure: Callable[..., ProcessFailure]) -> None:
        assert _reason([failure(0, 5, UserError("later")), failure(1, 4, UserError("earlier"))], 2) == "earlier"

    def test_a_defects_traceback_is_printed_once(
        self, failure: Callable[..., ProcessFailure], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert _reason([failure(1, 4, ZeroDivisionError("by 0"))], 3).startswith("rank 1 of 3 failed")
        printed = capsys.readouterr().err
        assert printed.count("Traceback") == 1
        assert printed.endswith("\nZeroDivisionError: by 0\n")

    def test_another_librarys_user_error_is_a_defect(
        self, failure: Callable[..., ProcessFailure], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """torch._dynamo has a class of this name."""
        other = type("UserError", (Exception,), {"__module__": "torch._dynamo.exc"})
        assert _reason([failure(0, 1, other("no"))], 2).startswith("rank 0 of 2 failed")
        assert capsys.readouterr().err.endswith("torch._dynamo.exc.UserError: no\n")


# The stages


def run_stage(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a stage as DVC does, in the working directory."""
    return subprocess.run(
        [sys.executable, f"stages/{arguments[0]}.py", *arguments[1:]],
        env={name: value for name, value in os.environ.items() if name != "DVC_ROOT"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def done(done: Path) -> Path:
    """Returns a copy of a finished project as the working directory, with two processes instead of one."""
    change_params(Path(), {"runtime": {"processes": 2, "device": "cpu"}})
    return done


@pytest.mark.parametrize("arguments", [("supernet",), ("search",), ("retrain", "uniform")])
def test_a_stage_starts_several_processes(arguments: tuple[str, ...], done: Path) -> None:
    """The files are the same and the checkpoints have the same keys, so either can continue from the other."""
    folder = done / "outputs" / "/".join(arguments)
    before = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    locks = {path.name for path in Path("checkpoints").iterdir()}
    shutil.rmtree(folder)
    ended = run_stage(*arguments)
    assert ended.returncode == 0, ended.stderr
    after = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert after.keys() == before.keys()
    assert {path.name for path in Path("checkpoints").iterdir()} == locks
    assert ended.stderr.count("took 0:") == (2 if arguments[0] == "retrain" else 1)  # printed by rank 0, for each seed
    if arguments == ("search",):
        assert after[Path("trajectory.json")] == before[Path("trajectory.json")]
    elif arguments == ("supernet",):
        figures = [json.loads(files[Path("metrics.json")]) for files in (after, before)]
        for which, score in figures[1].items():
            assert figures[0][which] == pytest.approx(score, rel=1e-4)


NET = """
import os, time
import torch
from torch import nn
from autoslim.models.architectures import mobilenet_v2

class Dying(nn.Module):
    def forward(self, x):
        if os.environ.get("RANK") == "1" and len(x) > 4:
            open("died", "w").write(str(time.time()))
            os._exit(7)
        return x

def build(num_classes=10):
    return nn.Sequential(Dying(), mobilenet_v2(num_classes, 8, [[1, 8, 1, 1], [2, 8, 2, 2]], 16, in_channels=1))
"""


def test_the_run_ends_if_a_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(start_project(tmp_path / "project"))
    Path("net.py").write_text(NET)
    model = {"name": "net.py:build", "kwargs": {}, "leaves": ["0"]}
    change_params(Path(), {"model": model, "runtime": {"processes": 2, "device": "cpu"}})
    stage("prepare")
    ended = run_stage("supernet")
    lasted = time.time() - float(Path("died").read_text())
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "error: rank 1 of 2 ended with exit code 7, and the others were stopped; run the stage again to continue from "
        "the last checkpoint"
    ]
    assert lasted < 10
    assert not (tmp_path / "project/outputs").exists()


def test_a_user_error_is_printed_once_as_in_a_single_process(done: Path) -> None:
    wrong = {"supernet": {"optimiser": {"learning_rate": 1e40}}}
    change_params(Path(), wrong | {"runtime": {"processes": 2, "device": "cpu"}})
    ended = run_stage("supernet")
    change_params(Path(), wrong | {"runtime": {"processes": 1, "device": "cpu"}})
    alone = error_of_command("supernet", trains=True)
    assert ended.returncode == 1
    assert [line for line in ended.stderr.splitlines() if not line.startswith("supernet: ")] == [f"error: {alone}"]
