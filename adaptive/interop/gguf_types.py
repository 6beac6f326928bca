"""Types of tensors in GGUF files: numbers as they stand, and blocks of weights with scales, multiplied out to float32.

Facts: ggml-common.h (layouts) and ggml-quants.c (dequantize_row_*) of llama.cpp. A decoder takes u8[blocks, size] and
returns f32[blocks, weights].
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 28: "F64", 30: "BF16",
}  # fmt: skip
PLAIN: dict[int, Any] = {0: np.float32, 1: np.float16, 28: np.float64, 30: ml_dtypes.bfloat16}


class Block(NamedTuple):
    """size: bytes of a block; weights: numbers in it."""

    size: int
    weights: int
    decode: Callable[[np.ndarray], np.ndarray]

    def decoded(self, content: bytes, shape: tuple[int, ...]) -> np.ndarray:
        """f32 of `shape` out of whole blocks."""
        return self.decode(np.frombuffer(content, np.uint8).reshape(-1, self.size)).reshape(shape)


def _halves(blocks: np.ndarray, begin: int) -> np.ndarray:
    """f32[blocks, 1]: the half-precision number at byte `begin` of each block."""
    return blocks[:, begin : begin + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """u8[..., 2 n] of u8[..., n]: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _pairs(packed: np.ndarray) -> np.ndarray:
    """u8[..., 4, n] of u8[..., n]: the four two-bit numbers of each byte, from the lowest."""
    return packed[..., None, :] >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3


def _bits(packed: np.ndarray) -> np.ndarray:
    """u8[..., 8, n] of u8[..., n]: the bits of each byte, from the lowest."""
    return packed[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1


# Blocks of 32


def _q4_0(b: np.ndarray) -> np.ndarray:
    return _halves(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _halves(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _halves(b, 2)


def _fifth(packed: np.ndarray) -> np.ndarray:
    """u8[blocks, 32]: 16 where the weight's fifth bit is set, of u8[blocks, 4]."""
    return np.unpackbits(packed, axis=1, bitorder="little") << 4


def _q5_0(b: np.ndarray) -> np.ndarray:
    return _halves(b, 0) * ((_nibbles(b[:, 6:]) | _fifth(b[:, 2:6])).astype(np.float32) - 16)


def _q5_1(b: np.ndarray) -> np.ndarray:
    return _halves(b, 0) * (_nibbles(b[:, 8:]) | _fifth(b[:, 4:8])).astype(np.float32) + _halves(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return _halves(b, 0) * b[:, 2:].view(np.int8).astype(np.float32)


# Blocks of 256 in parts of 16 or 32, each with a scale of its own ("K"). [blocks, parts, weights of a part]


def _scaled(weights: np.ndarray, scales: np.ndarray, least: np.ndarray | None = None) -> np.ndarray:
    """f32[blocks, 256]: weights [blocks, parts, n] times scales [blocks, parts], less `least` [blocks, parts]."""
    out = scales.astype(np.float32)[..., None] * weights.astype(np.float32)
    if least is not None:
        out -= least.astype(np.float32)[..., None]
    return out.reshape(len(weights), -1)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scales, least) u8[blocks, 8] of u8[blocks, 12], as Q4_K and Q5_K pack them."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([a & 63, c & 15 | a >> 6 << 4], axis=1)
    return scales, np.concatenate([b & 63, c >> 4 | b >> 6 << 4], axis=1)


def _q2_k(b: np.ndarray) -> np.ndarray:
    # Two halves of 128, in each four runs of 32 by pairs of bits, in each two parts.
    weights = _pairs(b[:, 16:80].reshape(-1, 2, 32)).reshape(-1, 16, 16)
    scales, least = b[:, :16] & 15, b[:, :16] >> 4
    return _scaled(weights, _halves(b, 80) * scales, _halves(b, 82) * least)


def _q3_k(b: np.ndarray) -> np.ndarray:
    low = _pairs(b[:, 32:96].reshape(-1, 2, 32)).reshape(-1, 8, 32)
    weights = (low | _bits(b[:, :32]) << 2).astype(np.int8) - 4  # the third bit of run i is bit i of the first bytes
    packed = b[:, 96:108]
    scales = _nibbles(packed[:, :8]) | _pairs(packed[:, 8:]).reshape(-1, 16) << 4
    return _scaled(weights.reshape(-1, 16, 16), _halves(b, 108) * (scales.astype(np.float32) - 32))


def _q4_k(b: np.ndarray) -> np.ndarray:
    scales, least = _six_bits(b[:, 4:16])
    weights = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return _scaled(weights, _halves(b, 0) * scales, _halves(b, 2) * least)


def _q5_k(b: np.ndarray) -> np.ndarray:
    scales, least = _six_bits(b[:, 4:16])
    weights = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | _bits(b[:, 16:48]) << 4
    return _scaled(weights, _halves(b, 0) * scales, _halves(b, 2) * least)


def _q6_k(b: np.ndarray) -> np.ndarray:
    # Two halves of 128, in each four runs of 32: two by low halves of bytes, two by high ones.
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    high = _pairs(b[:, 128:192].reshape(-1, 2, 32))
    weights = (low | high << 4).astype(np.int8) - 32
    return _scaled(weights.reshape(-1, 16, 16), _halves(b, 208) * b[:, 192:208].view(np.int8))


# Weights by a table ("IQ4")

_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


def _iq4_nl(b: np.ndarray) -> np.ndarray:
    return _halves(b, 0) * _VALUES[_nibbles(b[:, 2:])]


def _iq4_xs(b: np.ndarray) -> np.ndarray:
    high = b[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    scales = (low | high.astype(np.uint8) << 4).astype(np.float32) - 32
    return _scaled(_VALUES[_nibbles(b[:, 8:].reshape(-1, 8, 16))], _halves(b, 0) * scales)


BLOCKS = {
    2: Block(18, 32, _q4_0), 3: Block(20, 32, _q4_1), 6: Block(22, 32, _q5_0), 7: Block(24, 32, _q5_1),
    8: Block(34, 32, _q8_0), 10: Block(84, 256, _q2_k), 11: Block(110, 256, _q3_k), 12: Block(144, 256, _q4_k),
    13: Block(176, 256, _q5_k), 14: Block(210, 256, _q6_k), 20: Block(18, 32, _iq4_nl), 23: Block(136, 256, _iq4_xs),
}  # fmt: skip
