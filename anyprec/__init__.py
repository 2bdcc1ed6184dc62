"""One set of weights for every bit-width: retraining-free mixed-precision quantization for vision networks."""

from anyprec.bits import BitConfig, Bits
from anyprec.calibration.norm_statistics import update_norms
from anyprec.calibration.step_sizes import calibrate
from anyprec.checkpoint.inspection import CheckpointInfo, inspect
from anyprec.checkpoint.loading import load
from anyprec.checkpoint.saving import save
from anyprec.errors import (
    AnyprecError,
    BitsError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    ConversionError,
    NotCalibratedError,
    PackedError,
    SearchError,
    StaleNormsWarning,
    TrainingError,
)
from anyprec.model.conversion import convert
from anyprec.model.converted import ConvertedModel
from anyprec.model.cost import Cost, CostModel, cost_model, cost_of
from anyprec.searching.budget.budgets import Budget
from anyprec.searching.result import SearchResult
from anyprec.searching.search import search
from anyprec.training.fit import fit
from anyprec.training.loop import EpochRecord
from anyprec.training.oneshot import OneShot
from anyprec.training.parameters import param_groups
from anyprec.training.recipe import Recipe
from anyprec.training.samplers import InstabilitySampler, SandwichSampler, UniformSampler
from anyprec.training.scheduler import BitWidthScheduler

__version__ = "0.1.0"

__all__ = [
    "AnyprecError",
    "BitConfig",
    "BitWidthScheduler",
    "Bits",
    "BitsError",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "CheckpointError",
    "CheckpointInfo",
    "ConversionError",
    "ConvertedModel",
    "Cost",
    "CostModel",
    "EpochRecord",
    "InstabilitySampler",
    "NotCalibratedError",
    "OneShot",
    "PackedError",
    "Recipe",
    "SandwichSampler",
    "SearchError",
    "SearchResult",
    "StaleNormsWarning",
    "TrainingError",
    "UniformSampler",
    "calibrate",
    "convert",
    "cost_model",
    "cost_of",
    "fit",
    "inspect",
    "load",
    "param_groups",
    "save",
    "search",
    "update_norms",
]
