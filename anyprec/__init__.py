"""One set of weights for every bit-width.

Retraining-free mixed-precision quantization for timm and torch networks.
"""

from anyprec.bits import BitConfig, Bits, BitsLike, Candidates, LayerCandidates
from anyprec.calibration.norm_statistics import update_norms
from anyprec.calibration.step_sizes import calibrate
from anyprec.checkpoint.document import Architecture, PackedCoding
from anyprec.checkpoint.inspection import CheckpointInfo, StoredLayer, inspect
from anyprec.checkpoint.loading import load
from anyprec.checkpoint.saving import save
from anyprec.errors import (
    AnyprecError,
    BatchError,
    BitsError,
    BudgetError,
    CalibrationError,
    CheckpointError,
    ConversionError,
    ExportError,
    InputSizeWarning,
    NegativeInputWarning,
    NotCalibratedError,
    NoValuesError,
    PackedError,
    PrecisionError,
    SearchError,
    StaleNormsWarning,
    TrainingError,
)
from anyprec.exporting.writing import Exported, export
from anyprec.model.conversion import convert
from anyprec.model.converted import BitsRequest, ConvertedModel
from anyprec.model.cost import Cost, CostModel, CostTable, LayerCost, Uncounted, UserCost
from anyprec.model.costing import cost_model, cost_of
from anyprec.model.record import ConfigNote, ConvertSettings, Coverage
from anyprec.model.summary import Summary, SummaryRow
from anyprec.model.trust import trust_weights
from anyprec.nn.channels import GroupedAxis
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import NormSharing
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.runtime.batches import Batch
from anyprec.searching.algorithms.constraints import AllowedBits
from anyprec.searching.budget.budgets import Budget
from anyprec.searching.budget.reading import BudgetLike
from anyprec.searching.measuring.evaluator import Objective, SearchNorms
from anyprec.searching.measuring.grouping import TiedLayers
from anyprec.searching.result import MeasuredConfig, SearchResult
from anyprec.searching.search import search
from anyprec.training.feature_sources import FeaturePoint
from anyprec.training.fit import fit
from anyprec.training.learner import Mixup
from anyprec.training.loop import EpochRecord
from anyprec.training.oneshot import OneShot
from anyprec.training.parameters import param_groups
from anyprec.training.recipe import Recipe
from anyprec.training.samplers import (
    InstabilitySampler,
    SamplerLike,
    SandwichSampler,
    UniformSampler,
)
from anyprec.training.scheduler import BitWidthScheduler, Instability
from anyprec.training.training_path import Criterion, LossTerm, TrainingPath

__version__ = "0.1.0"

__all__ = [
    "AllowedBits",
    "AnyprecError",
    "Architecture",
    "Batch",
    "BatchError",
    "BitConfig",
    "BitWidthScheduler",
    "Bits",
    "BitsError",
    "BitsLike",
    "BitsRequest",
    "Budget",
    "BudgetError",
    "BudgetLike",
    "CalibrationError",
    "Candidates",
    "CheckpointError",
    "CheckpointInfo",
    "ConfigNote",
    "ConversionError",
    "ConvertSettings",
    "ConvertedModel",
    "Cost",
    "CostModel",
    "CostTable",
    "Coverage",
    "Criterion",
    "EpochRecord",
    "ExportError",
    "Exported",
    "FeaturePoint",
    "GroupedAxis",
    "InputQuantizer",
    "InputSizeWarning",
    "Instability",
    "InstabilitySampler",
    "LayerCandidates",
    "LayerCost",
    "LossTerm",
    "MeasuredConfig",
    "Mixup",
    "NegativeInputWarning",
    "NoValuesError",
    "NormSharing",
    "NotCalibratedError",
    "Objective",
    "OneShot",
    "PackedCoding",
    "PackedError",
    "PrecisionError",
    "QuantizedLayer",
    "Recipe",
    "SamplerLike",
    "SandwichSampler",
    "SearchError",
    "SearchNorms",
    "SearchResult",
    "StaleNormsWarning",
    "StoredLayer",
    "Summary",
    "SummaryRow",
    "TiedLayers",
    "TrainingError",
    "TrainingPath",
    "Uncounted",
    "UniformSampler",
    "UserCost",
    "WeightQuantizer",
    "calibrate",
    "convert",
    "cost_model",
    "cost_of",
    "export",
    "fit",
    "inspect",
    "load",
    "param_groups",
    "save",
    "search",
    "trust_weights",
    "update_norms",
]
