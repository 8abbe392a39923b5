"""Traces networks of torchvision and timm, and writes docs/networks.md.

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
from autoslim.errors import UserError
from autoslim.models.building import find_constructor

TABLE = Path(__file__).parent.parent / "docs" / "networks.md"
TORCHVISION = "torchvision.models:"
SEGMENTATION = "torchvision.models.segmentation:"
VIDEO = "torchvision.models.video:"
QUANTIZATION = "torchvision.models.quantization:"
DETECTION = "torchvision.models.detection:"
PART = "backbone"
"""The part of a detector that is traced."""

_TIMM_CNNS = (
    "resnet50d resnetv2_50 seresnet50 ecaresnet50d skresnet18 resnest14d res2net50_26w_4s dpn68b "
    "efficientnet_b0 tf_efficientnetv2_s mobilenetv3_large_100 mobilenetv4_conv_small mixnet_s rexnet_100 ghostnet_100 "
    "convnext_nano convnextv2_nano regnety_032 eca_nfnet_l0 densenet121 hrnet_w18_small cspresnet50 dla34 repvgg_a0 "
    "inception_v4 legacy_xception vgg16_bn "
    "efficientnet_lite0 efficientnetv2_rw_t mobilenetv1_100 mobilenetv2_100 fbnetc_100 hardcorenas_a tinynet_e "
    "lcnet_050 repghostnet_050 regnetx_004 resnet26t resnetrs50 resnetblur18 resnext50_32x4d tresnet_m nf_resnet26 "
    "gernet_s mobileone_s0 ese_vovnet19b_dw selecsls42b hgnetv2_b0 darknet53 cspdarknet53 xception41 "
    "convmixer_768_32 poolformer_s12 inception_next_tiny starnet_s1 fastvit_t8 repvit_m0_9 fasternet_t0"
)
_TIMM_HYBRIDS = "mobilevit_s coatnet_nano_rw_224 edgenext_xx_small efficientvit_b0 levit_conv_128s visformer_tiny"
_SEGMENTATION = (
    "fcn_resnet50 fcn_resnet101 deeplabv3_resnet50 deeplabv3_resnet101 deeplabv3_mobilenet_v3_large "
    "lraspp_mobilenet_v3_large"
)
_VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d"
_QUANTIZATION = "googlenet inception_v3 mobilenet_v2 mobilenet_v3_large resnet18 resnet50 shufflenet_v2_x0_5"
_DETECTION = (
    "fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_320_fpn retinanet_resnet50_fpn fcos_resnet50_fpn "
    "ssdlite320_mobilenet_v3_large"
)
_SIDES = {"inception_v3": 299, "inception_v4": 299, "legacy_xception": 299, "xception41": 299, "mobilevit_s": 256}


def torchvision_names() -> list[str]:
    """Returns torchvision's classification networks without the transformers."""
    transformers = ("vit", "swin", "maxvit")
    names = torchvision.models.list_models(module=torchvision.models)
    return [TORCHVISION + name for name in names if not name.startswith(transformers)]


def hybrid_names() -> list[str]:
    """Returns networks of convolutions and attention."""
    return [f"timm:{name}" for name in _TIMM_HYBRIDS.split()]


def sections() -> dict[str, list[str]]:
    """Returns the import paths of all networks that are traced, under the titles of the tables."""
    return {
        "Classification: torchvision": torchvision_names(),
        "Classification: timm": [f"timm:{name}" for name in _TIMM_CNNS.split()],
        "Convolutions with attention: timm": hybrid_names(),
        "Quantizable networks: torchvision": [QUANTIZATION + name for name in _QUANTIZATION.split()],
        "Segmentation: torchvision": [SEGMENTATION + name for name in _SEGMENTATION.split()],
        "Video: torchvision": [VIDEO + name for name in _VIDEO.split()],
        "Backbones of detectors: torchvision": [DETECTION + name for name in _DETECTION.split()],
    }


def all_names() -> list[str]:
    return [name for names in sections().values() for name in names]


def refused_names() -> list[str]:
    """Returns networks that cannot be traced as a whole."""
    return [DETECTION + name for name in _DETECTION.split()]


def label(name: str) -> str:
    """Returns the name of a network in the tables: that of its constructor, without torchvision's package."""
    return name.removeprefix(TORCHVISION).removeprefix("torchvision.models.")


def input_shape(name: str) -> tuple[int, ...]:
    """Returns the shape of the input without the batch: (C, H, W), or (C, T, H, W) for videos."""
    if name.startswith(VIDEO):
        side = 224 if name.endswith("s3d") else 112
        return (3, 16, side, side)
    side = 320 if name.startswith(DETECTION) else _SIDES.get(name.partition(":")[2], 224)
    return (3, side, side)


def structure(name: str) -> nn.Module:
    """Builds a network on the meta device, which avoids the time to initialise it."""
    arguments: dict[str, Any] = {}
    if name.startswith((SEGMENTATION, DETECTION)):
        arguments["weights_backbone"] = None
    elif name.startswith("torchvision") and name.endswith((":googlenet", ":inception_v3")):
        arguments["init_weights"] = False  # torchvision initialises them with scipy and warns
    with _EmptyOnMeta():
        network: nn.Module = find_constructor(name)(**arguments)
    return network.to("meta")


def detector(name: str) -> nn.Module:
    """Builds a detector on the CPU, where it has to run once to get the input of its backbone."""
    side = input_shape(name)[-1]
    sizes = {} if "ssd" in name else {"min_size": side, "max_size": side}
    proposals = {"rpn_post_nms_top_n_test": 10} if "rcnn" in name else {}  # fewer run faster
    network: nn.Module = find_constructor(name)(weights_backbone=None, **sizes, **proposals)
    return network.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Creates only empty tensors on the meta device, because some networks compute their widths with tensors."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **{**(kwargs or {}), **({"device": "meta"} if func is torch.empty else {})})


def traced(name: str) -> tuple[nn.Module, ChannelGraph]:
    """Returns a network on the meta device with its graph, for a detector that of its backbone."""
    shape = input_shape(name)
    if name.startswith(DETECTION):
        network = detector(name)
        graph = trace(network, [torch.zeros(shape)], part=PART)
        return network.to("meta"), graph
    network = structure(name)
    return network, trace(network, torch.empty(1, *shape))


def refusal(name: str) -> str:
    """Returns the reason why a detector cannot be traced as a whole, without positions and the remedy.

    Raises:
        ValueError: It can be traced.
    """
    try:
        trace(detector(name), torch.zeros(1, *input_shape(name)))
    except UserError as error:
        return _without_positions(str(error)).partition("; ")[0]
    raise ValueError(f"{name} can be traced as a whole; move it to another table")


def row(name: str, graph: ChannelGraph) -> str:
    """Returns a row of the table without the seconds."""
    reasons = Counter(_short(reason) for reason in layers_not_prunable(graph).values())
    cells = (
        label(name),
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
    return _without_positions(reason).partition(":")[0]


def _without_positions(reason: str) -> str:
    return re.sub(r" at \S+:\d+| \(\S+:\d+\)", "", reason)


def main() -> None:
    torch.set_num_threads(1)
    shares: dict[str, float] = {}
    text = ""
    for title, names in sections().items():
        lines = []
        for name in names:
            structure(name)  # imports the network before the time is measured
            start = time.process_time()
            _, graph = traced(name)
            lines.append(f"{row(name, graph)} {time.process_time() - start:.1f} |\n")
            shares[name] = slimmable_share(graph, graph.default)
            print(lines[-1], end="", flush=True)
        text += f"\n## {title}\n\n{_HEADER}{''.join(lines)}"
    cnns = [share for name, share in shares.items() if name not in hybrid_names()]
    text += _REFUSED_ABOVE + "".join(f"| {label(name)} | {refusal(name)} |\n" for name in refused_names())
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
    above = _ABOVE.format(
        python=platform.python_version(),
        versions=versions,
        all=len(shares),
        cnns=len(cnns),
        reached=sum(share >= 0.95 for share in cnns),
    )
    TABLE.write_text(above + text)


_ABOVE = """# Supported networks

These tables list {all} networks as `autoslim` traces them: all classification CNNs and segmentation networks of
torchvision, its video and quantizable CNNs, the backbones of its detectors, and some of timm's most used networks.
In {reached} of the {cnns} CNNs, slimming reaches at least 95 % of the MACs.

`python benchmarks/networks.py` wrote them with {versions},
Python {python}, on one of 2 cores. `tests/tracing/test_contract.py` compares all columns but the last with the code.
It also verifies for each network that an extracted subnet computes the same as the supernet at that configuration, and
that its counted costs are those measured when it runs.

MACs (of one image of 224x224 if nothing else is said) and parameters are in millions. Inception and Xception read
299x299, MobileViT 256x256, detectors 320x320, and video networks 16 frames of 112x112 (S3D: 224x224). The share is that
of the MACs in layers whose input or output channels depend on a group. The next column is the share of the MACs that
remain at half the width. A layer is not prunable if some of its output channels cannot be removed; layers that compute
the network's output are not counted, nor are those that compute the output of a detector's backbone. Seconds are the
time of tracing on one thread; a detector is also built and run in this time.
"""
_HEADER = """\
| network | groups | MACs | parameters | share (%) | at half width (%) | layers not prunable, and why | seconds |
|---|---:|---:|---:|---:|---:|---|---:|
"""
_REFUSED_ABOVE = """
## Networks that cannot be traced

As a whole, these cannot be traced. [Parts of them can](guide/models.md#inputs-outputs-and-parts-of-a-network).

| network | reason |
|---|---|
"""


if __name__ == "__main__":
    main()
