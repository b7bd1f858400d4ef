"""Randomness as a function: the noise of a token depends on (key, position, token id) and on nothing else.

The function is "gumbel-fmix32/1". All arithmetic is unsigned 32 bit and wraps; here it runs on int32 tensors, whose
products wrap the same way and whose right shifts are masked to be logical. A draw is the argmax over the allowed tokens of
logits / temperature + noise (Gumbel-max), which samples the softmax of logits / temperature.
"""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "gumbel-fmix32/1"


def _i32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


GOLDEN, SECOND = _i32(0x9E3779B9), _i32(0x7F4A7C15)
MIX1, MIX2 = _i32(0x85EBCA6B), _i32(0xC2B2AE35)
BELOW_ONE = 1.0 - 2.0**-24


def split_key(key: int) -> tuple[int, int]:
    """A 64-bit key as two int32 (low, high), the form in which slots keep it."""
    return _i32(key & 0xFFFFFFFF), _i32(key >> 32 & 0xFFFFFFFF)


def _shift_xor_(x: Tensor, bits: int) -> Tensor:
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _fmix(x: Tensor) -> Tensor:
    x = _shift_xor_(x.clone(), 16).mul_(MIX1)
    x = _shift_xor_(x, 13).mul_(MIX2)
    return _shift_xor_(x, 16)


def _row_words(key: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    a = _fmix(key[:, 0] ^ _fmix(position.to(torch.int32) + GOLDEN))
    return a, _fmix(key[:, 1] ^ _fmix(a + SECOND))


def _token_bits(token: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x = _shift_xor_(token * GOLDEN + a, 16).mul_(MIX1).bitwise_xor_(b)
    x = _shift_xor_(x, 13).mul_(MIX2)
    return _shift_xor_(x, 16)


def token_bits(key: Tensor, position: Tensor, vocab_size: int) -> Tensor:
    """The 32 random bits of every token: key [n, 2] int32, position [n] → int32 [n, V]."""
    a, b = _row_words(key, position)
    return _token_bits(torch.arange(vocab_size, dtype=torch.int32, device=key.device), a[:, None], b[:, None])


def uniform(bits: Tensor) -> Tensor:
    """(x + 0.5) / 2^32 of random bits x as float32, rounded once, at most 1 - 2^-24."""
    # high and low half are exact in float32, so only their sum is rounded
    high = (bits >> 16).bitwise_and_(0xFFFF).float().mul_(65536.0)
    return high.add_((bits & 0xFFFF).float().add_(0.5)).mul_(2.0**-32).clamp_(max=BELOW_ONE)


def gumbel(bits: Tensor) -> Tensor:
    """Standard Gumbel noise float32 from random bits of the same shape."""
    return uniform(bits).neg_().log1p_().neg_().log_().neg_()


def draw(logits: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """One token a row: logits [n, V] float32 after temperature and filters (−inf: not allowed), key [n, 2] int32,
    position [n] of the tokens that are drawn → int64 [n]."""
    return gumbel(token_bits(key, position, logits.shape[1])).add_(logits).argmax(-1)


def draw_among(logits: Tensor, tokens: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """The same as `draw`, for a device that knows which few tokens can win: tokens [n, C] int64, ascending, and their logits
    [n, C] → int64 [n]."""
    a, b = _row_words(key, position)
    noisy = gumbel(_token_bits(tokens.int(), a[:, None], b[:, None])).add_(logits)
    return tokens.gather(1, noisy.argmax(-1, keepdim=True)).squeeze(1)


def draw_kept(logits: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """The same as `draw`, for logits of which few are allowed, where reading their number costs nothing. Overwrites `logits`."""
    a, b = _row_words(key, position)
    row, token = (logits > float("-inf")).nonzero(as_tuple=True)
    logits[row, token] += gumbel(_token_bits(token.int(), a[row], b[row]))
    return logits.argmax(-1)
