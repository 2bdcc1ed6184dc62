"""Fake quantization as Triton programs. How they are launched is in `triton_kernel.py`.

Everything is computed in float32, and as `fake_quantize.c` does it, but for the order of sums.
Traps on the way, all of which change results: `tl.minimum` and `tl.maximum` turn NaN into a limit;
`tl.clamp` makes 0 of -0; `/` is not the division of IEEE 754; adding and subtracting a large number
rounds to even, but loses the sign of zero.

`steps` are all step sizes of a quantizer, `row` is the index of the first one in use, `low` and
`high` are the lowest and the highest code, and `factor` scales the gradient of a step size.
"""

# Triton compiles these functions: their arguments are pointers and numbers, without annotations.
# ruff: noqa: ANN001, ANN201, ANN202, N803, PLR0913, PLR0917
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

STEP_FLOOR = tl.constexpr(2.0**-120)
ROUNDER = tl.constexpr(2.0**23)
SIGN = tl.constexpr(-(2**31))
UPPER_BITS = tl.constexpr(-(2**12))
LARGEST_HALF = tl.constexpr(65504.0)


@triton.jit
def _effective(raw):
    """Step sizes as they are used: positive, with a floor. NaN stays."""
    size = tl.abs(raw)
    return tl.where(size < STEP_FLOOR, STEP_FLOOR, size)


@triton.jit
def _code(ratio, low, high):
    """Round half to even and clamp. Comparisons with NaN are false, so it stays; so does -0."""
    size = tl.abs(ratio)
    # From 2^23 on all numbers are whole.
    rounded = tl.where(size < ROUNDER, (size + ROUNDER) - ROUNDER, size)
    sign = ratio.to(tl.int32, bitcast=True) & SIGN
    code = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    code = tl.where(code < low, low, code)
    return tl.where(code > high, high, code)


@triton.jit
def _narrowed(result, dtype: tl.constexpr):
    """A result in the dtype of the values. The code next to its largest number may exceed that."""
    if dtype == tl.float16:
        result = tl.where(result > LARGEST_HALF, LARGEST_HALF, result)
        result = tl.where(result < -LARGEST_HALF, -LARGEST_HALF, result)
    return result.to(dtype)


@triton.jit
def _contribution(upstream, value, code, inside, step):
    """What a value adds to the gradient of its step size: `(code - inside * value / step)`, times.

    `code * step - value` is computed without rounding the product: the upper bits of the step size
    alone times a code of 9 bits is exact.
    """
    upper = (step.to(tl.int32, bitcast=True) & UPPER_BITS).to(tl.float32, bitcast=True)
    difference = (code * upper - value) + code * (step - upper)
    return upstream * tl.where(inside, difference * tl.div_rn(1.0, step), code)


@triton.jit
def _tensor_block(values, result, steps, row, low, high, count, block, BLOCK: tl.constexpr):
    """Quantize a block of values with one step size."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    step = _effective(tl.load(steps + row))
    value = tl.load(values + index, mask=mask, other=0.0).to(tl.float32)
    quantized = _code(tl.div_rn(value, step), low, high) * step
    tl.store(result + index, _narrowed(quantized, result.dtype.element_ty), mask=mask)


@triton.jit
def _channels_block(
    values,
    result,
    steps,
    row,
    low,
    high,
    count,
    repeats,
    channels,
    inner,
    block,
    BLOCK: tl.constexpr,
):
    """Quantize a block of values with a step size for each channel."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    stretch = index // inner
    channel = (stretch // (channels * repeats)) * channels + stretch % channels
    step = _effective(tl.load(steps + row + channel, mask=mask, other=1.0))
    value = tl.load(values + index, mask=mask, other=0.0).to(tl.float32)
    quantized = _code(tl.div_rn(value, step), low, high) * step
    tl.store(result + index, _narrowed(quantized, result.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_of_blocks(
    gradient,
    values,
    of_values,
    sums,
    steps,
    row,
    low,
    high,
    count,
    program,
    programs,
    BLOCK: tl.constexpr,
):
    """Gradient of the values in every `programs`-th block, and the sum for the step size."""
    step = _effective(tl.load(steps + row))
    # In the unit of the values, as on a CPU.
    lowest = low * step
    highest = high * step
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(program * BLOCK, count, programs * BLOCK):
        index = start + tl.arange(0, BLOCK)
        mask = index < count
        value = tl.load(values + index, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(gradient + index, mask=mask, other=0.0).to(tl.float32)
        code = _code(tl.div_rn(value, step), low, high)
        # Strict bounds: on the border the gradient is zero.
        inside = (value > lowest) & (value < highest)
        of_value = tl.where(inside, upstream, 0.0)
        tl.store(of_values + index, of_value.to(of_values.dtype.element_ty), mask=mask)
        total += _contribution(upstream, value, code, inside, step)
    tl.store(sums + program, tl.sum(total, 0))


@triton.jit
def _gradients_of_channel(
    gradient,
    values,
    of_values,
    steps,
    of_steps,
    row,
    rows,
    low,
    high,
    factor,
    repeats,
    channels,
    inner,
    channel,
    all_channels,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    REPEATED: tl.constexpr,
):
    """Both gradients of a channel. Other rows of the step sizes get zeros."""
    first = channel * inner
    if REPEATED:
        first = ((channel // channels) * repeats * channels + channel % channels) * inner
    raw = tl.load(steps + row * all_channels + channel)
    step = _effective(raw)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, repeats * inner, BLOCK):
        place = start + tl.arange(0, BLOCK)
        mask = place < repeats * inner
        index = first + place
        if REPEATED:
            index = first + (place // inner) * channels * inner + place % inner
        value = tl.load(values + index, mask=mask, other=0.0).to(tl.float32)
        upstream = tl.load(gradient + index, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.div_rn(value, step)
        code = _code(ratio, low, high)
        inside = (ratio > low) & (ratio < high)
        of_value = tl.where(inside, upstream, 0.0)
        tl.store(of_values + index, of_value.to(of_values.dtype.element_ty), mask=mask)
        total += _contribution(upstream, value, code, inside, step)
    of_step = tl.sum(total, 0) * factor
    of_step = tl.where(_is_negative(raw), -of_step, of_step)
    candidate = tl.arange(0, ROWS)
    tl.store(
        of_steps + candidate * all_channels + channel,
        tl.where(candidate == row, of_step, 0.0),
        mask=candidate < rows,
    )


@triton.jit
def _is_negative(raw):
    """Whether the sign is set, that of -0 included."""
    return raw.to(tl.int32, bitcast=True) < 0


# What is launched. Pointers come first.


@triton.jit(do_not_specialize=["row"], do_not_specialize_on_alignment=["steps"])
def quantize_tensor(values, result, steps, row, low, high, count, BLOCK: tl.constexpr):
    """Quantize with one step size: a program for each block of values."""
    _tensor_block(values, result, steps, row, low, high, count, tl.program_id(0), BLOCK)


@triton.jit(do_not_specialize=["row"], do_not_specialize_on_alignment=["steps"])
def tensor_gradients(
    gradient, values, of_values, sums, steps, row, low, high, count, BLOCK: tl.constexpr
):
    """Gradient of the values, and the sum over the blocks of each program."""
    _gradients_of_blocks(
        gradient,
        values,
        of_values,
        sums,
        steps,
        row,
        low,
        high,
        count,
        tl.program_id(0),
        tl.num_programs(0),
        BLOCK,
    )


@triton.jit(
    do_not_specialize=["row", "all_steps", "programs"],
    do_not_specialize_on_alignment=["steps"],
)
def step_gradient(
    sums,
    steps,
    of_steps,
    row,
    all_steps,
    programs,
    factor,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Gradient of all step sizes, zero but in `row`: one program."""
    index = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(sums + index, mask=index < programs, other=0.0), 0) * factor
    total = tl.where(_is_negative(tl.load(steps + row)), -total, total)
    column = tl.arange(0, STEPS)
    tl.store(of_steps + column, tl.where(column == row, total, 0.0), mask=column < all_steps)


@triton.jit(
    do_not_specialize=["row", "repeats", "channels", "inner"],
    do_not_specialize_on_alignment=["steps"],
)
def quantize_channels(
    values, result, steps, row, low, high, count, repeats, channels, inner, BLOCK: tl.constexpr
):
    """Quantize with a step size for each channel: a program for each block of values."""
    block = tl.program_id(0)
    _channels_block(
        values, result, steps, row, low, high, count, repeats, channels, inner, block, BLOCK
    )


@triton.jit(
    do_not_specialize=["row", "rows", "repeats", "channels"],
    do_not_specialize_on_alignment=["steps"],
)
def channel_gradients(
    gradient,
    values,
    of_values,
    steps,
    of_steps,
    row,
    rows,
    low,
    high,
    factor,
    repeats,
    channels,
    inner,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    REPEATED: tl.constexpr,
):
    """Both gradients: a program for each channel."""
    _gradients_of_channel(
        gradient,
        values,
        of_values,
        steps,
        of_steps,
        row,
        rows,
        low,
        high,
        factor,
        repeats,
        channels,
        inner,
        tl.program_id(0),
        tl.num_programs(0),
        BLOCK,
        ROWS,
        REPEATED,
    )


@triton.jit(
    do_not_specialize=["row", "blocks", "weight_row", "repeats", "channels", "inner"],
    do_not_specialize_on_alignment=["steps", "weight_steps"],
)
def quantize_pair(
    values,
    result,
    steps,
    weight,
    weight_result,
    weight_steps,
    row,
    low,
    high,
    count,
    blocks,
    weight_row,
    weight_low,
    weight_high,
    weight_count,
    repeats,
    channels,
    inner,
    BLOCK: tl.constexpr,
):
    """`quantize_tensor` by the first `blocks` programs, `quantize_channels` by the others."""
    program = tl.program_id(0)
    if program < blocks:
        _tensor_block(values, result, steps, row, low, high, count, program, BLOCK)
    else:
        _channels_block(
            weight,
            weight_result,
            weight_steps,
            weight_row,
            weight_low,
            weight_high,
            weight_count,
            repeats,
            channels,
            inner,
            program - blocks,
            BLOCK,
        )


@triton.jit(
    do_not_specialize=["row", "programs", "weight_row", "rows", "repeats", "channels"],
    do_not_specialize_on_alignment=["steps", "weight_steps"],
)
def pair_gradients(
    gradient,
    values,
    of_values,
    sums,
    steps,
    weight_gradient,
    weight,
    of_weight,
    weight_steps,
    of_weight_steps,
    row,
    low,
    high,
    count,
    programs,
    weight_row,
    rows,
    weight_low,
    weight_high,
    factor,
    repeats,
    channels,
    inner,
    BLOCK: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    REPEATED: tl.constexpr,
):
    """`tensor_gradients` by the first `programs` programs, `channel_gradients` by the others."""
    program = tl.program_id(0)
    if program < programs:
        _gradients_of_blocks(
            gradient,
            values,
            of_values,
            sums,
            steps,
            row,
            low,
            high,
            count,
            program,
            programs,
            BLOCK,
        )
    else:
        _gradients_of_channel(
            weight_gradient,
            weight,
            of_weight,
            weight_steps,
            of_weight_steps,
            weight_row,
            rows,
            weight_low,
            weight_high,
            factor,
            repeats,
            channels,
            inner,
            program - programs,
            tl.num_programs(0) - programs,
            WEIGHT_BLOCK,
            ROWS,
            REPEATED,
        )
