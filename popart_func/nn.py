"""`PopArtHead`: a linear layer as a `torch.nn.Module`, which holds the statistics of its targets.

It changes its parameters, its statistics and an optimizer's moments in place, with the pure functions of `pop_art`
underneath, and equals them to the bit.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from popart_func import pop_art
from popart_func._typing import Float, Integer, Num, Shaped
from popart_func.optim.torch_optimizers import state_of
from popart_func.pop_art import PopArt, PopArtState

__all__ = ["PopArtHead"]

_OPTIONS = inspect.signature(pop_art.popart).parameters.keys() - {"num_outputs", "step_size"}


def _check_options(popart: PopArt | None, options: Mapping[str, Any], given: list[str]) -> None:
    """Raises where `PopArtHead` gets options that the default statistics lack, or that ``popart`` would not follow."""
    unknown = sorted(options.keys() - _OPTIONS)
    if unknown:
        raise TypeError(
            f"PopArtHead: options must be among {sorted(_OPTIONS)}, got {unknown}. The layer always has a bias, which "
            f"Pop-Art needs."
        )
    if popart is not None and (options or given):
        raise TypeError(
            f"PopArtHead: {sorted([*options, *given])} belong to the default statistics and can't be given with "
            f"`popart`. Give them where you make `popart`, or leave `popart` out."
        )
    if "gather" in options and "process_group" in given:
        raise TypeError("PopArtHead: `gather` can't be given with `process_group`, which makes one. Leave one out.")


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple | set | deque):
        return any(map(_holds_tensors, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, Tensor)


def _check_optimizer_state(optimizer: torch.optim.Optimizer, params: Mapping[str, Tensor]) -> None:
    """Raises where an optimizer keeps something of the layer elsewhere than in one tensor for each parameter.

    `state_of` checks those tensors. This checks collections of tensors, and state that belongs to no parameter. An
    optimizer without state for the layer may keep it with another parameter, as LBFGS does: then all state is checked.
    """
    state, own = optimizer.state, [param for param in params.values() if optimizer.state.get(param)]
    every = [param for group in optimizer.param_groups for param in group["params"]]
    if not own:
        state_of(optimizer, {str(number): param for number, param in enumerate(every)})
    unknown = [key for key, value in state.items() if not isinstance(key, Tensor) and _holds_tensors(value)]
    for param in own or every:
        unknown += [
            key
            for key, value in state.get(param, {}).items()
            if not isinstance(value, Tensor) and _holds_tensors(value)
        ]
    if unknown:
        raise TypeError(
            f"PopArtHead.update: `optimizer` must keep one tensor for each parameter, as torch.optim.Adam does, got "
            f"{type(optimizer).__name__}, whose entries {sorted(set(map(str, unknown)))} hold others, which may scale "
            f"with gradients in an unknown way. Pass optimizer=None to leave them."
        )


class PopArtHead(nn.Linear):
    """A linear layer whose outputs are normalized, and which follows its targets with Pop-Art.

    In a training loop, call `update` with the targets before the loss, compare `forward` with `normalize` of the
    targets, and read values through `unnormalize`. The statistics are buffers: they are saved, loaded and moved with
    the module. A cast to a narrower dtype leaves them in float32.

    Save the ``state_dict``. ``torch.save(head)`` pickles the whole head, and fails where ``popart`` is one of `scales`
    other than `scales.running_moments`: its functions are local, and Python can't pickle those.

    Args:
        in_features: the number of inputs.
        out_features: the number of outputs.
        step_size: β of the statistics, see `pop_art.art`: 3e-4 by default.
        num_tasks: the number of statistics: ``out_features`` by default; 1 for one that all outputs share.
        popart: other statistics, such as one of `scales`. They have their own step size and options, which can't be
            given here then, nor can ``process_group``; ``num_tasks`` must be theirs.
        process_group: the processes that share the statistics, with `distributed`; None for one process. All of them
            then call `update` together. The default group is ``torch.distributed.group.WORLD``.
        device: of the parameters.
        dtype: of the parameters.
        **options: the other options of `pop_art.popart`, such as ``bias_correction`` or ``groups``.

    Raises:
        TypeError: an unknown option, or an option that belongs to the default statistics together with ``popart``.
        ValueError: ``num_tasks`` is not the number of tasks of ``popart``.

    >>> head = PopArtHead(4, 1, step_size=0.5)
    >>> hidden, targets = torch.ones(8, 4), torch.full((8, 1), 1000.0)
    >>> before = head.unnormalize(head(hidden))
    >>> head.update(targets)
    >>> torch.allclose(head.unnormalize(head(hidden)), before, atol=1e-3), head.shift
    (True, tensor([500.]))
    """

    shift: Tensor
    scale: Tensor
    variance: Tensor
    count: Tensor
    residue: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        step_size: float | None = None,
        *,
        num_tasks: int | None = None,
        popart: PopArt | None = None,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        given = {"step_size": step_size, "process_group": process_group}
        _check_options(popart, options, [name for name, value in given.items() if value is not None])
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        if popart is None:
            tasks = out_features if num_tasks is None else num_tasks
            if process_group is not None:
                from popart_func.distributed import all_gather  # torch.distributed's collectives take time to import

                options["gather"] = all_gather(None if process_group is dist.group.WORLD else process_group)
            popart = pop_art.popart(tasks, 3e-4 if step_size is None else step_size, **options)
        self.popart = popart
        for name, field in popart.init({"weight": self.weight.detach()})._asdict().items():
            self.register_buffer(name, field.detach().clone())
        if num_tasks not in (None, len(self.shift)):
            raise ValueError(
                f"PopArtHead: `num_tasks` must be the number of tasks of `popart`, {len(self.shift)}, got {num_tasks}. "
                f"Leave it out."
            )

    def reset_parameters(self) -> None:
        """Draws the weight and bias anew, and sets the statistics to their start values, as `nn.BatchNorm1d` does."""
        super().reset_parameters()
        if "shift" not in self._buffers:  # nn.Linear.__init__ calls this before there are statistics
            return
        for name, field in self.popart.init({"weight": self.weight.detach()})._asdict().items():
            getattr(self, name).copy_(field)

    @property
    def statistics(self) -> PopArtState:
        """The statistics, as the pure functions take them; the buffers themselves, not copies."""
        return PopArtState(self.shift, self.scale, self.variance, self.count, self.residue)

    def normalize(
        self, targets: Num[Tensor, "*shape"], indices: Integer[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*shape"]:
        """``(y − μ) / σ``, see `pop_art.normalize`: what the outputs are compared with."""
        return pop_art.normalize(self.statistics, targets, self._indices(targets, indices))

    def unnormalize(
        self, outputs: Num[Tensor, "*shape"], indices: Integer[Tensor, "..."] | None = None
    ) -> Float[Tensor, "*shape"]:
        """``σ n + μ``, see `pop_art.unnormalize`: the outputs in the targets' units."""
        return pop_art.unnormalize(self.statistics, outputs, self._indices(outputs, indices))

    @torch.no_grad()
    def update(
        self,
        targets: Num[Tensor, "..."],
        indices: Integer[Tensor, "..."] | None = None,
        weights: Shaped[Tensor, "..."] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Moves the statistics, the weight and bias, and an optimizer's moments of them, in place.

        Call it before the forward pass of the loss: between forward and backward, autograd refuses changed weights.

        Args:
            targets: unnormalized targets, see `pop_art.art`.
            indices: the task of each target.
            weights: the weight of each target; 0 is absent, whatever the target holds.
            optimizer: the `torch.optim` optimizer that trains this layer, so that its momentum and second moments
                follow into the new units. Its weight decay pulls predictions toward the mean of the targets: give this
                layer a parameter group with ``weight_decay=0``.

        Raises:
            TypeError, ValueError: as `pop_art.art`; an optimizer whose state is not known; a weight or bias that is no
                parameter of the layer, such as one that `torch.nn.utils.parametrizations.weight_norm` computes.
        """
        for name in ("weight", "bias"):
            if self._parameters.get(name) is None:
                raise TypeError(
                    f"PopArtHead.update: `{name}` must be the layer's own parameter, changed in place, got "
                    f"one that is computed by a parametrization or a hook, or none. Take weight_norm, spectral_norm or "
                    f"pruning off this layer, such as with torch.nn.utils.parametrize.remove_parametrizations."
                )
        params = {"weight": self.weight, "bias": self.bias}
        opt_state: Any = () if optimizer is None else state_of(optimizer, params)
        if optimizer is not None:
            _check_optimizer_state(optimizer, params)
        before = {} if optimizer is None else opt_state.entries
        head = pop_art.Head("")
        values, opt_state, new = self.popart.update_network(
            {name: leaf.detach() for name, leaf in params.items()},
            opt_state,
            self.statistics,
            targets,
            indices,
            weights,
            head=head,
        )
        for name, leaf in params.items():
            leaf.copy_(values[name])
        for name, field in new._asdict().items():
            getattr(self, name).copy_(field)
        for entry, leaves in before.items():
            for name, leaf in leaves.items():
                leaf.copy_(opt_state.entries[entry][name])

    def extra_repr(self) -> str:
        """The sizes, for `print`."""
        return f"{super().extra_repr()}, num_tasks={self.shift.shape[0]}"

    def _indices(self, values: Tensor, indices: Tensor | None) -> Tensor | None:
        return self.popart.tasks_of(self.statistics, values) if indices is None else indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PopArtHead:
        """Moves and casts, but for statistics that a narrow dtype could not hold."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, field in before.items():
            now = self._buffers[name]
            if field is not None and now is not None and torch.promote_types(now.dtype, torch.float32) != now.dtype:
                self._buffers[name] = field.to(now.device) if name != "count" else now
        return self
