"""TSBD: two-stage backdoor defense by unlearning weight changes and activeness-aware fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmdefense.defenses.base import Defense, Purifying
from mmdefense.errors import BadInputError
from mmdefense.kernels.curvature import gradient_norm_penalty
from mmdefense.kernels.loop import Training, mean_score, train
from mmdefense.kernels.units import (
    Unit,
    gradient_norms,
    parameters_by_name,
    rank,
    select_sub_weights,
    weight_change,
    zero,
)
from mmdefense.kernels.unlearning import mean_gradient, unlearn
from mmdefense.protocol import UnitGroup

__all__ = ["TSBD"]
