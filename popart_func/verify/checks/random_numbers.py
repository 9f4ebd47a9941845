"""Checks of `popart_func.random` against Threefry's published answers and formulas in int64 and float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from popart_func import random
from popart_func.random import keys
from popart_func.verify import draw
from popart_func.verify.check import Settings, check
from popart_func.verify.discrepancy import Discrepancy, compare, worst

__all__ = ["CHECKS"]

WORD = 2**32 - 1
DRAWS = 12

KNOWN_ANSWERS = (
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((WORD, WORD), (WORD, WORD), (0x1CB996FC, 0xBB002BE7)),
    ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
)
"""Keys, counters and results of Threefry-2x32 with 20 rounds, from Random123's file of known answers."""

ZERO_SEED = 780233
"""A seed whose first uniform number is 0, which one number in 2²³ is."""


@check("bits, keys, integers, permutations = Threefry-2x32 in int64, known answers", "Salmon 2011", architectures=(0,))
def random_bits(key: Tensor, settings: Settings) -> Discrepancy:
    """All that is made of bits alone has the bits of the same formula in unsigned arithmetic."""
    answers = [_known(key, *answer) for answer in KNOWN_ANSWERS]
    words = _unsigned(key)
    first, second = _words(words, torch.arange(DRAWS, device=key.device)).unbind(-1)
    bits = first ^ second
    second_key = _words(words, torch.arange(2, device=key.device))
    high, low = (_bits(one, DRAWS) for one in second_key)
    ends = draw.uniforms(key, torch.float32, least=(DRAWS,), span=(DRAWS,))
    least = draw.between(-1e6, 1e6, ends["least"]).int()
    span = draw.log_between(1, 1e9, ends["span"]).int()
    pairs = [
        (random.split(key, DRAWS), torch.stack([first, second], -1)),
        (random.fold_in(key, 7), _words(words, torch.full((), 7, device=key.device))),
        (random.bits(key, (DRAWS,)), bits),
        (random.randint(key, (DRAWS,), least, least + span), _integers(high, low, least.long(), span.long())),
        (random.randint(key, (DRAWS,), -3, 1000), _integers(high, low, -3, 1003)),
        (random.permutation(key, DRAWS), torch.argsort(_bits(second_key[1], DRAWS), stable=True)),
    ]
    got, expected = zip(*answers, *((_unsigned(one), other & WORD) for one, other in pairs), strict=True)
    return compare(got, expected, expected, 0, settings.dtype)


def _known(key: Tensor, words: tuple[int, int], counter: tuple[int, int], answer: tuple[int, int]) -> Any:
    """What the library and Random123 give for a key and a counter."""
    made, first, second = (
        torch.tensor(numbers, device=key.device).to(torch.int32) for numbers in (words, counter[:1], counter[1:])
    )
    got = torch.cat(keys.threefry(made, first, second))
    return _unsigned(got), torch.tensor(answer, device=key.device)


def _unsigned(words: Tensor) -> Tensor:
    """The unsigned numbers of 32 bits, in int64."""
    return words.long() & WORD


def _words(key: Tensor, counter: Tensor) -> Tensor:
    """Threefry-2x32 of counters below 2³², ``[..., 2]``, round by round, in int64."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ 0x1BD11BDA)
    first, second = keys[0].expand(counter.shape), (counter + keys[1]) & WORD
    for turn, by in enumerate((13, 15, 26, 6, 17, 29, 16, 24, 13, 15, 26, 6, 17, 29, 16, 24, 13, 15, 26, 6), start=1):
        first = (first + second) & WORD
        second = ((second << by) & WORD | (second >> (32 - by))) ^ first
        if turn % 4 == 0:
            group = turn // 4
            first, second = (first + keys[group % 3]) & WORD, (second + keys[(group + 1) % 3] + group) & WORD
    return torch.stack([first, second], -1)


def _bits(key: Tensor, count: int) -> Tensor:
    first, second = _words(key, torch.arange(count, device=key.device)).unbind(-1)
    return first ^ second


def _integers(high: Tensor, low: Tensor, least: int | Tensor, span: int | Tensor) -> Tensor:
    """Integers from words of 64 bits, whose upper halves JAX multiplies in 32 bits."""
    power = (2**16 % span) ** 2 % 2**32 % span
    return ((high % span * power + low % span) & WORD) % span + least


@check("uniform, normal, exponential, Gumbel numbers, coins, categories = formulas", "README", architectures=(0,))
def random_numbers(key: Tensor, settings: Settings) -> Discrepancy:
    """Numbers are those of their bits by the formula in float64; also for an empty interval and a uniform number of 0.

    They are float32, whatever the dtype of the check. Roundings: two of a uniform number between bounds. XLA's
    logarithm and inverse error function err by four units in the last place at most. The latter also rounds the square
    of its argument x, which moves a normal number n by ``√(π/8) exp(n²/2) x``.
    """
    zero = random.key(ZERO_SEED).to(key.device)
    numbers = draw.uniforms(random.fold_in(key, 1), torch.float32, low=(DRAWS,), width=(DRAWS,), logits=(DRAWS,))
    low = draw.magnitude(numbers["low"]) * torch.sign(numbers["low"] - 0.3)
    high = low + draw.between(-1, 3, numbers["width"]) * low.abs()  # below the lower end for a quarter
    logits = 3 * draw.heavy_tailed(numbers["logits"])
    parts = []
    for one in (key, zero):
        unit = ((_unsigned(random.bits(one, (DRAWS,)))) >> 9).double() * 2.0**-23
        centred = (2 * unit - (1 - 2.0**-24)).float().double()
        normal = math.sqrt(2) * torch.special.erfinv(centred)
        of_square = math.sqrt(math.pi / 8) * (normal.square() / 2).exp() * centred.abs()
        gumbel = -torch.log(-torch.log(unit.clamp(min=2.0**-126)))
        between = torch.maximum(low.double() + unit * (high - low).double(), low.double())
        size = low.double().abs() + (high - low).double().abs()
        expected = {
            "uniform": (random.uniform(one, (DRAWS,)), unit, 0 * unit),
            "between": (random.uniform(one, (DRAWS,), minval=low, maxval=high), between, size / 4),
            "normal": (random.normal(one, (DRAWS,)), normal, normal.abs() + of_square),
            "exponential": (random.exponential(one, (DRAWS,)), *2 * [-torch.log1p(-unit)]),
            "gumbel": (random.gumbel(one, (DRAWS,)), gumbel, 1 + gumbel.abs()),
            "bernoulli": (random.bernoulli(one, 0.3, (DRAWS,)), (unit < 0.3).double(), 0 * unit),
        }
        parts += [compare(got, value, terms, 8, torch.float32) for got, value, terms in expected.values()]
        # Where the number is 0, the score is still finite, and a category that is ahead is drawn.
        ahead = 40.0 * (torch.arange(DRAWS, device=key.device) == unit.argmin()).float()
        for weights in (logits, ahead):
            scores = weights.double() + gumbel
            drawn = scores.index_select(0, random.categorical(one, weights)[None]).squeeze(0)
            best = scores.amax()
            parts.append(compare(drawn, best, 1 + scores.abs().amax(), 8, torch.float32))
    return worst(*parts)


CHECKS = (random_bits, random_numbers)
