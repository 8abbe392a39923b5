"""The operations that tracing knows, by class for modules and by name for functions and methods."""

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
LEAVES = (*CONVOLUTIONS, nn.Linear, *NORMALISATIONS, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
"""Modules, with their subclasses, that the rules know as a whole and that tracing does not look into."""

AVERAGE_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d)
SPATIAL_MODULES = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._LPPoolNd,
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
    nn.modules.padding._CircularPadNd,
    nn.Upsample,
)
MOVEMENT_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold)

ELEMENTWISE_HOMES = frozenset({"torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.linear"})
"""Where torch keeps the modules that act on each element, but for these:"""
NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Bilinear, nn.GLU, nn.Linear)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    # arithmetic
    "add sub mul div truediv iadd isub imul itruediv radd rsub rmul add_ sub_ mul_ div_ pow neg abs sign square sqrt "
    "rsqrt exp log addcmul addcdiv lerp maximum minimum where clamp clamp_ clamp_min clamp_max clip normalize "
    # activations
    "relu relu_ relu6 leaky_relu elu selu celu gelu silu silu_ mish hardtanh hardtanh_ hardswish hardsigmoid sigmoid "
    "sigmoid_ tanh softplus softsign logsigmoid softmax log_softmax "
    # noise
    "dropout dropout_ dropout2d alpha_dropout feature_dropout stochastic_depth bernoulli bernoulli_ "
    "rand_like randn_like zeros_like ones_like empty_like full_like "
    # the same numbers elsewhere or in another format
    "contiguous clone detach identity to float half bfloat16 double type_as"
)
MOVEMENT = _names(
    "view view_as reshape reshape_as flatten unflatten permute transpose swapaxes movedim t squeeze unsqueeze "
    "expand expand_as repeat repeat_interleave roll flip cat concat concatenate stack "
    "chunk split tensor_split unbind narrow select getitem channel_shuffle pixel_shuffle pixel_unshuffle"
)
PASSING = _names(
    "contiguous detach identity to float half bfloat16 double type_as dropout dropout2d alpha_dropout feature_dropout "
    "stochastic_depth"
)
"""What may hand back its very input: nothing to do."""
CREATIONS = _names("new_empty new_zeros new_ones new_full new_tensor")
JOINS = _names("cat concat concatenate")
SPLITS = _names("chunk split tensor_split")
SPATIAL = _names(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d lp_pool2d boolean_dispatch "
    "interpolate pad"
)
AVERAGING = _names("avg_pool2d adaptive_avg_pool2d")
REDUCTIONS = _names("mean sum amax amin max min std var norm logsumexp")
FUNCTIONAL_NORMS = _names("layer_norm batch_norm instance_norm prelu")
MATRIX_PRODUCTS = _names("matmul bmm")
