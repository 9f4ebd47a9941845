"""Every learner by its name, on a small network."""

from __future__ import annotations

import torch

import popart_func as pf

F64 = torch.float64


def make(outputs):
    return lambda: pf.UnifiedModel(6, 5, outputs)


def params_of(outputs, seed=0):
    return {name: value.double() for name, value in pf.init_params(make(outputs), seed).items()}


APPLY = {outputs: pf.stateless(make(outputs)()) for outputs in (1, 2, 3)}


def make_learner(name, outputs, optimizer=None, popart=None, **options):
    apply = APPLY[outputs]
    optimizer = optimizer or pf.sgd(0.05)
    popart = popart or pf.popart(outputs, 0.2)
    if name == "sgd":
        return pf.sgd_learner(apply, optimizer)
    build = {"art": pf.art_learner, "popart": pf.popart_learner, "normalized_sgd": pf.normalized_sgd_learner}[name]
    return build(apply, optimizer, popart, **options)


NAMES = ["sgd", "art", "popart", "normalized_sgd"]
