"""Learners: one step of regression on targets of any magnitude, by SGD, ART, Pop-Art or normalized SGD.

| module | what is in it |
|---|---|
| `algorithms` | the four learners |
| `batches` | what a learner gets and gives: batches, states, infos |
| `losses` | other losses than half the squared error |
"""

from popart_func.learners import losses
from popart_func.learners.algorithms import (
    Apply,
    art_learner,
    normalized_sgd_learner,
    popart_learner,
    sgd_learner,
)
from popart_func.learners.batches import Batch, Info, Learner, LearnerState

__all__ = [
    "Apply",
    "Batch",
    "Info",
    "Learner",
    "LearnerState",
    "art_learner",
    "losses",
    "normalized_sgd_learner",
    "popart_learner",
    "sgd_learner",
]
