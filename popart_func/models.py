"""Modules as pure functions (`stateless`), their first parameters by seed, their split at the head; example networks.

A network is split before its last linear layer, the *head*: ``h = lower(x)``, ``n = W h + b``. Parameters are flat
dicts from name to tensor, as `torch.nn.Module.named_parameters` gives them. A module is a blueprint: it runs only
on parameters that are passed in.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, SupportsIndex

import optree
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.parameter import is_lazy

from popart_func import tree
from popart_func._checks import check_head_name, is_known
from popart_func._module_calls import aliases_of, call_module, copied
from popart_func._torch import is_batched
from popart_func.random.keyed import keyed

__all__ = [
    "LowerLayers",
    "Params",
    "SplitParams",
    "Stateless",
    "UnifiedModel",
    "UpperLayer",
    "init_lanes",
    "init_params",
    "split",
    "stateless",
    "unify",
]

Params = Mapping[str, Tensor]
"""A module's parameters by name."""


class LowerLayers(nn.Module):
    """All but the last layer: four linear layers, each followed by tanh. Maps ``[..., n_in]`` to ``[..., H]``."""

    def __init__(self, n_in: int, H: int) -> None:
        super().__init__()
        self.input_linear = nn.Linear(n_in, H)
        self.hidden1 = nn.Linear(H, H)
        self.hidden2 = nn.Linear(H, H)
        self.hidden3 = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        """The last hidden layer's activations."""
        h = torch.tanh(self.input_linear(x))
        h = torch.tanh(self.hidden1(h))
        h = torch.tanh(self.hidden2(h))
        return torch.tanh(self.hidden3(h))


class UpperLayer(nn.Module):
    """The head: one linear layer that starts as the sum of its inputs. Maps ``[..., H]`` to ``[..., n_out]``."""

    def __init__(self, H: int, n_out: int) -> None:
        super().__init__()
        self.output_linear = nn.Linear(H, n_out)
        _init_head(self.output_linear)

    def forward(self, h: Tensor) -> Tensor:
        """The normalized outputs."""
        return self.output_linear(h)


class UnifiedModel(LowerLayers):
    """`LowerLayers` and `UpperLayer` in one module, with their names and their initialisation."""

    def __init__(self, n_in: int, H: int, n_out: int) -> None:
        super().__init__(n_in, H)
        self.output_linear = nn.Linear(H, n_out)
        _init_head(self.output_linear)

    def forward(self, x: Tensor) -> Tensor:
        """The normalized outputs."""
        return self.output_linear(super().forward(x))


def _init_head(linear: nn.Linear) -> None:
    # nn.Linear has drawn its usual values by now, so that the random stream advances as for any other layer.
    nn.init.ones_(linear.weight)
    nn.init.zeros_(linear.bias)


class Stateless:
    """A module as a pure function of its parameters and buffers, made by `stateless`.

    Attributes:
        trainable: the names of the parameters that are trained: those with ``requires_grad``.
        frozen: the names of the other parameters.
        buffers: the names of the buffers.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.trainable = frozenset(name for name, one in module.named_parameters() if one.requires_grad)
        self.frozen = frozenset(name for name, one in module.named_parameters() if not one.requires_grad)
        self.buffers = frozenset(name for name, _ in module.named_buffers())
        self._names = self.trainable | self.frozen | self.buffers
        # The other names of tied parameters and buffers, which a state_dict has too.
        self._aliases = aliases_of(module)

    def __call__(self, params: Params, *args: Any, rngs: Tensor | None = None, **kwargs: Any) -> Any:
        """What the module returns. What it changes in its buffers is dropped: `with_buffers` returns it."""
        return self.with_buffers(params, *args, rngs=rngs, **kwargs)[0]

    def with_buffers(
        self, params: Params, *args: Any, rngs: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """What the module returns, and its buffers afterwards, such as the running statistics of batch normalization.

        Args:
            params: parameters and buffers by name, as `init_params` gives them.
            *args: the module's arguments.
            rngs: a key of `popart_func.random` for dropout and other random layers; see `random.keyed`.
            **kwargs: the module's arguments by name.

        Raises:
            ValueError: ``params`` lacks a name, has another, or gives tied names different values.
        """
        given = self._canonical(params)
        if self.buffers:
            # A module changes its buffers in place: it gets copies, one for each lane where anything differs by lane.
            others: Any = (args, kwargs)
            wrapped = [leaf for leaf in (*given.values(), *optree.tree_leaves(others)) if is_batched(leaf)]
            true = wrapped[0].new_ones((), dtype=torch.bool) if wrapped else None
            given |= {name: copied(given[name], true) for name in self.buffers}
        given |= {name: given[first] for name, first in self._aliases.items()}
        with nullcontext() if rngs is None else keyed(rngs):
            return call_module(self._module, given, self.buffers, args, kwargs)

    def _canonical(self, params: Params) -> dict[str, Tensor]:
        given = {name: leaf for name, leaf in params.items() if name not in self._aliases}
        if given.keys() != self._names:
            expected = self._names
            raise ValueError(
                f"stateless: `params` must have the names of the parameters and buffers of "
                f"{type(self._module).__name__}, as popart_func.init_params gives them: missing "
                f"{sorted(expected - given.keys())}, unexpected {sorted(given.keys() - expected)}."
            )
        for name in self._aliases.keys() & params.keys():
            leaf, other = params[name], given[self._aliases[name]]
            if is_known(leaf, other) and not torch.equal(leaf, other):
                raise ValueError(
                    f"stateless: {name!r} and {self._aliases[name]!r} of `params` are one tensor in "
                    f"{type(self._module).__name__}, and must have the same values: leave {name!r} out."
                )
        return given


def stateless(module: nn.Module) -> Stateless:
    """A module as a pure function: ``apply(params, *args, **kwargs) == module(*args, **kwargs)`` with these parameters.

    The module is a blueprint: its own parameters and buffers are neither read nor changed. Learners train the
    parameters with ``requires_grad``, leave the others where they are, and carry the buffers from step to step. Random
    layers such as dropout draw from a key, ``apply(params, x, rngs=key)``; a learner's update takes one by
    ``with random.keyed(key):``. Threads that call one module run one after the other: give each a copy to run at once.

    Raises:
        TypeError: ``module`` is no module.
        ValueError: a parameter has no shape yet, or has a hook; or, in a call, the module changes a buffer that it has
            registered in a call.

    >>> apply = stateless(UpperLayer(2, 1))
    >>> params = {"output_linear.weight": torch.tensor([[3.0, 4.0]]), "output_linear.bias": torch.tensor([1.0])}
    >>> apply(params, torch.ones(2))
    tensor([8.])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"stateless: `module` must be a torch.nn.Module, got {type(module).__name__}.")
    _refuse_lazy("stateless", module)
    hooked = [name for name, one in module.named_parameters() if one._backward_hooks or one._post_accumulate_grad_hooks]
    if hooked:
        raise ValueError(
            f"stateless: no parameter may have a hook, which PyTorch calls for the module's own tensor only, got hooks "
            f"of {hooked}: change gradients in a transformation of the optimizer, such as optim.chain."
        )
    return Stateless(module)


def _refuse_lazy(caller: str, module: nn.Module) -> None:
    lazy = [name for name, leaf in (*module.named_parameters(), *module.named_buffers()) if is_lazy(leaf)]
    if lazy:
        raise ValueError(
            f"{caller}: every parameter must have a shape, but {lazy} wait for a first input: call the module once on "
            f"an example before, as in `make_module`."
        )


def init_params(make_module: Callable[[], nn.Module], seed: SupportsIndex | Tensor) -> dict[str, Tensor]:
    """The parameters and buffers of a new module under a seed, or under a key; the global random state stays as it was.

    Under an integer they are bit-equal to those of ``torch.manual_seed(seed); make_module()``. Under a key of
    `popart_func.random` the module draws as within `random.keyed`: a pure function of the key, for `torch.vmap`, steps
    of `scan_lanes` and `interop.jax.to_jax_function`.

    Args:
        make_module: builds the module, drawing from the global generator as `torch.nn` does. Build on the CPU and move
            the result: a GPU's generator is seeded (and put back) only where CUDA is initialised already.
        seed: an integer, or a key, ``[2]``.

    Returns:
        Name to tensor, detached.

    Raises:
        TypeError: under a key, the module draws by something that has no form with a key.

    >>> sorted(init_params(lambda: UpperLayer(3, 1), seed=0))
    ['output_linear.bias', 'output_linear.weight']
    """
    if isinstance(seed, Tensor) and seed.ndim:
        with keyed(seed):
            module = make_module()
    else:
        module = _seeded(make_module, operator.index(seed))
    _refuse_lazy("init_params", module)
    return {name: leaf.detach() for name, leaf in (*module.named_parameters(), *module.named_buffers())}


def _seeded(make_module: Callable[[], nn.Module], seed: int) -> nn.Module:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        return make_module()


def init_lanes(make_module: Callable[[], nn.Module], seeds: Iterable[SupportsIndex] | Tensor) -> dict[str, Tensor]:
    """`init_params` for each seed or key, stacked on a leading lane axis.

    Under integers a module is built for each lane, which takes 0.2 ms for a small one. Under keys one is built, under
    `torch.vmap`, and all lanes draw at once, the numbers that each key gives alone: 25 µs a lane for 3000 lanes of the
    paper's network, and under 1 µs in a step of ``scan_lanes(..., engine="native")``.

    Args:
        make_module: see `init_params`.
        seeds: integers, or keys ``[lanes, 2]``, such as ``random.split(key, lanes)``.

    Raises:
        TypeError, ValueError: no seeds, or a tensor of neither integers nor keys.
        RuntimeError: under keys, `torch.vmap` has no rule for something that builds the module.

    >>> init_lanes(lambda: UpperLayer(3, 1), seeds=range(5))["output_linear.weight"].shape
    torch.Size([5, 1, 3])
    """
    if isinstance(seeds, Tensor):
        if seeds.ndim != 1 and (seeds.dtype, seeds.shape[1:]) != (torch.int32, (2,)):
            raise TypeError(
                f"init_lanes: `seeds` must be integers, or int32 keys [lanes, 2] such as random.split gives, got "
                f"{seeds.dtype} of shape {tuple(seeds.shape)}."
            )
    else:
        seeds = list(seeds)
    if not len(seeds):
        raise ValueError("init_lanes: `seeds` must hold at least one seed, got none.")
    if isinstance(seeds, Tensor) and seeds.ndim == 2:
        try:
            return vmap(lambda key: init_params(make_module, key))(seeds)
        except RuntimeError as error:
            raise RuntimeError(
                f"init_lanes: torch.vmap can't build this module for all keys at once: {error} Pass integers as "
                f"`seeds`, or stack what `init_params` gives for each key."
            ) from error
    return tree.stack([init_params(make_module, seed) for seed in seeds])


class SplitParams(NamedTuple):
    """A network's parameters, split at its head. Both halves keep their full names."""

    lower: dict[str, Tensor]
    upper: dict[str, Tensor]


def split(params: Params, head: str = "output_linear") -> SplitParams:
    """Splits the flat parameters of any module at its head.

    Args:
        params: name to tensor.
        head: the name of the last linear layer, such as ``"output_linear"`` or ``"critic.head"``.

    Returns:
        ``upper``: the entries below ``head``; ``lower``: all others. `unify` is the inverse.

    Raises:
        ValueError: no parameter lies below ``head``.

    >>> lower, upper = split(init_params(lambda: UnifiedModel(16, 10, 1), seed=0))
    >>> sorted(upper)
    ['output_linear.bias', 'output_linear.weight']
    """
    check_head_name("split", params, head)
    upper = {name: value for name, value in params.items() if name.startswith(f"{head}.")}
    return SplitParams(lower={name: value for name, value in params.items() if name not in upper}, upper=upper)


def unify(split_params: SplitParams) -> dict[str, Tensor]:
    """Merges the two halves into one flat dict: the inverse of `split`.

    Raises:
        ValueError: a name is in both halves.

    >>> params = init_params(lambda: UnifiedModel(16, 10, 1), seed=0)
    >>> tree.max_difference(params, unify(split(params)))
    tensor(0.)
    """
    lower, upper = split_params
    both = sorted(lower.keys() & upper.keys())
    if both:
        raise ValueError(f"unify: `lower` and `upper` must have different names, got {both} in both.")
    return {**lower, **upper}
