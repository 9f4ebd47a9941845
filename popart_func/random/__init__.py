"""Random numbers without state: the keys and draws of `jax.random`, in plain PyTorch operations.

A key is an int32 tensor ``[2]``: the two 32-bit words of JAX's threefry key (`jax.random.key_data` has them as uint32).
The same key gives the same numbers as in JAX 0.5 and newer (`jax_threefry_partitionable`). Names, arguments and
defaults are those of `jax.random`; `dtype` may only be what is drawn, float32 or int32.

Numbers have the bits that XLA computes on CPUs. XLA on another device may differ in the last bits; inside
`interop.jax.to_jax_function` XLA itself computes them. These draws are JAX's to rounding only:

- `cauchy`, `weibull_min`, `generalized_normal`, `ball`: XLA calls the machine's C library for ``tan`` and ``pow``;
- `maxwell`, `double_sided_maxwell`: the order in which XLA adds depends on the shape;
- `truncated_normal` where a bound is a tensor: so do the last bits of the bounds;
- `gamma` and what is made of it: XLA takes a reciprocal root whose last bits are the processor's;
- `poisson` from a rate of 10 on, `binomial`, `multinomial`: a candidate is accepted by a test of logarithms, whose last
  bits may differ, so that one number in 10⁴ is another one (one in 500 at a rate of 10⁵);
- `orthogonal`, `multivariate_normal`: a factorization by LAPACK.

`gamma`, `poisson` and `binomial` draw until a number is accepted in JAX, but a fixed number of rounds here. In the rare
case that these do not suffice, a number is NaN, and a Poisson number −1. Left out: Gumbel numbers of mode
``"highest"``, other dtypes, and keys of other generators.

Every draw is a pure function of its key. It works under `torch.vmap` (lane *i* gets what seed *i* gets alone), under
`torch.compile`, in a traced step and on every engine, with two exceptions. `orthogonal` and `multivariate_normal` need
an engine that has the factorization. `gamma`, what is made of it, `poisson` and `binomial` are thousands of operations,
which take long to compile. `keyed` makes PyTorch's own random layers and functions draw from a key, and `initializers`
has JAX's initial parameters of networks.

Use a key once: `split` it, or `fold_in` a counter.

>>> action, noise = split(key(0))
>>> randint(action, (3,), 0, 10)
tensor([1, 1, 7], dtype=torch.int32)
"""

from popart_func.random.basic import bernoulli, bits, normal, rademacher, randint, uniform
from popart_func.random.choices import categorical, choice, gumbel, permutation
from popart_func.random.continuous import (
    cauchy,
    double_sided_maxwell,
    exponential,
    laplace,
    logistic,
    lognormal,
    maxwell,
    pareto,
    rayleigh,
    triangular,
    truncated_normal,
    wald,
    weibull_min,
)
from popart_func.random.counts import binomial, geometric, multinomial, poisson
from popart_func.random.gammas import ball, beta, chisquare, dirichlet, f, gamma, generalized_normal, loggamma, t
from popart_func.random.keyed import keyed
from popart_func.random.keys import fold_in, key, split
from popart_func.random.vectors import multivariate_normal, orthogonal

__all__ = [
    "ball",
    "bernoulli",
    "beta",
    "binomial",
    "bits",
    "categorical",
    "cauchy",
    "chisquare",
    "choice",
    "dirichlet",
    "double_sided_maxwell",
    "exponential",
    "f",
    "fold_in",
    "gamma",
    "generalized_normal",
    "geometric",
    "gumbel",
    "key",
    "keyed",
    "laplace",
    "loggamma",
    "logistic",
    "lognormal",
    "maxwell",
    "multinomial",
    "multivariate_normal",
    "normal",
    "orthogonal",
    "pareto",
    "permutation",
    "poisson",
    "rademacher",
    "randint",
    "rayleigh",
    "split",
    "t",
    "triangular",
    "truncated_normal",
    "uniform",
    "wald",
    "weibull_min",
]
