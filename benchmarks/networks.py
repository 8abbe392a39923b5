"""Traces all classification CNNs of torchvision and some of timm's most used ones, and writes docs/networks.md.

    python benchmarks/networks.py

It requires timm (part of the extra `dev`) and takes a few minutes. `tests/tracing/test_contract.py` compares all
columns except the seconds with the code.
"""

import platform
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode

from autoslim import trace
from autoslim.channels.graph import ChannelGraph, layers_not_prunable, slimmable_share
from autoslim.models.building import find_constructor

TABLE = Path(__file__).parent.parent / "docs" / "networks.md"
TORCHVISION = "torchvision.models:"
TIMM = (
    "resnet50d resnetv2_50 seresnet50 ecaresnet50d skresnet18 resnest14d res2net50_26w_4s dpn68b "
    "efficientnet_b0 tf_efficientnetv2_s mobilenetv3_large_100 mobilenetv4_conv_small mixnet_s rexnet_100 ghostnet_100 "
    "convnext_nano convnextv2_nano regnety_032 eca_nfnet_l0 densenet121 hrnet_w18_small cspresnet50 dla34 repvgg_a0 "
    "inception_v4 legacy_xception vgg16_bn"
)
_SIDES = {"inception_v3": 299, "inception_v4": 299, "legacy_xception": 299}


def torchvision_names() -> list[str]:
    """Returns torchvision's classification networks without the transformers."""
    transformers = ("vit", "swin", "maxvit")
    names = torchvision.models.list_models(module=torchvision.models)
    return [TORCHVISION + name for name in names if not name.startswith(transformers)]


def all_names() -> list[str]:
    return torchvision_names() + [f"timm:{name}" for name in TIMM.split()]


def input_side(name: str) -> int:
    return _SIDES.get(name.partition(":")[2], 224)


def structure(name: str) -> nn.Module:
    """Builds a network on the meta device, which avoids the time to initialise it."""
    slow = (f"{TORCHVISION}googlenet", f"{TORCHVISION}inception_v3")
    arguments = {"init_weights": False} if name in slow else {}  # torchvision initialises them with scipy and warns
    with _EmptyOnMeta():
        network: nn.Module = find_constructor(name)(**arguments)
    return network.to("meta")


class _EmptyOnMeta(TorchFunctionMode):
    """Creates only empty tensors on the meta device, because some networks compute their widths with tensors."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def traced(name: str) -> tuple[nn.Module, ChannelGraph]:
    network, side = structure(name), input_side(name)
    return network, trace(network, torch.empty(1, 3, side, side))


def row(name: str, graph: ChannelGraph) -> str:
    """Returns a row of the table without the seconds."""
    reasons = Counter(_short(reason) for reason in layers_not_prunable(graph).values())
    cells = (
        name.removeprefix(TORCHVISION),
        len(graph.groups),
        f"{graph.macs() / 1e6:,.1f}",
        f"{graph.params() / 1e6:.2f}",
        f"{100 * slimmable_share(graph, graph.default):.1f}",
        f"{100 * graph.macs(graph.scaled(0.5, 1)) / graph.macs():.1f}",
        "; ".join(f"{count}: {reason}" for reason, count in reasons.most_common()) or "none",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def _short(reason: str) -> str:
    """Removes positions in the source, and everything after a colon."""
    return re.sub(r" at \S+:\d+", "", reason).partition(":")[0]


def main() -> None:
    torch.set_num_threads(1)
    lines = []
    for name in all_names():
        structure(name)  # imports the network before the time is measured
        start = time.process_time()
        _, graph = traced(name)
        lines.append(f"{row(name, graph)} {time.process_time() - start:.1f} |")
        print(lines[-1])
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    TABLE.write_text(_ABOVE.format(python=platform.python_version(), versions=versions) + "\n".join(lines) + "\n")


_ABOVE = """# Supported networks

This table lists all classification CNNs of torchvision and some of timm's most used ones, as `autoslim` traces them.
`python benchmarks/networks.py` wrote it with {versions},
Python {python}, on one of 2 cores. `tests/tracing/test_contract.py` compares all columns but the last with the code.
It also verifies for each network that an extracted subnet computes the same as the supernet at that configuration, and
that its counted costs are those measured when it runs.

MACs (of one image of 224x224; 299x299 for Inception and Xception) and parameters are in millions. The share is that of
the MACs in layers whose input or output channels depend on a group. The next column is the share of the MACs that
remain at half the width. A layer is not prunable if some of its output channels cannot be removed; layers that compute
the logits are not counted. Seconds are the time of tracing on one thread.

| network | groups | MACs | parameters | share (%) | at half width (%) | layers not prunable, and why | seconds |
|---|---:|---:|---:|---:|---:|---|---:|
"""


if __name__ == "__main__":
    main()
