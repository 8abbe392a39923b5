"""Supernets that start from a trained network: sources of weights, the checks that they fit, and the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.models as tv
from failures import message_of
from safetensors.torch import load_file, save_file
from small_data import prepared_digits, recipe, run_context, small_network
from small_project import change_params, stage, start_project
from specimens import batch_statistics, shuffle_weights, specimen
from torch import Tensor, nn

from autoslim import resize, sort_channels, trace
from autoslim.channels.copying import copy_with
from autoslim.channels.graph import ChannelGraph
from autoslim.channels.grid import GridSpec
from autoslim.channels.sort import channel_importance
from autoslim.data.prepared import read_info
from autoslim.errors import UserError
from autoslim.models.building import build_network
from autoslim.models.pretrained import check_weights, insert_weights, load_trained_tensors
from autoslim.pipeline.assembly import traced_network
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import PREPARED
from autoslim.supernet.sandwich import Sandwich
from autoslim.supernet.train import initial_supernet, train_supernet
from autoslim.training.checkpoints import Checkpoints

NAME = "autoslim.models.architectures:mobilenet_v2"
IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def trained_network() -> nn.Module:
    """Returns the small network with other weights and running statistics, as after training."""
    network = copy_with(small_network()[0], lambda _, tensor: tensor.clone())
    shuffle_weights(network, seed=3)
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
    return network.eval()


def inserted(file: Path, name: str = NAME) -> tuple[nn.Module, list[str]]:
    network, graph = small_network()
    return insert_weights(network, graph, load_trained_tensors(network, name, {}, str(file)), 0, source="model.weights")


# Files


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 90},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
        lambda state: {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")},
    ],
    ids=["plain", "state_dict", "model", "distributed", "compiled", "old"],
)
def test_a_file_restores_the_network_that_was_saved(tmp_path: Path, suffix: str, wrap: Callable[[Any], Any]) -> None:
    trained = trained_network()
    torch.save(wrap(trained.state_dict()), tmp_path / f"weights{suffix}")
    network, initialised = inserted(tmp_path / f"weights{suffix}")
    assert initialised == []
    with torch.no_grad():
        assert torch.equal(network.eval()(IMAGES), trained(IMAGES))


def test_a_file_of_safetensors_in_half_precision(tmp_path: Path) -> None:
    trained = trained_network()
    halves = {name: t.half() if t.is_floating_point() else t for name, t in trained.state_dict().items()}
    save_file(halves, tmp_path / "weights.safetensors")
    network, _ = inserted(tmp_path / "weights.safetensors")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, halves[name].to(tensor.dtype)), name
        assert tensor.dtype == trained.state_dict()[name].dtype


def test_a_network_whose_parameter_names_start_with_module(tmp_path: Path) -> None:
    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))

        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.module(images)
            return out

    trained, network = Wraps(), Wraps()
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    tensors = load_trained_tensors(network, NAME, {}, str(tmp_path / "w.pt"))
    result, _ = insert_weights(network, trace(network, torch.zeros(1, 1, 8, 8)), tensors, 0, source="w")
    assert torch.equal(result(IMAGES), trained(IMAGES))


def test_a_shared_tensor_may_be_stored_under_one_of_its_names() -> None:
    """safetensors saves shared weights in this way."""

    def shares() -> nn.Sequential:
        network = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 3, 1))
        network[1].weight = network[0].weight
        return network

    trained, network = shares(), shares()
    state = trained.state_dict()
    del state["1.weight"]
    result, _ = insert_weights(network, trace(network, torch.zeros(1, 1, 8, 8)), state, 0, source="w")
    assert torch.equal(result(IMAGES), trained(IMAGES))


class Surprise:
    """An object that runs code when it is unpickled, which must not happen."""

    def __reduce__(self) -> tuple[Any, ...]:
        raise AssertionError


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: path.write_bytes(b"damaged"), "cannot be read: "),
        (
            lambda path: torch.save(nn.Linear(2, 2), path),
            "cannot be read: it is damaged, or it contains Python objects, such as a whole network",
        ),
        (
            lambda path: torch.save({"epoch": 3, "net": {}}, path),
            "contains a mapping of ['epoch', 'net'], ",
        ),
        (lambda path: torch.save([torch.zeros(2)], path), "contains one list, "),
        (lambda path: torch.save({}, path), "contains a mapping of [], "),
    ],
)
def test_a_file_without_weights(tmp_path: Path, write: Callable[[Path], object], expected: str) -> None:
    write(tmp_path / "w.pt")
    message = message_of(lambda: inserted(tmp_path / "w.pt"))
    assert message.startswith(f"model.weights '{tmp_path}/w.pt' {expected}")
    assert message.endswith("save network.state_dict() with safetensors or torch.save")


def test_a_damaged_file_of_safetensors(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"damaged")
    assert "w.safetensors' cannot be read: " in message_of(lambda: inserted(tmp_path / "w.safetensors"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda state: state | {"features.0.0.weight": torch.full((8, 1, 3, 3), torch.nan)},
            ": features.0.0.weight has values that are not finite; ",
        ),
        (
            lambda state: {name: t for name, t in state.items() if name != "features.1.conv.0.0.weight"},
            " lack features.1.conv.0.0.weight; ",
        ),
        (
            lambda state: {name: t for name, t in state.items() if not name.startswith("features.1.conv.0.")},
            " lack features.1.conv.0.0.weight and 4 more tensors; ",
        ),
        (
            lambda state: state | {"head.weight": torch.zeros(3)},
            " have head.weight, which this network does not have; ",
        ),
        (
            lambda state: state | {"features.1.conv.1.weight": torch.zeros(6, 8, 1, 1)},
            " have features.1.conv.1.weight of shape 6x8x1x1, but this network has 8x8x1x1; correct model.kwargs",
        ),
        (
            lambda state: state | {"features.0.0.weight": torch.zeros(8, 3, 3, 3)},
            " have features.0.0.weight of shape 8x3x3x3, but this network has 8x1x3x3; the weights are for images of 3 "
            "channels: set data.channels and model.kwargs",
        ),
        (
            lambda state: state | {"classifier.1.weight": torch.zeros(7, 20), "classifier.1.bias": torch.zeros(7)},
            " have classifier.1.weight of shape 7x20, but this network has 10x16; correct model.kwargs",
        ),
    ],
)
def test_weights_of_another_network(tmp_path: Path, change: Callable[[Any], Any], expected: str) -> None:
    torch.save(change(dict(trained_network().state_dict())), tmp_path / "w.pt")
    assert expected in message_of(lambda: inserted(tmp_path / "w.pt"))


# Other classes


def test_the_layer_of_other_classes_is_initialised(tmp_path: Path) -> None:
    trained = trained_network()
    state = dict(trained.state_dict())
    state |= {"classifier.1.weight": torch.ones(1000, 16), "classifier.1.bias": torch.ones(1000)}
    torch.save(state, tmp_path / "w.pt")
    network, initialised = inserted(tmp_path / "w.pt")
    assert initialised == ["classifier.1"]
    found = network.state_dict()
    weight = found.pop("classifier.1.weight")
    assert (
        abs(weight.std() / 0.01 - 1) < 5 / (2 * weight.numel()) ** 0.5
    )  # the standard deviation of the initialisation
    assert not found.pop("classifier.1.bias").any()
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in found.items())
    assert torch.equal(weight, inserted(tmp_path / "w.pt")[0].get_parameter("classifier.1.weight"))


@pytest.mark.parametrize(
    "name",
    ["mobilenet_v2", "resnet18", "densenet121", "squeezenet1_1", "efficientnet_b0", "convnext_tiny", "googlenet"],
)
def test_the_layers_of_the_classes_are_those_that_depend_on_their_number(name: str) -> None:
    sample = specimen(name)
    kwargs = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        other = getattr(tv, name)(num_classes=7, **kwargs)
    shapes = {key: tensor.shape for key, tensor in sample.network.state_dict().items()}
    state = {key: torch.full(tensor.shape, 0.5) for key, tensor in other.state_dict().items()}
    changed = {key for key, tensor in state.items() if tensor.shape != shapes[key]}
    assert changed
    network = sample.real(sample.graph.default)
    result, initialised = insert_weights(network, sample.graph, state, 0, source="w")
    assert {key.rpartition(".")[0] for key in changed} == set(initialised)
    halves = {key for key, tensor in result.state_dict().items() if bool((tensor == tensor.new_tensor(0.5)).all())}
    assert {key for key in state if not key.endswith("num_batches_tracked")} - halves == changed


# Named weights


def store_for_torchvision(folder: Path, monkeypatch: pytest.MonkeyPatch, file: str, network: nn.Module) -> None:
    """Writes a network's weights to torchvision's cache of downloads."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    (folder / "hub/checkpoints").mkdir(parents=True)
    torch.save(network.state_dict(), folder / "hub/checkpoints" / file)


def loaded(name: str, kwargs: dict[str, Any], weights: str, classes: int, side: int) -> tuple[nn.Module, list[str]]:
    network = build_network(name, kwargs, classes)
    graph = trace(network, torch.zeros(1, 3, side, side))
    return insert_weights(network, graph, load_trained_tensors(network, name, kwargs, weights), 0, source="w")


@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1"])
def test_weights_in_torchvisions_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    theirs = tv.squeezenet1_1()
    shuffle_weights(theirs)
    store_for_torchvision(tmp_path, monkeypatch, "squeezenet1_1-b8a52dc0.pth", theirs)
    images = torch.randn(2, 3, 64, 64)
    same, initialised = loaded("torchvision.models:squeezenet1_1", {}, weights, 1000, 64)
    assert initialised == []
    with torch.no_grad():
        assert torch.equal(same.eval()(images), theirs.eval()(images))
    other, initialised = loaded("torchvision.models:squeezenet1_1", {"weights": None}, weights, 10, 64)
    assert initialised == ["classifier.1"]
    assert torch.equal(other.get_parameter("features.0.weight"), theirs.get_parameter("features.0.weight"))


def test_a_setting_that_comes_with_torchvisions_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GoogLeNet's weights are for images normalised in another way, which its builder sets."""
    theirs = tv.googlenet(init_weights=False, aux_logits=True, transform_input=True)
    shuffle_weights(theirs)
    store_for_torchvision(tmp_path, monkeypatch, "googlenet-1378be20.pth", theirs)
    kwargs: dict[str, Any] = {"aux_logits": False, "init_weights": False}
    assert message_of(lambda: loaded("torchvision.models:googlenet", kwargs, "DEFAULT", 1000, 64)) == (
        "model.weights 'DEFAULT' belong to a network whose transform_input is True, but that of "
        "'torchvision.models:googlenet' is False; set it in model.kwargs"
    )
    same, _ = loaded("torchvision.models:googlenet", kwargs | {"transform_input": True}, "DEFAULT", 1000, 64)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(same.eval()(images), theirs.eval()(images))


def test_auxiliary_heads_that_are_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inception's builder cannot return a trained network without them."""
    with torch.device("meta"):
        theirs = tv.inception_v3(init_weights=False, transform_input=True)
    theirs = theirs.to_empty(device="cpu")
    shuffle_weights(theirs)
    store_for_torchvision(tmp_path, monkeypatch, "inception_v3_google-0cc3c7bd.pth", theirs)
    kwargs = {"aux_logits": False, "init_weights": False, "transform_input": True}
    network, initialised = loaded("torchvision.models:inception_v3", kwargs, "DEFAULT", 10, 80)
    assert initialised == ["fc"]
    for name, tensor in network.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, theirs.state_dict()[name]), name


def test_weights_in_timms_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("huggingface_hub")
    theirs = timm.create_model("resnet10t")
    shuffle_weights(theirs)
    cache = tmp_path / "models--timm--resnet10t.c3_in1k"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("0" * 40)
    (cache / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(theirs.state_dict(), cache / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    for weights in ("pretrained", "c3_in1k"):
        network, initialised = loaded("timm:resnet10t", {}, weights, 10, 32)
        assert initialised == ["fc"]
        assert torch.equal(network.get_parameter("conv1.0.weight"), theirs.get_parameter("conv1.0.weight"))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "none"))
    message = message_of(lambda: loaded("timm:resnet10t", {}, "pretrained", 10, 32))
    assert message.startswith("model.weights 'pretrained' of 'timm:resnet10t' are not cached and cannot be downloaded")


def test_input_channels_that_timm_would_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm would silently sum the weights of the colour channels."""
    timm = pytest.importorskip("timm")
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *args, **kwargs: None)
    network = build_network("timm:resnet10t", {"in_chans": 1}, 10)
    tensors = load_trained_tensors(network, "timm:resnet10t", {"in_chans": 1}, "pretrained")
    graph = trace(network, torch.zeros(1, 1, 32, 32))
    assert (
        "conv1.0.weight of shape 24x3x3x3, but this network has 24x1x3x3; the weights are for images of 3 channels"
        in message_of(lambda: insert_weights(network, graph, tensors, 0, source="w"))
    )


def test_weights_that_cannot_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = message_of(lambda: loaded("torchvision.models:squeezenet1_1", {}, "DEFAULT", 10, 64))
    assert message.startswith("model.weights 'DEFAULT' of 'torchvision.models:squeezenet1_1' are not cached")
    assert "cannot be downloaded (Name or service not known)" in message


def test_named_weights_of_another_width(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_for_torchvision(tmp_path, monkeypatch, "mobilenet_v2-7ebf99e0.pth", tv.mobilenet_v2())
    file = tmp_path / "hub/checkpoints/mobilenet_v2-7ebf99e0.pth"
    file.rename(file.with_name(Path(tv.MobileNet_V2_Weights.DEFAULT.url).name))
    message = message_of(lambda: loaded("torchvision.models:mobilenet_v2", {"width_mult": 0.5}, "DEFAULT", 10, 32))
    assert "do not fit model.kwargs {'width_mult': 0.5}: " in message


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        (
            "torchvision.models:resnet50",
            "BEST",
            "'torchvision.models:resnet50' has weights IMAGENET1K_V1, IMAGENET1K_",
        ),
        (NAME, "DEFAULT", f"'{NAME}' has no named weights; set model.weights to the path"),
        (NAME, "weights.ckpt", "model.weights 'weights.ckpt' is not a file (.safetensors, .pt, .pth, .bin), and "),
        (NAME, "gone.pt", "model.weights names the file 'gone.pt', which does not exist; "),
    ],
)
def test_weights_that_do_not_exist(name: str, weights: str, expected: str) -> None:
    assert expected in message_of(lambda: check_weights(name, weights))


def test_unknown_tags_of_timm() -> None:
    pytest.importorskip("timm")
    check_weights("timm:resnet18", "a1_in1k")
    check_weights("timm:resnet18.a1_in1k", "pretrained")
    assert "'timm:resnet18' has weights pretrained, a1_in1k, " in message_of(
        lambda: check_weights("timm:resnet18", "DEFAULT")
    )


# The supernet


def in_batches(network: nn.Module, images: Tensor) -> Tensor:
    """Returns the network's output with batch statistics, as in a supernet."""
    with torch.no_grad():
        out: Tensor = batch_statistics(network)(images)
    return out


def test_a_supernet_starts_with_the_function_of_the_trained_network() -> None:
    _, graph = small_network()
    trained = trained_network()
    supernet = initial_supernet(trained, graph, graph.default, 5, trained=True).eval()
    with torch.no_grad():
        assert torch.equal(supernet(IMAGES), in_batches(trained, IMAGES))


def test_a_narrower_supernet_starts_from_the_most_important_channels() -> None:
    _, graph = small_network()
    trained = trained_network()
    ordered = sort_channels(trained, graph, "l1")
    widest = graph.scaled(0.75, 2)
    assert any(widest[name] < group.size for name, group in graph.groups.items())
    supernet = initial_supernet(ordered, graph, widest, 5, trained=True).eval()
    highest = channel_importance(trained, graph, "l1")["features.0.0"].argsort(descending=True)[
        : widest["features.0.0"]
    ]
    stem = "features.0.0.weight"
    assert torch.equal(supernet.network.get_parameter(stem), trained.get_parameter(stem)[highest])
    with torch.no_grad():
        assert torch.equal(supernet(IMAGES), in_batches(resize(ordered, graph, widest), IMAGES))


def test_a_supernet_without_trained_weights_starts_from_its_seed() -> None:
    network, graph = small_network()
    supernets = [initial_supernet(n, graph, graph.default, 5, trained=False) for n in (network, trained_network())]
    one, other = (supernet.network.state_dict() for supernet in supernets)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_supernet_wider_than_the_trained_network_raises(tmp_path: Path) -> None:
    network, graph = small_network()
    assert message_of(
        lambda: train_supernet(
            network,
            graph,
            prepared_digits(tmp_path / "data"),
            GridSpec(width=1.1, narrowest=0.25, steps=4, divisor=2),
            recipe(),
            run_context(),
            trained=True,
            sandwich=Sandwich(random_widths=1),
            name="test",
            folder=tmp_path,
            checkpoints=Checkpoints(tmp_path, "run", "key"),
            observe=lambda row: None,
        )
    ) == (
        "the supernet has 18 channels in group features.4.0, but model.weights have 16; set supernet.width to 1.0, or "
        "lower supernet.width and supernet.grid.divisor"
    )


# The stage


MODEL: dict[str, Any] = {"weights": "trained.pt"}
STILL = {"learning_rate": 1e-30}  # too small to change any weight


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns a project with prepared data as the working directory. Its supernet stage depends on trained.pt."""
    monkeypatch.delenv("DVC_ROOT", raising=False)
    monkeypatch.chdir(start_project(tmp_path / "project"))
    dep = "autoslim/pipeline/supernet.py,"
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace(dep, f"{dep} trained.pt,"))
    stage("prepare")
    return Path.cwd()


def train_and_save(classes: int = 10) -> tuple[nn.Module, ChannelGraph]:
    """Writes trained.pt for the project's network, and returns the network and its graph."""
    network, graph = traced_network(load_params().model, read_info(PREPARED))
    shuffle_weights(network, seed=9)
    state = dict(network.state_dict())
    if classes != 10:
        state["classifier.1.weight"] = torch.ones(classes, state["classifier.1.weight"].shape[1])
        state["classifier.1.bias"] = torch.ones(classes)
    torch.save(state, "trained.pt")
    return network, graph


@pytest.mark.parametrize("sort", [None, "l1", "bn_scale"])
def test_the_stage_starts_from_the_file(project: Path, sort: Any) -> None:
    network, graph = train_and_save()
    change_params(project, {"model": MODEL, "supernet": {"width": 1.0, "sort": sort, "optimiser": STILL}})
    stage("prepare")
    output = stage("supernet")
    groups = f"{len(graph.groups)} of {len(graph.groups)} groups sorted by {sort}"
    assert "model.weights 'trained.pt'" in output
    assert (groups in output) == bool(sort)
    weights = load_file("outputs/supernet/weights.safetensors")
    expected = sort_channels(network, graph, sort) if sort else network
    for name, parameter in expected.named_parameters():
        assert torch.equal(weights[name], parameter.detach()), name
    result = initial_supernet(network, graph, graph.default, 0, trained=True)
    result.network.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(result.eval()(IMAGES), in_batches(network, IMAGES), rtol=1e-4, atol=1e-4)
    assert bool(sort) != all(torch.equal(weights[name], p.detach()) for name, p in network.named_parameters())


def test_the_stage_prints_the_layers_that_are_initialised(project: Path) -> None:
    train_and_save(classes=1000)
    change_params(project, {"model": MODEL, "supernet": {"width": 0.9, "optimiser": STILL}})
    output = stage("supernet")
    assert "model.weights 'trained.pt'" in output
    assert "classifier.1" in output
    assert 0 < load_file("outputs/supernet/weights.safetensors")["classifier.1.weight"].abs().mean() < 0.1


def test_another_file_is_another_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run must not continue from checkpoints of another file."""
    network, _ = train_and_save()
    change_params(project, {"model": MODEL, "supernet": {"width": 1.0}})
    folders = []

    def stop(*_: Any, checkpoints: Checkpoints, **__: Any) -> None:
        folders.append(checkpoints.folder)
        raise UserError("stop here")

    monkeypatch.setattr("autoslim.pipeline.supernet.train_supernet", stop)
    for _ in range(2):
        with pytest.raises(SystemExit):
            stage("supernet")
    torch.save(shifted(network), "trained.pt")
    with pytest.raises(SystemExit):
        stage("supernet")
    assert folders[0] == folders[1] != folders[2]


def shifted(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor + 1 for name, tensor in network.state_dict().items()}
