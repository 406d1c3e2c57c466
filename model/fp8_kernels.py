# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (a kernel's arguments have no Python types; annotations are kept real, not strings: torch and Triton read them)
"""The casts of model/fp8_casts.py as Triton kernels: each reads its input once (twice where a row is too long),
computes what is to be cast, keeps it in bf16 where others want it, and writes it in FP8 with a scale for every row.

    rows_kernel               quantize_rows, gather_quantize, activate_quantize, relu2_backward_quantize
    swiglu_backward_kernel    swiglu_backward_quantize
    turn_kernel               quantize_weights: a weight read once, both orientations written

Scales and values before the cast are those of fp8_casts bit for bit (multiplier_and_scale names the one exception);
where exp is involved, h and da may differ by a rounding. Blocks follow from the width K alone, and a new number of rows
compiles nothing.

Triton 3.6 and 3.7 assemble for Hopper with ptxas 12.9, which loses bytes where FP8 values move between threads of a
kernel (triton-lang/triton#11111): here they never do, and no NaN-propagating min or max, its other cause, is used.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8_casts import E4M3, Quantized

TILE = 4096  # elements of a program's tile, 32 for each thread of 4 warps; a longer row is walked in blocks, twice
TURN_N, TURN_K = 128, 64  # a tile of turn_kernel: 128 bytes of a row to read (bf16), 128 of a turned row to write


# --- what all kernels share -----------------------------------------------------------------------------------------


@triton.jit
def amax_bits(y):
    """max |y| of every row of y [R, B] in fp32, as its bits: they order as the values do, with NaN above infinity."""
    return tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def multiplier_and_scale(bits):
    """s = 2^floor(log2(448 / max(amax, 1e-12))) and 1 / s, from the bits of amax.

    amax = m * 2^e with m in [1, 2), and 448 = 1.75 * 2^8: so 448 / amax = (1.75 / m) * 2^(8 - e), and the exponent is
    8 - e where m <= 1.75 and 7 - e above. 1.75 has the mantissa 0x600000: adding 0x1FFFFF carries into the exponent
    just where m is more. `up` is then 127 + e or 127 + e + 1, and s has the biased exponent 127 + 8 - (up - 127).

    torchao takes log2 in fp32. For amax in bf16 that is the same: m is 1.75 or at least 2^-7 from it, so log2 is an
    integer or 0.006 from one, far more than it errs. For amax in fp32 up to 2.7e-6 above 1.75 * 2^j, relatively,
    log2 can round up to the integer, and torchao's s is then twice this one: its largest values saturate at 448.
    An infinite amax gives s = 0, as there; NaN gives NaN.
    """
    infinity = 0x7F800000
    up = (tl.minimum(tl.maximum(bits, 0x2B8CBCCC), infinity) + 0x1FFFFF) >> 23  # 0x2B8CBCCC: 1e-12
    s = ((262 - up) << 23).to(tl.float32, bitcast=True)
    scale = ((up - 8) << 23).to(tl.float32, bitcast=True)
    amax = bits.to(tl.float32, bitcast=True)
    s = tl.where(bits > infinity, amax, tl.where(bits == infinity, 0.0, s))
    return s, tl.where(bits >= infinity, amax, scale)


@triton.jit
def clamped(v):
    """By its scale no value is out of range, but for one that a second pass over a long row might round otherwise than
    the first: it must not become NaN. A value that is NaN stays, it compares false (a min or max would drop it).
    """
    v = tl.where(v > 448.0, 448.0, v)
    return tl.where(v < -448.0, -448.0, v)


@triton.jit
def sigmoid(gate):
    return 1.0 / (1.0 + tl.exp(-gate))


# --- one row of FP8 for every row made ------------------------------------------------------------------------------


@triton.jit
def made(x, other, row, weight, column, inside, K: tl.constexpr, KIND: tl.constexpr):
    """A tile of what is to be quantised, as x's type would hold it, in x's type."""
    if KIND == "swiglu":
        gate = tl.load(x + row * (2 * K) + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x + row * (2 * K) + K + column, mask=inside, other=0.0).to(tl.float32)
        y = gate * sigmoid(gate) * up
    else:
        y = tl.load(x + row * K + column, mask=inside, other=0.0).to(tl.float32)
        if KIND == "weighted":
            y = y * weight
        elif KIND == "relu2":
            y = tl.where(y <= 0.0, 0.0, y)  # keeps NaN
            y = y * y
        elif KIND == "relu2_backward":
            h = tl.load(other + row * K + column, mask=inside, other=0.0).to(tl.float32)
            y = 2.0 * y * tl.sqrt_rn(h)
    return y.to(x.dtype.element_ty)


@triton.jit(do_not_specialize=["rows", "rows_of_x"])
def rows_kernel(
    x, other, index, weights, out, values, scale, rows, rows_of_x,
    K: tl.constexpr, KIND: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """R rows of K. other, index, weights, out and values may be None."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    source, weight = row, 1.0
    present = there
    if index is not None:
        source = tl.load(index + row, mask=there, other=0)
        present = there & (source < rows_of_x)  # no row of x: nothing is read, so zeros
    if KIND == "weighted":
        weight = tl.load(weights + row, mask=present, other=0.0).to(x.dtype.element_ty).to(tl.float32)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    source, row_2d, there_2d, present = source[:, None], row[:, None], there[:, None], present[:, None]
    if BLOCK >= K:
        y = made(x, other, source, weight, column, present & (column < K), K, KIND)
        s, one_over_s = multiplier_and_scale(amax_bits(y.to(tl.float32)))
        if out is not None:
            tl.store(out + row_2d * K + column, y, mask=there_2d & (column < K))
        if values is not None:
            v = clamped(y.to(tl.float32) * s[:, None]).to(values.dtype.element_ty)
            tl.store(values + row_2d * K + column, v, mask=there_2d & (column < K))
    else:
        bits = tl.zeros([R], dtype=tl.int32)
        for start in range(0, K, BLOCK):
            y = made(x, other, source, weight, start + column, present & (start + column < K), K, KIND)
            bits = tl.maximum(bits, amax_bits(y.to(tl.float32)))
        s, one_over_s = multiplier_and_scale(bits)
        if values is not None:
            for start in range(0, K, BLOCK):  # once more, from the cache
                y = made(x, other, source, weight, start + column, present & (start + column < K), K, KIND)
                if out is not None:
                    tl.store(out + row_2d * K + start + column, y, mask=there_2d & (start + column < K))
                v = clamped(y.to(tl.float32) * s[:, None]).to(values.dtype.element_ty)
                tl.store(values + row_2d * K + start + column, v, mask=there_2d & (start + column < K))
    tl.store(scale + row, one_over_s, mask=there)


def blocks(width: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(width), TILE)
    return {"R": TILE // block, "BLOCK": block, "num_warps": 4}


def launch_rows(kind, x, out, values, scale, other=None, index=None, weights=None) -> None:
    rows, K = scale.numel(), x.shape[-1] // (2 if kind == "swiglu" else 1)
    assert K % 16 == 0, f"rows of {K}: not a multiple of 16"
    if rows:
        how = blocks(K)
        grid = (triton.cdiv(rows, how["R"]),)
        rows_kernel[grid](
            x, other, index, weights, out, values, scale, rows, x.numel() // x.shape[-1], K=K, KIND=kind, **how
        )


def in_fp8(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Where values [..., K] and their scales [...] go."""
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape[:-1], dtype=torch.float32)


def in_both(x: Tensor, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(shape), *in_fp8(x, shape, dtype)


# The operators take the type of their values, FP8 but for tests that look at them before the cast.


@torch.library.custom_op("moelab::fp8_rows", mutates_args=())
def fp8_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values, scale = in_fp8(x, x.shape, dtype)
    launch_rows("plain", x.contiguous(), None, values, scale)
    return values, scale


fp8_rows.register_fake(lambda x, dtype: in_fp8(x, x.shape, dtype))


def quantize_rows(x: Tensor) -> Quantized:
    return Quantized(*fp8_rows(x, E4M3))


@torch.library.custom_op("moelab::fp8_gather", mutates_args=())
def fp8_gather(x: Tensor, index: Tensor, weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    rows, values, scale = in_both(x, (index.shape[0], x.shape[1]), dtype)
    weights = None if weights is None else weights.contiguous()
    kind = "plain" if weights is None else "weighted"
    launch_rows(kind, x.contiguous(), rows, values, scale, index=index.contiguous(), weights=weights)
    return rows, values, scale


fp8_gather.register_fake(lambda x, index, weights, dtype: in_both(x, (index.shape[0], x.shape[1]), dtype))


def gather_quantize(x_TD: Tensor, index_N: Tensor, weights_N: Tensor | None = None) -> tuple[Tensor, Quantized]:
    """rows[n] = x[index[n]], times weights[n] (rounded to x's type, as in model/dispatch.py); index T: a row of zeros.

    index int64 [N] in [0, T]; rows [N, D] in x's type, and in FP8.
    """
    rows, *quantized = fp8_gather(x_TD, index_N, weights_N, E4M3)
    return rows, Quantized(*quantized)


def activated_shape(a: Tensor, activation: str) -> Sequence[int]:
    return (*a.shape[:-1], a.shape[-1] // 2) if activation == "swiglu" else a.shape


@torch.library.custom_op("moelab::fp8_activate", mutates_args=())
def fp8_activate(a: Tensor, activation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    h, values, scale = in_both(a, activated_shape(a, activation), dtype)
    launch_rows("swiglu" if activation == "swiglu" else "relu2", a.contiguous(), h, values, scale)
    return h, values, scale


fp8_activate.register_fake(lambda a, activation, dtype: in_both(a, activated_shape(a, activation), dtype))


def activate_quantize(a: Tensor, activation: str) -> tuple[Tensor, Quantized]:
    h, *quantized = fp8_activate(a, activation, E4M3)
    return h, Quantized(*quantized)


@torch.library.custom_op("moelab::fp8_relu2_backward", mutates_args=())
def fp8_relu2_backward(dh: Tensor, h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    da, values, scale = in_both(dh, dh.shape, dtype)
    launch_rows("relu2_backward", dh.contiguous(), da, values, scale, other=h.contiguous())
    return da, values, scale


fp8_relu2_backward.register_fake(lambda dh, h, dtype: in_both(dh, dh.shape, dtype))


def relu2_backward_quantize(dh: Tensor, h: Tensor) -> tuple[Tensor, Quantized]:
    da, *quantized = fp8_relu2_backward(dh, h, E4M3)
    return da, Quantized(*quantized)


# --- SwiGLU backward: a row of da is two halves under one scale -----------------------------------------------------


@triton.jit
def swiglu_gradients(dh, a, row, column, inside, F: tl.constexpr):
    """h, d_gate and d_up in a's type, by the formulas of fp8_casts."""
    dtype = a.dtype.element_ty
    gate = tl.load(a + row * (2 * F) + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(a + row * (2 * F) + F + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dh + row * F + column, mask=inside, other=0.0).to(tl.float32)
    sigma = sigmoid(gate)
    silu = gate * sigma
    d_gate = d * up * sigma * (1.0 + gate * (1.0 - sigma))
    return (silu * up).to(dtype), d_gate.to(dtype), (d * silu).to(dtype)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward_kernel(
    dh, a, h, da, values, scale, rows, F: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    there = row < rows
    row_2d, there_2d, column = row[:, None], there[:, None], tl.arange(0, BLOCK)[None, :]
    bits = tl.zeros([R], dtype=tl.int32)
    if BLOCK < F:
        for start in range(0, F, BLOCK):
            inside = there_2d & (start + column < F)
            _, d_gate, d_up = swiglu_gradients(dh, a, row_2d, start + column, inside, F)
            bits = tl.maximum(bits, tl.maximum(amax_bits(d_gate.to(tl.float32)), amax_bits(d_up.to(tl.float32))))
    for start in range(0, F, BLOCK):
        inside = there_2d & (start + column < F)
        made_h, d_gate, d_up = swiglu_gradients(dh, a, row_2d, start + column, inside, F)
        if BLOCK >= F:
            bits = tl.maximum(amax_bits(d_gate.to(tl.float32)), amax_bits(d_up.to(tl.float32)))
        s = multiplier_and_scale(bits)[0][:, None]
        at = row_2d * (2 * F) + start + column
        tl.store(h + row_2d * F + start + column, made_h, mask=inside)
        tl.store(da + at, d_gate, mask=inside)
        tl.store(da + at + F, d_up, mask=inside)
        tl.store(values + at, clamped(d_gate.to(tl.float32) * s).to(values.dtype.element_ty), mask=inside)
        tl.store(values + at + F, clamped(d_up.to(tl.float32) * s).to(values.dtype.element_ty), mask=inside)
    tl.store(scale + row, multiplier_and_scale(bits)[1], mask=there)


@torch.library.custom_op("moelab::fp8_swiglu_backward", mutates_args=())
def fp8_swiglu_backward(dh: Tensor, a: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h, da, values, scale = dh.new_empty(dh.shape), *in_both(a, a.shape, dtype)
    rows, F = scale.numel(), dh.shape[-1]
    assert F % 16 == 0, f"rows of {F}: not a multiple of 16"
    if rows:
        how = blocks(F)
        grid = (triton.cdiv(rows, how["R"]),)
        swiglu_backward_kernel[grid](dh.contiguous(), a.contiguous(), h, da, values, scale, rows, F=F, **how)
    return h, da, values, scale


fp8_swiglu_backward.register_fake(lambda dh, a, dtype: (dh.new_empty(dh.shape), *in_both(a, a.shape, dtype)))


def swiglu_backward_quantize(dh: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Quantized]:
    h, da, *quantized = fp8_swiglu_backward(dh, a, E4M3)
    return h, da, Quantized(*quantized)


# --- weights, both ways ---------------------------------------------------------------------------------------------


@triton.jit
def turn_kernel(
    w, forward, turned, scale_LN, scale_L,
    N: tl.constexpr, K: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr,
):  # fmt: skip
    """w [L, N, K] times 1 / scale_LN to forward [L, N, K], times 1 / scale_L to turned [L, K, N].

    Four rows of w become one int32 of four FP8 values, in the order of memory, and the tile is turned as such: `turned`
    comes as int32 [L, K, N/4]. (In other than FP8, for tests, as [L, K, N].)
    """
    matrix = tl.program_id(2).to(tl.int64)
    four = tl.program_id(0) * (TN // 4) + tl.arange(0, TN // 4)  # rows 4*four .. 4*four + 3
    column = (tl.program_id(1) * TK + tl.arange(0, TK))[None, :]
    of_matrix = tl.div_rn(1.0, tl.load(scale_L + matrix))  # exact: scales are powers of two
    packed = tl.zeros([TN // 4, TK], dtype=tl.int32)
    for j in tl.static_range(4):
        n = 4 * four + j
        inside = (n[:, None] < N) & (column < K)
        at = (matrix * N + n[:, None]) * K + column
        x = tl.load(w + at, mask=inside, other=0.0).to(tl.float32)
        of_row = tl.div_rn(1.0, tl.load(scale_LN + matrix * N + n, mask=n < N, other=1.0))
        tl.store(forward + at, clamped(x * of_row[:, None]).to(forward.dtype.element_ty), mask=inside)
        v = clamped(x * of_matrix).to(forward.dtype.element_ty)
        if turned.dtype.element_ty == tl.int32:
            packed |= v.to(tl.uint8, bitcast=True).to(tl.int32) << (8 * j)
        else:
            tl.store(turned + (matrix * K + column) * N + n[:, None], v, mask=inside)
    if turned.dtype.element_ty == tl.int32:
        at = (matrix * K + column) * (N // 4) + four[:, None]
        tl.store(turned + at, packed, mask=(four[:, None] < N // 4) & (column < K))


def both_ways(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    L, N, K = w.shape
    return *in_fp8(w, (L, N, K), dtype), *in_fp8(w, (L, K, N), dtype)


@torch.library.custom_op("moelab::fp8_weights", mutates_args=())
def fp8_weights(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    w = w.contiguous()
    L, N, K = w.shape
    assert N % 16 == 0, f"matrices of {N} rows: not a multiple of 16"
    forward, scale_LN, turned, scale_LK = both_ways(w, dtype)
    if w.numel():
        launch_rows("plain", w, None, None, scale_LN)
        scale_L = scale_LN.amax(1)  # NaN if one is
        scale_LK.copy_(scale_L.unsqueeze(1))
        grid = (triton.cdiv(N, TURN_N), triton.cdiv(K, TURN_K), L)
        as_written = turned.view(torch.int32) if turned.itemsize == 1 else turned
        turn_kernel[grid](w, forward, as_written, scale_LN, scale_L, N=N, K=K, TN=TURN_N, TK=TURN_K, num_warps=4)
    return forward, scale_LN, turned, scale_LK


fp8_weights.register_fake(both_ways)


def quantize_weights(w_LNK: Tensor) -> tuple[Quantized, Quantized]:
    forward, scale_LN, turned, scale_LK = fp8_weights(w_LNK, E4M3)
    return Quantized(forward, scale_LN), Quantized(turned, scale_LK)
