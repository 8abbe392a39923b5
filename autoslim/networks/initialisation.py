"""New weights for a network of any size."""

import math

import torch
from torch import nn


@torch.no_grad()
def initialise(network: nn.Module, seed: int) -> None:
    """Draws all weights anew, in place: the same numbers for the same seed and sizes, on any device.

    Convolutions are normal with variance 2 / (kernel area * output channels), depthwise ones by the same formula,
    linear layers normal with standard deviation 0.01, biases 0, normalisation layers 1 and 0 (as the authors
    and torchvision's MobileNetV2 have it). Running statistics are reset. Other parameters (layer
    scales, say) keep their mean where they are constant; where they are not they are drawn with the mean and deviation
    that they have.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.modules.conv._ConvNd) and "weight" in own:
            deviation = math.sqrt(2 / (math.prod(module.kernel_size) * module.out_channels))
            _normal(own.pop("weight"), 0, deviation, generator)
        elif isinstance(module, nn.Linear) and "weight" in own:
            _normal(own.pop("weight"), 0, 0.01, generator)
        elif "weight" in own and _is_normalisation(module):
            own.pop("weight").fill_(1)
        if (bias := own.pop("bias", None)) is not None:
            bias.zero_()
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.reset_running_stats()
        for parameter in own.values():
            mean, deviation = float(parameter.mean()), float(parameter.std(correction=0))
            if deviation > 1e-6 * abs(mean):
                _normal(parameter, mean, deviation, generator)
            else:
                parameter.fill_(mean)


def _is_normalisation(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm)


def _normal(parameter: nn.Parameter, mean: float, deviation: float, generator: torch.Generator) -> None:
    parameter.copy_(torch.empty(parameter.shape).normal_(mean, deviation, generator=generator))
