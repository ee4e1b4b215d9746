"""Matrix products on the CPU whose bits for one row do not depend on the other rows.

    B experts of one product · M rows of each · N output width · K reduced width

BLAS picks another kernel, and with it another order of summation, for another number of rows.
Three things together take that away:

* Products run only at a small, fixed set of heights M (rows are padded up), so that a few shapes
  occur, whatever the batch is.
* They go to oneDNN, for fp32 too (where torch would call MKL): its kernels walk K in the same
  order at every height from 2 up, with the weights on either side of the product.
* Nothing of this is taken on trust: the first time a shape is used in a process, it is run once on
  data whose true sums are zero, so that the result is nothing but the rounding of that order of
  summation, and compared bit for bit with the anchor (16 rows, one expert). A shape that differs
  is never used. If the anchor itself depends on the position of a row, every row is computed on its
  own, which is slow and needs no trust.

Weights may also be packed once into oneDNN's blocked layout, which the same kernels then need not
make at every call. Packed products pass the same probe against the same anchor.

fp16, and bf16 where oneDNN has none, are computed in fp32 and rounded once.

>>> x, w = torch.randn(1, 16, 64), torch.randn(1, 32, 64)
>>> y = product(x, w)
>>> torch.allclose(y, x @ w.transpose(1, 2), atol=1e-4)
True
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

ANCHOR = 16
HEIGHTS = (
    2,
    *range(4, 32, 4),
    *range(32, 128, 8),
    *range(128, 256, 16),
    *range(256, 1025, 32),
)
PACKED_HEIGHTS = (*range(4, 64, 4), *range(64, 512, 8), *range(512, 1025, 32))
BATCHED_HEIGHTS = (2, 4, 8, 16, 24, 32)
BATCHED_ELEMENTS = 1 << 24
SMALL_MATRIX = 1 << 20


@lru_cache(maxsize=1)
def has_onednn() -> bool:
    """Whether oneDNN's linear, which takes fp32, is there and runs on this CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        _onednn(torch.ones(2, 8), torch.ones(8, 8))
    except (AttributeError, RuntimeError):
        return False
    return True


@lru_cache(maxsize=8)
def computes(dtype: torch.dtype) -> bool:
    """Whether products run in `dtype` itself here, instead of in fp32."""
    if dtype is torch.float32:
        return True
    return (
        dtype is torch.bfloat16
        and has_onednn()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _onednn(left_MK: Tensor, right_NK: Tensor) -> Tensor:
    """``left @ right.T`` by oneDNN's linear; `right` may be packed."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(left_MK, right_NK, None, "none", [], "")
    return y


def product(x_BMK: Tensor, w_BNK: Tensor, *, columns: bool = False) -> Tensor:
    """``x @ w.T`` of every expert: (B, M, N), or (B, N, M) when `columns` keeps the weights left.

    With the weights on the left they stream through once, unpacked; that wins from tens of rows.
    fp32 takes one expert a call (B = 1), because torch has no batched fp32 product by oneDNN.
    """
    if x_BMK.shape[0] == 1:
        return one_product(x_BMK[0], w_BNK[0], columns=columns)[None]
    if columns:
        return torch.bmm(w_BNK, x_BMK.transpose(1, 2))
    return torch.bmm(x_BMK, w_BNK.transpose(1, 2))


def one_product(x_MK: Tensor, w_NK: Tensor, *, columns: bool = False) -> Tensor:
    """``x @ w.T`` of one expert: (M, N), or (N, M) when `columns`."""
    left, right = (w_NK, x_MK) if columns else (x_MK, w_NK)
    if x_MK.dtype is torch.float32 and has_onednn():
        return _onednn(left, right)
    return torch.mm(left, right.t())


def pack(w_NK: Tensor) -> Tensor:
    """The weights of one product in oneDNN's own blocked layout: an opaque copy.

    oneDNN's products take it as their right side and need not re-order it at every call.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(w_NK.contiguous(), ANCHOR)
    return packed


def packed_bytes(packed: Tensor) -> int:
    """Bytes that a packed product holds, the padding of its blocks included."""
    return int(torch.ops.mkldnn._nbytes.default(packed))


def packed_product(x_MK: Tensor, packed_NK: Tensor) -> Tensor:
    """``x @ w.T`` of one expert whose weights are packed: (M, N)."""
    return _onednn(x_MK, packed_NK)


def prefers_packed(m: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether `m` rows are faster with packed weights (measured on Zen 4 with two threads).

    They are, but for a long sum over large bf16 weights at a few tens of rows.
    """
    return not (dtype is torch.bfloat16 and k > n and n * k > SMALL_MATRIX and 12 <= m <= 48)


def prefers_columns(m: int, n: int, k: int, dtype: torch.dtype) -> bool:
    """Whether `m` rows are faster with the weights on the left (measured on Zen 4)."""
    if dtype is torch.float32:
        return m >= 32 or (m >= 8 and k > n) or (m >= 16 and n * k < SMALL_MATRIX)
    return m >= 24 or (m >= 8 and k > n)


def _cancelling(rows: int, k: int, dtype: torch.dtype, seed: int, sign: float) -> Tensor:
    """Random rows (rows, k) whose second half repeats the first times `sign`, interleaved.

    Products of such rows with opposite signs cancel, so that only rounding is left.
    """
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(rows, k // 2, generator=generator)
    shuffled = torch.randperm(k // 2, generator=torch.Generator().manual_seed(0))
    return torch.cat([half, half[:, shuffled] * sign], 1).to(dtype)


@lru_cache(maxsize=64)
def _probe_rows(rows: int, k: int, dtype: torch.dtype) -> Tensor:
    return _cancelling(rows, k, dtype, seed=1, sign=-1.0)


def _probe_weights(n: int, k: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    base_NK = _cancelling(64, k, dtype, seed=2, sign=1.0)
    w_NK = base_NK.repeat((n + 63) // 64, 1)[:n]
    return w_NK.t().contiguous().t() if transposed else w_NK


def _anchored(x_MK: Tensor, w_NK: Tensor, height: int) -> Tensor:
    """``x @ w.T`` (M, N) by products of exactly `height` rows."""
    m = x_MK.shape[0]
    padded = torch.cat([x_MK, x_MK.new_zeros(-m % height, x_MK.shape[1])])
    tiles = [product(tile[None], w_NK[None])[0] for tile in padded.split(height)]
    return torch.cat(tiles)[:m]


Key = tuple[int, int, torch.dtype, bool, int]


@lru_cache(maxsize=256)
def anchor_height(key: Key) -> int:
    """16 where a row's bits do not depend on its position among 16, else 1."""
    n, k, dtype, transposed, _ = key
    w_NK = _probe_weights(n, k, dtype, transposed)
    x_MK = _probe_rows(ANCHOR, k, dtype)
    order = torch.arange(ANCHOR - 1, -1, -1)
    same = torch.equal(_anchored(x_MK, w_NK, ANCHOR)[order], _anchored(x_MK[order], w_NK, ANCHOR))
    return ANCHOR if same else 1


@lru_cache(maxsize=4096)
def packed_stable(key: Key, height: int) -> bool:
    """Whether a product of `height` rows with packed weights gives the bits of the anchor.

    `key` is that of the plain weights, see `stable`.
    """
    n, k, dtype, transposed, _ = key
    anchor = anchor_height(key)
    if anchor == 1:
        return False
    w_NK = _probe_weights(n, k, dtype, transposed)
    x_MK = _probe_rows(height, k, dtype)
    return torch.equal(packed_product(x_MK, pack(w_NK)), _anchored(x_MK, w_NK, anchor))


@lru_cache(maxsize=8192)
def stable(key: Key, batch: int, height: int, columns: bool) -> bool:
    """Whether products of this shape give every row the bits that the anchor gives it.

    `key` is (N, K, dtype, weights stored transposed, threads), all that decides a kernel.
    """
    n, k, dtype, transposed, _ = key
    anchor = anchor_height(key)
    if batch == 1 and height == anchor and not columns:
        return True
    if anchor == 1 or (dtype is torch.float32 and batch > 1):
        return False
    w_NK = _probe_weights(n, k, dtype, transposed)
    x_MK = _probe_rows(batch * height, k, dtype)
    if transposed:
        w_BNK = w_NK.t().repeat(batch, 1, 1).transpose(1, 2)
    else:
        w_BNK = w_NK.repeat(batch, 1, 1)
    y = product(x_MK.view(batch, height, k), w_BNK, columns=columns)
    y_BMN = y.transpose(1, 2) if columns else y
    return torch.equal(y_BMN.reshape(batch * height, n), _anchored(x_MK, w_NK, anchor))
