"""Compares an entry of PyTorch's `op_db` in eager mode with the same function in JAX, or as a step of an engine.

An op is a pure function of its tensor arguments; all else is closed over. A **sample** gives one of the verdicts, and
an **entry** the worst of its samples':

- ``right``: the values agree to float32's rounding, and so do shapes and kinds of dtypes.
- ``refused``: our own error, which names the op or the line.
- ``wrong``: another value, shape or kind of dtype.
- ``raw``: an error of anyone else.
- ``not comparable``: PyTorch itself gives no one answer; the reason says why.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from op_samples import all_samples, op_entries
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from popart_func._torch import FakeTensorMode, TorchDispatchMode, mutation_count
from popart_func.engines.lane_scan import EngineUnavailableError, UnsupportedError
from popart_func.engines.tracing.source_lines import TraceError

__all__ = [
    "STAGES",
    "Case",
    "NotComparableError",
    "Verdict",
    "cases",
    "compare_entry",
    "compare_together",
    "entries_by_name",
    "stacked",
    "two_lanes",
]

STAGES = ("value", "gradient", "vmap", "jvp")
_ORDER = ("right", "refused", "raw", "wrong")
# These return memory that nothing has been written to.
_UNINITIALIZED = ("empty", "new_empty", "resize_")
# Factors of a matrix that are unique up to signs or phases: the entry's own function makes them comparable.
_UP_TO_SIGNS = ("svd", "eig", "pca_lowrank", "geqrf")
_ONE_DERIVATIVE = ("native_layer_norm", "native_batch_norm", "_native_batch_norm_legit", "_batch_norm_with_update")
_TWICE = "PyTorch's gradient where two elements go to one place is that of both, JAX's that of the one that is kept"
# The function reads the lower triangle only. For it JAX's gradient agrees with finite differences to 1e-7.
_ASYMMETRIC = "of a matrix that is not symmetric, PyTorch's gradient is not the derivative"
KNOWN: dict[str, dict[str, str]] = {
    stage: {
        **{f"nn_functional_max_unpool{rank}d": _TWICE for rank in (1, 2, 3)},
        "linalg_pinv_hermitian": _ASYMMETRIC,
        "as_strided_scatter": "PyTorch's gradient goes by the memory of the argument, and is not the derivative",
    }
    for stage in ("gradient", "jvp")
}
"""Differences of derivatives that are PyTorch's or JAX's own, by stage and the entry's name and variant."""
_OURS = (UnsupportedError, TraceError, EngineUnavailableError, TypeError, ValueError)


class Verdict(NamedTuple):
    """What came of a comparison, and why."""

    verdict: str
    reason: str = ""


class NotComparableError(Exception):
    """PyTorch itself gives no one answer."""


class Case(NamedTuple):
    """A sample as a function of tensors: of ``tensors``, and of others of the same shapes, ``others``."""

    function: Callable[..., list[Tensor]]
    tensors: list[Tensor]
    others: list[Tensor]
    expected: list[Tensor]
    exact: list[Tensor] | None
    only_first: bool  # whether PyTorch differentiates the first result only, and takes the others to be constant


def entries_by_name() -> dict[str, Any]:
    """The float32 entries of `op_db`, by name and variant."""
    return {entry.formatted_name: entry for entry in op_entries()}


def cases(entry: Any, most: int) -> Iterator[Case | NotComparableError]:
    """The samples of an entry; an error in the place of each that is not comparable."""
    seed = zlib.crc32(entry.formatted_name.encode())
    try:
        torch.manual_seed(seed)
        samples = [sample for _, sample in zip(range(most), all_samples(entry), strict=False)]
        torch.manual_seed(seed + 1)
        others = [sample for _, sample in zip(range(most), all_samples(entry), strict=False)]
    except Exception as error:
        yield NotComparableError(f"PyTorch can't make samples: {_first_line(error)}")
        return
    if not samples:
        yield NotComparableError("no samples in float32")
    for sample, other in zip(samples, others, strict=True):
        try:
            yield _case(entry, sample, other)
        except NotComparableError as error:
            yield error


def _case(entry: Any, sample: Any, other: Any) -> Case:
    leaves, structure = tree_flatten((sample.input, tuple(sample.args), sample.kwargs))
    other_leaves = tree_flatten((other.input, tuple(other.args), other.kwargs))[0]
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    tensors = [leaves[place].detach() for place in places]
    if any(tensor.layout != torch.strided or tensor.is_nested for tensor in tensors):
        raise NotComparableError("sparse or nested arguments")
    if entry.name.startswith(_UNINITIALIZED) or "empty" in entry.name:
        raise NotComparableError("uninitialized memory")
    process = sample.output_process_fn_grad if any(part in entry.name for part in _UP_TO_SIGNS) else lambda out: out

    def function(*given: Tensor) -> list[Tensor]:
        filled = list(leaves)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        x, args, kwargs = tree_unflatten(filled, structure)
        result = process(entry.op(x, *args, **kwargs))
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    kept = [tensor.clone() for tensor in tensors]
    counts = list(map(mutation_count, kept))
    with _Draws() as draws:
        before = torch.get_rng_state()
        expected = _in_eager(function, kept, seed=None)
    if draws.draws or (draws.may_draw and not torch.equal(before, torch.get_rng_state())):
        raise NotComparableError("random")
    if counts != list(map(mutation_count, kept)) or not all(map(_equal, kept, tensors)):
        raise NotComparableError("works in place")
    if not expected:
        raise NotComparableError("returns no tensor")
    if any(tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized for tensor in expected):
        raise NotComparableError("sparse, nested or quantized results")
    if _has_dynamic_shape(function, tensors):
        raise NotComparableError("a shape that depends on values")
    same = len(leaves) == len(other_leaves) and all(
        isinstance(other_leaves[place], Tensor) and _spec(other_leaves[place]) == _spec(leaves[place])
        for place in places
    )
    others = [other_leaves[place].detach() for place in places] if same else tensors
    return Case(function, tensors, others, expected, _exact(function, tensors), entry.name in _ONE_DERIVATIVE)


class _Draws(TorchDispatchMode):
    """Notes whether an op is called that may draw random numbers, and whether one is that does."""

    may_draw = draws = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.may_draw = True
            self.draws |= func.overloadpacket.__name__.startswith(
                ("rand", "bernoulli", "normal", "uniform", "native_d")
            )
        return func(*args, **(kwargs or {}))


def _in_eager(function: Callable[..., list[Tensor]], tensors: list[Tensor], seed: int | None = 0) -> list[Tensor]:
    if seed is not None:
        torch.manual_seed(seed)
    try:
        return [value.detach().resolve_conj().resolve_neg().clone() for value in function(*tensors)]
    except Exception as error:
        raise NotComparableError(f"PyTorch raises: {_first_line(error)}") from error


def _has_dynamic_shape(function: Callable[..., list[Tensor]], tensors: list[Tensor]) -> bool:
    """Whether PyTorch says that the shape of a result depends on values."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException

    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            function(*map(mode.from_tensor, tensors))
    except DynamicOutputShapeException:
        return True
    except Exception:
        return False
    return False


def _exact(function: Callable[..., list[Tensor]], tensors: list[Tensor]) -> list[Tensor] | None:
    """The results in double precision, by which rounding is judged; None where PyTorch can't compute them."""
    try:
        return [value.detach().resolve_conj().resolve_neg() for value in function(*map(_wide, tensors))]
    except Exception:
        return None


def _wide(tensor: Tensor) -> Tensor:
    wider = {torch.float32: torch.float64, torch.complex64: torch.complex128}
    return tensor.to(wider.get(tensor.dtype, tensor.dtype), copy=True)


def _spec(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def compare_entry(
    entry: Any, target: str, *, most: int = 4, stages: tuple[str, ...] = ("value",)
) -> dict[str, Verdict]:
    """The verdict on an entry for each stage; the reason is that of its worst sample.

    Args:
        entry: of `op_db`.
        target: ``"jax"``, or the name of an engine.
        most: how many samples.
        stages: of `STAGES`; all but ``"value"`` for the target ``"jax"`` only.
    """
    found: dict[str, list[Verdict]] = {stage: [] for stage in stages}
    reasons = []
    for case in cases(entry, most):
        if isinstance(case, NotComparableError):
            reasons.append(str(case))
            continue
        for stage in stages:
            found[stage].append(_judge(entry, case, target, stage))
    return {stage: _worst(several, reasons) for stage, several in found.items()}


def compare_together(entries: list[Any], engine: str, *, most: int = 4) -> dict[str, Verdict]:
    """The verdicts on the values of several entries, whose samples are computed by as few kernels as possible.

    Args:
        entries: of `op_db`.
        engine: the name of an engine.
        most: how many samples of each.
    """
    found: dict[str, list[Verdict]] = {entry.formatted_name: [] for entry in entries}
    comparable = []
    for entry in entries:
        for case in cases(entry, most):
            try:
                if isinstance(case, NotComparableError):
                    raise case
                comparable.append((entry, case, two_lanes(case)))
            except NotComparableError as error:
                found[entry.formatted_name].append(Verdict("not comparable", str(error)))
    for (entry, _, _), verdict in zip(comparable, _judge_together(comparable, engine), strict=True):
        found[entry.formatted_name].append(verdict)
    return {name: _worst(several, []) for name, several in found.items()}


def _judge_together(samples: list[tuple[Any, Case, list[Tensor]]], engine: str) -> list[Verdict]:
    """The verdicts on samples as one step; on each half of them where the engine refuses the step."""
    from op_targets import as_one_step  # which imports JAX, if that is the target

    if len(samples) <= 1:
        return [_judge(entry, case, engine, "value") for entry, case, _ in samples]
    try:
        pairs = as_one_step([case for _, case, _ in samples], [values for _, _, values in samples], engine)
    except Exception:
        half = len(samples) // 2
        return _judge_together(samples[:half], engine) + _judge_together(samples[half:], engine)
    return [
        _verdict(entry, case, "value", list(of_case)) for (entry, case, _), of_case in zip(samples, pairs, strict=True)
    ]


def _worst(several: list[Verdict], reasons: list[str]) -> Verdict:
    """The worst verdict of an entry's samples; ``reasons`` are those for which others are not comparable."""
    comparable = [one for one in several if one.verdict != "not comparable"]
    others = [one.reason for one in several if one.verdict == "not comparable"] or reasons
    worst = max(comparable, key=lambda one: _ORDER.index(one.verdict), default=None)
    return worst or Verdict("not comparable", others[0] if others else "")


def _judge(entry: Any, case: Case, target: str, stage: str) -> Verdict:
    from op_targets import TARGETS  # which imports JAX, if that is the target

    try:
        pairs = list(TARGETS[target](entry, case, stage))
    except NotComparableError as error:
        return Verdict("not comparable", str(error))
    except Exception as error:
        text = str(error)
        if "in place" in text:  # batch norm also writes where its new statistics are the old ones
            return Verdict("not comparable", "works in place")
        is_ours = isinstance(error, _OURS) and text.startswith(("to_jax_function: ", "scan_lanes: "))
        return Verdict("refused" if is_ours else "raw", _first_line(error))
    return _verdict(entry, case, stage, pairs)


def _verdict(entry: Any, case: Case, stage: str, pairs: list[Any]) -> Verdict:
    rtol = 1e-2 if any(value.dtype in (torch.bfloat16, torch.float16) for value in case.expected) else 1e-3
    size = max((_size(expected) for _, expected, _ in pairs), default=0.0) if stage == "gradient" else 0.0
    for position, (got, expected, exact) in enumerate(pairs):
        difference = _difference(got, expected, exact, rtol, max(1e-4 * size, 1e-5 * _size(expected), 1e-6))
        if difference and entry.formatted_name in KNOWN.get(stage, {}):
            return Verdict("not comparable", f"known difference: {KNOWN[stage][entry.formatted_name]}")
        if difference:
            return Verdict("wrong", f"result {position}: {difference}")
    return Verdict("right")


def _size(expected: Tensor) -> float:
    """The largest finite value of a result."""
    if expected.numel() == 0 or not (expected.is_floating_point() or expected.is_complex()):
        return 0.0
    return float(expected.abs().double().nan_to_num(0.0, 0.0, 0.0).max())


def _difference(got: Tensor, expected: Tensor, exact: Tensor | None, rtol: float, atol: float) -> str:
    """How a result differs; empty where it does not."""
    if got.shape != expected.shape:
        return f"shape {list(got.shape)} for {list(expected.shape)}"
    if _kind(got) != _kind(expected):
        return f"{got.dtype} for {expected.dtype}"
    if not (got.is_floating_point() or got.is_complex()):
        wrong = got.to(expected.dtype) != expected
    else:
        wide = torch.complex128 if expected.is_complex() else torch.float64
        got, expected = got.to(wide), expected.to(wide)
        close = torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
        if exact is not None and exact.shape == expected.shape:
            off = (expected - exact.to(wide)).abs()
            close |= (got - exact.to(wide)).abs() <= 10 * off.nan_to_num(0.0, 0.0, 0.0).max() if off.numel() else close
        wrong = ~close
    if not wrong.any():
        return ""
    where = tuple(wrong.nonzero()[0].tolist())
    return f"{got[where].item()} for {expected[where].item()} at {list(where)}, {int(wrong.sum())} of {wrong.numel()}"


def _kind(tensor: Tensor) -> str:
    if tensor.dtype == torch.bool:
        return "bool"
    return "complex" if tensor.is_complex() else "float" if tensor.is_floating_point() else "integer"


def stacked(case: Case) -> list[Tensor]:
    """The arguments of two lanes: the sample's own, and others of the same shapes."""
    return [torch.stack([a, b]) for a, b in zip(case.tensors, case.others, strict=True)]


def two_lanes(case: Case) -> list[Tensor]:
    """What eager mode gives for two lanes, one after the other."""
    lanes = [_in_eager(case.function, [tensor.clone() for tensor in each]) for each in (case.tensors, case.others)]
    if [value.shape for value in lanes[0]] != [value.shape for value in lanes[1]]:
        raise NotComparableError("a shape that depends on values")
    return [torch.stack(pair) for pair in zip(*lanes, strict=True)]
