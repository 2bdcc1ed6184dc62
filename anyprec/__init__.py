"""One set of weights for every bit-width.

Retraining-free mixed-precision quantization for timm and torch networks.
"""

from anyprec.bits import BitConfig, Bits, BitsLike, Candidates, LayerCandidates
from anyprec.calibration.norm_statistics import update_norms
from anyprec.calibration.reconstruction import reconstruct
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
    HardwareError,
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
from anyprec.exporting.biases import RaisedScale
from anyprec.exporting.integer import IntegerNetwork, integer
from anyprec.exporting.integer_rewriting import OperatorPlace
from anyprec.exporting.latency import LatencyTable, measure_latency
from anyprec.exporting.parity import check_export
from anyprec.exporting.parity_report import CodeParity, LogitParity, ParityReport, SpeedParity
from anyprec.exporting.writing import Exported, export
from anyprec.model.conversion import convert
from anyprec.model.converted import BitsRequest, ConvertedModel
from anyprec.model.cost import Cost, CostModel, CostTable, LayerCost, Uncounted, UserCost
from anyprec.model.costing import cost_model, cost_of
from anyprec.model.fitting import HardwareProblem, grid_problems, hardware_problems
from anyprec.model.hardware import (
    Evidence,
    ExportTarget,
    Hardware,
    HardwareSource,
    WeightGranularity,
    hardware,
    hardware_names,
)
from anyprec.model.pairs import LayerPairs
from anyprec.model.placement import Placement
from anyprec.model.recomputing import recompute_weights
from anyprec.model.record import ConfigNote, ConvertSettings, Coverage
from anyprec.model.summary import OutputRow, Summary, SummaryRow
from anyprec.model.trust import trust_weights
from anyprec.network.facts import LayerKind
from anyprec.nn.channels import GroupedAxis
from anyprec.nn.grids import ActivationGrid, ActivationScale, GridRule
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import NormSharing
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.weights import Recompute
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
    "ActivationGrid",
    "ActivationScale",
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
    "CodeParity",
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
    "Evidence",
    "ExportError",
    "ExportTarget",
    "Exported",
    "FeaturePoint",
    "GridRule",
    "GroupedAxis",
    "Hardware",
    "HardwareError",
    "HardwareProblem",
    "HardwareSource",
    "InputQuantizer",
    "InputSizeWarning",
    "Instability",
    "InstabilitySampler",
    "IntegerNetwork",
    "LatencyTable",
    "LayerCandidates",
    "LayerCost",
    "LayerKind",
    "LayerPairs",
    "LogitParity",
    "LossTerm",
    "MeasuredConfig",
    "Mixup",
    "NegativeInputWarning",
    "NoValuesError",
    "NormSharing",
    "NotCalibratedError",
    "Objective",
    "OneShot",
    "OperatorPlace",
    "OutputRow",
    "PackedCoding",
    "PackedError",
    "ParityReport",
    "Placement",
    "PrecisionError",
    "QuantizedLayer",
    "RaisedScale",
    "Recipe",
    "Recompute",
    "SamplerLike",
    "SandwichSampler",
    "SearchError",
    "SearchNorms",
    "SearchResult",
    "SpeedParity",
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
    "WeightGranularity",
    "WeightQuantizer",
    "calibrate",
    "check_export",
    "convert",
    "cost_model",
    "cost_of",
    "export",
    "fit",
    "grid_problems",
    "hardware",
    "hardware_names",
    "hardware_problems",
    "inspect",
    "integer",
    "load",
    "measure_latency",
    "param_groups",
    "recompute_weights",
    "reconstruct",
    "save",
    "search",
    "trust_weights",
    "update_norms",
]
