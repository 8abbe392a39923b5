"""Classifies operations by what they do to the channels of their inputs."""

from collections.abc import Mapping

from torch import fx, nn
from torch.utils._pytree import tree_leaves

from autoslim.channels.graph import ChannelGraph
from autoslim.channels.groups import Axis


def operation(node: fx.Node) -> str:
    """Returns the name of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
LAST_AXIS_NORMS = (nn.LayerNorm, nn.RMSNorm)
RECURRENT = (nn.LSTM, nn.GRU, nn.RNN)
LEAVES = (
    *CONVOLUTIONS,
    *TRANSPOSED_CONVOLUTIONS,
    nn.Linear,
    *NORMALISATIONS,
    *LAST_AXIS_NORMS,
    nn.GroupNorm,
    nn.PReLU,
)
"""Modules with a specific rule. torch.fx traces them and their subclasses as leaf modules."""

AVERAGE_POOLS = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)
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
UNPOOLING_MODULES = (nn.MaxUnpool1d, nn.MaxUnpool2d, nn.MaxUnpool3d)
MOVEMENT_MODULES = (nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold)

ELEMENTWISE_HOMES = frozenset({"torch.nn.modules.activation", "torch.nn.modules.dropout", "torch.nn.modules.linear"})
"""The modules of torch that define elementwise layers, except for these:"""
NOT_ELEMENTWISE = (nn.MultiheadAttention, nn.Bilinear, nn.GLU, nn.Linear)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ELEMENTWISE = _names(
    # arithmetic
    "add sub mul div truediv iadd isub imul itruediv radd rsub rmul add_ sub_ mul_ div_ pow neg abs sign square sqrt "
    "rsqrt reciprocal exp expm1 log log2 log10 log1p sin cos tan atan erf floor ceil round trunc fmod remainder "
    "addcmul addcdiv lerp maximum minimum fmax fmin where masked_fill masked_fill_ clamp clamp_ clamp_min clamp_max "
    "clip normalize nan_to_num "
    # comparisons
    "eq ne lt le gt ge logical_not logical_and logical_or logical_xor invert and_ or_ xor isnan isinf isfinite "
    # activations
    "relu relu_ relu6 leaky_relu elu selu celu gelu silu silu_ mish hardtanh hardtanh_ hardswish hardsigmoid sigmoid "
    "sigmoid_ tanh softplus softsign logsigmoid softmax log_softmax "
    # noise
    "dropout dropout_ dropout1d dropout2d dropout3d alpha_dropout feature_dropout stochastic_depth "
    "bernoulli bernoulli_ rand_like randn_like zeros_like ones_like empty_like full_like "
    # copies and conversions of dtype or device
    "contiguous clone detach identity to float half bfloat16 double bool int long type_as"
)
CONVERSIONS = _names("to type_as")
"""Operations that take only the dtype and the device from a second tensor."""
MOVEMENT = _names(
    "view view_as reshape reshape_as flatten unflatten permute transpose swapaxes movedim t squeeze unsqueeze "
    "expand expand_as repeat repeat_interleave roll flip cat concat concatenate stack "
    "chunk split tensor_split unbind narrow select getitem channel_shuffle pixel_shuffle pixel_unshuffle"
)
PASSING = _names(
    "contiguous detach identity to float half bfloat16 double bool int long type_as "
    "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout stochastic_depth"
)
"""Operations that may return their input unchanged."""
CREATIONS = _names("new_empty new_zeros new_ones new_full new_tensor")
EXPANSIONS = _names("expand repeat")
JOINS = _names("cat concat concatenate")
SPLITS = _names("chunk split tensor_split")
SPATIAL = _names(
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "max_pool1d max_pool2d max_pool3d "
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
    "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d lp_pool3d boolean_dispatch "
    "interpolate pad"
)
SELECTIONS = _names("index_select")
UNPOOLING = _names("max_unpool1d max_unpool2d max_unpool3d")
AVERAGING = _names("avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d")
REDUCTIONS = _names("mean sum amax amin max min std var std_mean var_mean norm logsumexp")
EXTREMA = _names("max min")
"""Reductions that compare two tensors element by element if they are given two."""
GATES = _names("glu")
FUNCTIONAL_NORMS = _names("layer_norm rms_norm batch_norm instance_norm prelu")
FUNCTIONAL_CONVOLUTIONS = _names("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
MATRIX_PRODUCTS = _names("matmul bmm")


_MIXING_MODULES = (nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d, *NOT_ELEMENTWISE)
_MIXING = frozenset({"softmax", "log_softmax", "normalize"})
_LOCAL = (ELEMENTWISE - _MIXING) | SPATIAL | SELECTIONS | MOVEMENT | REDUCTIONS
_LOCAL_MODULES = (
    *NORMALISATIONS,  # batch norm and similar layers normalise each channel separately
    nn.PReLU,
    *SPATIAL_MODULES,
    *MOVEMENT_MODULES,
)
# Of the operations above, these may return their input or a view of it.
_PASSING = MOVEMENT | PASSING
_COMPUTING = ELEMENTWISE | SPATIAL | SELECTIONS | UNPOOLING | REDUCTIONS | GATES | FUNCTIONAL_NORMS
_KNOWN = _COMPUTING | _PASSING
_FRESH = _COMPUTING - _PASSING


def is_local(node: fx.Node, group: str, graph: ChannelGraph, modules: Mapping[str, nn.Module]) -> bool:
    """Returns whether each channel of ``group`` in the output depends only on the same channel of the inputs.

    Its output with fewer channels is then a slice of its output with all of them. Returns False for unknown
    operations.
    """
    dimension, axis = graph.activations.get(node.name, (0, ()))
    if not _holds(axis, group):
        return False
    if node.op == "get_attr":
        return True
    if node.op != "call_module":
        slides = operation(node) in SPATIAL and dimension > 1
        return operation(node) in _LOCAL and not slides
    module = modules[str(node.target)]
    sliding = (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, *SPATIAL_MODULES, *NORMALISATIONS)
    if isinstance(module, sliding) and dimension > 1:
        return False  # it slides along the channels
    if isinstance(module, (*CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS, nn.Linear)):
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return False  # normalising the weight may mix its channels
        axes = graph.tensors.get(f"{node.target}.weight", ((), ()))
        dense = getattr(module, "groups", 1) == 1
        transposed = isinstance(module, TRANSPOSED_CONVOLUTIONS)
        return not (dense and _holds(axes[0 if transposed else 1], group))
    return isinstance(module, _LOCAL_MODULES) or (_is_elementwise(module) and not isinstance(module, _MIXING_MODULES))


def overwritten(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """Returns the inputs that the operation may overwrite."""
    first = node.all_input_nodes[:1]
    if node.op == "call_module":
        module = modules[str(node.target)]
        if not _is_known(module):
            return node.all_input_nodes
        return first if getattr(module, "inplace", False) else []
    if node.op not in ("call_function", "call_method"):
        return []
    name = operation(node)
    if "out" in node.kwargs or (node.op == "call_function" and name not in _KNOWN):
        return node.all_input_nodes
    in_place = name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv")
    return first if in_place or any(argument is True for argument in tree_leaves((node.args, node.kwargs))) else []


def may_view(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Returns whether the operation's output may share memory with an input."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        returns_input = isinstance(module, (*MOVEMENT_MODULES, nn.Identity, nn.modules.dropout._DropoutNd))
        return returns_input or not _is_known(module)
    return node.op in ("call_function", "call_method") and operation(node) not in _FRESH


def _is_known(module: nn.Module) -> bool:
    known = (*LEAVES, *SPATIAL_MODULES, *UNPOOLING_MODULES, *MOVEMENT_MODULES)
    return isinstance(module, known) or _is_elementwise(module)


def _is_elementwise(module: nn.Module) -> bool:
    return type(module).__module__ in ELEMENTWISE_HOMES


def _holds(axis: Axis, group: str) -> bool:
    return any(segment.group == group for segment in axis)
