"""Which operations return no negative number, by what torch documents of each operation.

A quantizer of an input that cannot be negative needs no codes for negative numbers. The tables name
operations as torch's dispatcher does: whatever Python calls (`torch.add`, `Tensor.add_`, `+`, a
scripted function, a module) arrives there under one name, with all arguments named. An operation
that no table lists is not known to return anything.

How values are followed through a network is in `values.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Known = Callable[[Any], bool]
"""Says whether an argument (a tensor, a number, a list) is known to hold no negative number."""


def returns_no_negative(operation: str, arguments: Mapping[str, Any], known: Known) -> bool:
    """Whether the first result of an operation cannot hold a negative number.

    Args:
        operation: Name in the dispatcher, without the underscore of in-place forms.
        arguments: All arguments by name, defaults included.
        known: What is known of the arguments.
    """
    if operation in _NONNEGATIVE:
        return True
    if operation in _CONDITIONAL:
        return _CONDITIONAL[operation](arguments, known)
    names = _KEEPING.get(operation)
    if names is None:
        return False
    # Overloads name a part of these: a value that is a tensor in one is a number in another.
    present = [arguments[name] for name in names if name in arguments]
    return bool(present) and all(map(known, present))


def is_known_number(value: object) -> bool:
    """Whether an argument that is no tensor is no negative number: a number, or missing."""
    return value is None or (isinstance(value, (int, float)) and value >= 0)


_NONNEGATIVE = {
    "relu", "sigmoid", "hardsigmoid", "_softmax", "_safe_softmax", "abs",
    "exp", "exp2", "cosh", "erfc", "sqrt", "rsqrt", "hypot", "linalg_vector_norm", "norm",
    "var", "std", "zeros", "zeros_like", "new_zeros", "zero", "ones", "ones_like", "new_ones",
    "eye", "rand", "rand_like", "bernoulli",
    # Memory that holds nothing yet: what is written to it decides.
    "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
}  # fmt: skip
"""Operations that never return a negative number."""


def _keeping(operations: Iterable[str], *names: str) -> dict[str, tuple[str, ...]]:
    return dict.fromkeys(operations, names)


_KEEPING = {
    **_keeping(
        (
            # functions of one number that run through zero, or above it
            "hardswish", "silu", "gelu", "mish", "celu", "_prelu_kernel", "rrelu_with_noise",
            "tanh", "atan", "sinh", "asinh", "erf", "expm1", "log1p", "reciprocal", "softshrink",
            "hardshrink", "floor", "ceil", "round", "trunc", "frac", "sign", "sgn", "fmod", "glu",
            # sums, means, extremes
            "sum", "nansum", "mean", "prod", "cumsum", "cumprod", "amax", "amin", "median",
            "nanmedian", "mode", "kthvalue", "topk", "sort", "cummax", "cummin",
            # copies and rearrangements
            "clone", "_to_copy", "contiguous", "repeat", "repeat_interleave", "roll", "flip",
            "tril", "triu", "diag_embed", "gather", "index", "index_select", "take",
            "masked_select", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
            "native_channel_shuffle", "im2col", "col2im", "reflection_pad1d", "reflection_pad2d",
            "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d",
            # pooling, and interpolation whose weights are not negative: bicubic has others
            "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
            "adaptive_max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d",
            "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d",
            "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
            "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa",
            "upsample_trilinear3d",
        ),
        "self",
    ),
    **_keeping(("add",), "self", "other", "alpha"),
    **_keeping(("mul", "div", "true_divide", "floor_divide", "minimum", "fmin"), "self", "other"),
    **_keeping(("remainder",), "other"),
    **_keeping(("where",), "self", "other"),
    **_keeping(("elu",), "self", "scale"),
    **_keeping(("clamp_max",), "self", "max"),
    **_keeping(("addcmul", "addcdiv"), "self", "tensor1", "tensor2", "value"),
    **_keeping(("cat", "stack"), "tensors"),
    **_keeping(("mm", "bmm"), "self", "mat2"),
    **_keeping(("mv",), "self", "vec"),
    **_keeping(("dot",), "self", "tensor"),
    **_keeping(("addmm",), "self", "mat1", "mat2", "alpha", "beta"),
    **_keeping(("baddbmm",), "self", "batch1", "batch2", "alpha", "beta"),
    **_keeping(("convolution",), "input", "weight", "bias"),
    **_keeping(("embedding",), "weight"),
    **_keeping(("native_dropout",), "input"),
    **_keeping(
        (
            "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_attention_math",
        ),
        "value",
    ),
    # Values that are written somewhere.
    **_keeping(("constant_pad_nd", "masked_fill", "index_fill"), "self", "value"),
    **_keeping(("fill",), "value"),
    **_keeping(("full", "full_like", "new_full"), "fill_value"),
    **_keeping(("scalar_tensor",), "s"),
    **_keeping(("uniform",), "from", "to"),
    **_keeping(("copy",), "src"),
    **_keeping(("scatter",), "self", "src", "value"),
    **_keeping(
        ("scatter_add", "scatter_reduce", "select_scatter", "slice_scatter", "diagonal_scatter"),
        "self", "src",
    ),
    **_keeping(("index_add",), "self", "source", "alpha"),
    **_keeping(("index_copy", "index_reduce", "masked_scatter"), "self", "source"),
    **_keeping(("index_put", "_index_put_impl"), "self", "values"),
    **_keeping(("nan_to_num",), "self", "nan", "posinf"),
}  # fmt: skip
"""Operations that return no negative number if none of these arguments holds one."""


def _clamp(arguments: Mapping[str, Any], known: Known) -> bool:
    # The upper limit is applied last, so it alone may make a value negative. It may be missing.
    lower = arguments["min"]
    is_limited = lower is not None and known(lower)
    return known(arguments["max"]) and (is_limited or known(arguments["self"]))


def _clamp_min(arguments: Mapping[str, Any], known: Known) -> bool:
    return known(arguments["min"]) or known(arguments["self"])


def _hardtanh(arguments: Mapping[str, Any], known: Known) -> bool:
    is_limited = known(arguments["min_val"]) or known(arguments["self"])
    return is_limited and known(arguments["max_val"])


def _threshold(arguments: Mapping[str, Any], known: Known) -> bool:
    is_limited = known(arguments["threshold"]) or known(arguments["self"])
    return is_limited and known(arguments["value"])


def _softplus(arguments: Mapping[str, Any], known: Known) -> bool:
    # Above the threshold it returns its input; a negative beta turns its sign.
    return arguments["beta"] > 0 and known(arguments["threshold"])


def _leaky_relu(arguments: Mapping[str, Any], known: Known) -> bool:
    return arguments["negative_slope"] <= 0 or known(arguments["self"])


def _pow(arguments: Mapping[str, Any], known: Known) -> bool:
    exponent = arguments["exponent"]
    is_even = isinstance(exponent, (int, float)) and exponent % 2 == 0
    return is_even or known(arguments["self"])


def _maximum(arguments: Mapping[str, Any], known: Known) -> bool:
    is_limited = "other" in arguments and known(arguments["other"])
    return is_limited or known(arguments["self"])


def _minimum(arguments: Mapping[str, Any], known: Known) -> bool:
    return known(arguments["self"]) and known(arguments.get("other"))


def _max_pool(arguments: Mapping[str, Any], known: Known) -> bool:
    # A dilated window may hold nothing but padding, which is minus infinity.
    is_dense = all(length == 1 for length in arguments["dilation"])
    is_inside = all(length == 0 for length in arguments["padding"])
    return known(arguments["self"]) and (is_dense or is_inside)


def _avg_pool(arguments: Mapping[str, Any], known: Known) -> bool:
    return known(arguments["self"]) and known(arguments.get("divisor_override"))


def _grid_sampler(arguments: Mapping[str, Any], known: Known) -> bool:
    bilinear_or_nearest = arguments["interpolation_mode"] in (0, 1)
    return bilinear_or_nearest and known(arguments["input"])


def _lerp(arguments: Mapping[str, Any], known: Known) -> bool:
    weight = arguments["weight"]
    is_between = isinstance(weight, (int, float)) and 0 <= weight <= 1
    return is_between and known(arguments["self"]) and known(arguments["end"])


_CONDITIONAL: dict[str, Callable[[Mapping[str, Any], Known], bool]] = {
    "clamp": _clamp,
    "clamp_min": _clamp_min,
    "hardtanh": _hardtanh,
    "threshold": _threshold,
    "softplus": _softplus,
    "leaky_relu": _leaky_relu,
    "pow": _pow,
    "max": _maximum,
    "maximum": _maximum,
    "fmax": _maximum,
    "min": _minimum,
    "max_pool2d_with_indices": _max_pool,
    "max_pool3d_with_indices": _max_pool,
    "avg_pool1d": _avg_pool,
    "avg_pool2d": _avg_pool,
    "avg_pool3d": _avg_pool,
    "grid_sampler_2d": _grid_sampler,
    "grid_sampler_3d": _grid_sampler,
    "lerp": _lerp,
}
"""Operations whose sign depends on the values of single arguments."""
