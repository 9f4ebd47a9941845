"""Pop-Art for TorchRL (extra ``torchrl``): a `ValueNorm` that preserves the critic's outputs.

TorchRL's own ``PopArtValueNorm`` keeps statistics and leaves the critic's head where it is. Here the head moves with
them. A critic ends in a `ValueHead`, whose outputs are in the units of rewards, as TorchRL's losses and advantages
expect, and `ValueNorm` takes the place of TorchRL's::

    head = ValueHead(64, 1, step_size=3e-4)
    critic = TensorDictModule(nn.Sequential(body, head), in_keys=["observation"], out_keys=["state_value"])
    norm = ValueNorm(head)
    loss = MAPPOLoss(actor, critic, value_norm=norm)
    norm.attach(loss, optimizer)

MAPPOLoss updates its norm between the forward and the backward pass, where a head must not change. An attached norm
does it before the forward pass, with the same targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from popart_func._extras import require
from popart_func.nn import PopArtHead

require("popart_func.interop.torchrl", "torchrl", ["torchrl", "tensordict"])

import torchrl.modules  # noqa: E402

__all__ = ["ValueHead", "ValueNorm"]


class ValueHead(PopArtHead):
    """A `PopArtHead` whose outputs are unnormalized: values in the units of rewards. Arguments as there."""

    def forward(self, input: Tensor) -> Tensor:
        """The unnormalized outputs."""
        return self.unnormalize(super().forward(input))


class ValueNorm(torchrl.modules.ValueNorm):  # type: ignore[misc]
    """The statistics of a `ValueHead` as TorchRL's losses take them (``value_norm``), with POP.

    Args:
        head: the last layer of the critic.
        optimizer: the `torch.optim` optimizer of the critic, whose moments of the head follow; `attach` takes it too.

    Source: TorchRL 0.14, ``torchrl.modules.ValueNorm``.
    """

    def __init__(self, head: ValueHead, optimizer: torch.optim.Optimizer | None = None) -> None:
        super().__init__(shape=head.out_features)
        # Not as a child, since the loss has the critic's parameters already.
        self.__dict__["head"] = head
        self.optimizer = optimizer
        self._seen: tuple[int, torch.Size] | None = None

    def attach(self, loss: Any, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Makes a loss update these statistics before each of its forward passes, from the targets in its batch.

        Args:
            loss: MAPPOLoss or IPPOLoss, made with ``value_norm=self``, or another PPO loss, such as ClipPPOLoss, whose
                critic then learns in normalized units, too. Its batch must hold the value targets, as TorchRL's
                advantage modules write them.
            optimizer: the optimizer of the critic.
        """
        if optimizer is not None:
            self.optimizer = optimizer

        def before(loss: Any, args: Any) -> None:
            key = loss.tensor_keys.value_target
            target = args[0].get(key, None) if args else None
            if target is None:
                raise KeyError(
                    f"ValueNorm: the batch of {type(loss).__name__} must hold the targets {key!r}: call the loss with "
                    f"a tensordict, after its `value_estimator` or another advantage module."
                )
            self.update(target)
            self._seen = target.data_ptr(), target.shape

        def after(*_: Any) -> None:
            self._seen = None

        if getattr(loss, "value_norm", None) is None:
            loss._critic_loss_inputs = self._normalized
        loss.register_forward_pre_hook(before)
        loss.register_forward_hook(after, always_call=True)

    def update(self, value_target: Tensor) -> None:
        """Moves the statistics, the head and the optimizer's moments of it; see `PopArtHead.update`.

        Within the loss that it is attached to, it has done so by now, and does nothing.
        """
        self._check_trailing_shape(value_target)
        if self._seen != (value_target.data_ptr(), value_target.shape):
            self.head.update(value_target, optimizer=self.optimizer)

    def normalize(self, value_target: Tensor) -> Tensor:
        """``(y − μ) / σ``."""
        return self.head.normalize(value_target)

    def denormalize(self, normalised_value: Tensor) -> Tensor:
        """``σ n + μ``, the inverse of `normalize`."""
        return self.head.unnormalize(normalised_value)

    def scale(self) -> Tensor:
        """σ."""
        return self.head.scale

    def _normalized(self, *values: Tensor | None) -> tuple[Tensor | None, ...]:
        """The targets, the values and the earlier values of a loss, which may be None."""
        return tuple(None if one is None else self.normalize(one) for one in values)
