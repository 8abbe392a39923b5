"""Prunes a trained network by FastNAS of NVIDIA's ModelOpt: the accuracy lost by each layer alone decides.

ModelOpt recognises torch's own layers. timm's convolutions with "same" padding and its batch norms with activation are
therefore written as these, and the weights get their former names back afterwards. ModelOpt knows budgets of MACs and
parameters only. What each layer loses is measured in the first run and read in those of other budgets.
"""

import copy
from pathlib import Path

import modelopt.torch.prune as mtp
import torch
from allocation import Job
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import get_same_padding
from torch import nn

from autoslim.channels.resize import resize
from autoslim.data.batches import eval_batches, search_chunks
from autoslim.files import file_digest, run_key
from autoslim.training.device import RunContext

TOOL = "fastnas"
CONSTRAINTS = {"macs": "flops", "params": "params"}  # ModelOpt's "flops" are multiply-adds
BATCHES, BATCH = 50, 16  # for batch norms; ModelOpt recalibrates them for every network only if it has 50 batches


def main() -> None:
    job = Job.read()
    (resource, limit), *others = job.limits.items()
    if others or resource not in CONSTRAINTS:
        raise SystemExit(f"{TOOL} has budgets of {' or '.join(CONSTRAINTS)} only, not {', '.join(job.limits)}")
    context = RunContext(torch.device("cpu"), 1, 300.0)
    search = job.params.search
    chunks = search_chunks(
        job.data,
        images=search.images,
        chunk=search.chunk,
        seed=job.params.data.seed,
        device=context.device,
        workers=context.workers,
    )
    batches = eval_batches(
        job.data, "train", batch_size=BATCH, device=context.device, limit=BATCHES * BATCH, shuffled_by=0
    )

    @torch.no_grad()
    def accuracy(network: nn.Module) -> float:
        network.eval()
        right = sum(int((network(images).argmax(1) == targets).sum()) for images, targets in chunks)
        return right / sum(len(targets) for _, targets in chunks)

    network, names = _of_torch(job.network, job.example)
    divisor = job.params.supernet.grid.divisor
    weights = file_digest(Path(str(job.params.model.weights)))
    key = run_key(weights=weights, divisor=divisor, search=[search.images, search.chunk, job.params.data.seed])
    config = mtp.fastnas.FastNASConfig()
    rules = {
        "nn.Conv2d": {"*": {**config["nn.Conv2d"]["*"], "channel_divisor": divisor}},
        "nn.BatchNorm2d": {"*": {**config["nn.BatchNorm2d"]["*"], "feature_divisor": divisor}},
    }
    pruned, _ = mtp.prune(
        model=network,
        mode=[(TOOL, rules)],
        constraints={CONSTRAINTS[resource]: limit},
        dummy_input=job.example,
        config={
            "data_loader": list(batches),
            "score_func": accuracy,
            "collect_func": lambda batch: batch[0],
            "checkpoint": f"../fastnas-{key}.pth",  # what the layers lose, for all budgets
        },
    )
    job.write(TOOL, _with_names(job, pruned, names))


def _of_torch(network: nn.Module, example: torch.Tensor) -> tuple[nn.Module, dict[str, str]]:
    """Returns a copy that computes the same with torch's own layers, and new name -> former name of its modules."""
    sizes: dict[str, tuple[int, int]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: sizes.update({name: args[0].shape[-2:]}))
        for name, module in network.named_modules()
    ]
    expected = network(example)
    for handle in handles:
        handle.remove()
    copied, former = copy.deepcopy(network), {}
    for name, module in network.named_modules():
        if isinstance(module, Conv2dSame):
            (top, bottom), (left, right) = map(_halves, _padding(module, sizes[name]))
            plain: nn.Module = copy.deepcopy(module)
            plain.__class__ = nn.Conv2d  # its padding is 0; the subclass only pads the input
            layers = [nn.ZeroPad2d((left, right, top, bottom)), plain]
        elif isinstance(module, BatchNormAct2d):
            norm = nn.BatchNorm2d(module.num_features, module.eps, module.momentum)
            norm.load_state_dict(module.state_dict())
            layers = [norm, copy.deepcopy(module.act)]
        else:
            continue
        copied.set_submodule(name, nn.Sequential(*layers))
        former[f"{name}.{0 if isinstance(module, BatchNormAct2d) else 1}"] = name
    copied.eval()
    torch.testing.assert_close(copied(example), expected)
    return copied, former


def _padding(module: nn.Conv2d, size: tuple[int, int]) -> list[int]:
    """Returns the padding in rows and columns of TensorFlow's "same" convolution."""
    axes = zip(size, module.kernel_size, module.stride, module.dilation, strict=True)
    return [get_same_padding(*axis) for axis in axes]


def _halves(padding: int) -> tuple[int, int]:
    return padding // 2, padding - padding // 2


def _with_names(job: Job, pruned: nn.Module, former: dict[str, str]) -> nn.Module:
    """Returns the network with its own layers and the weights of ``pruned``."""
    tensors = {}
    for name, tensor in pruned.state_dict().items():
        module, _, own = name.rpartition(".")
        tensors[f"{former.get(module, module)}.{own}"] = tensor
    channels = {}
    for group, described in job.graph.groups.items():
        channels[group] = len(tensors[f"{described.members[0]}.weight"])
    plain = resize(job.network, job.graph, channels, seed=None)
    plain.load_state_dict(tensors)
    return plain


if __name__ == "__main__":
    main()
