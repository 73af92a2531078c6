"""The types that stages share. Frozen, torch-free at import, and the only thing that two stages have in common."""

from amoeba_export.ir.architecture import Architecture
from amoeba_export.ir.dense import DenseArchitecture, LayerDims
from amoeba_export.ir.family import Axis, Family, LayerKind, Part, Role, Rope, TensorTemplate
from amoeba_export.ir.latency import (
    Budget,
    Latency,
    Metric,
    Source,
    Target,
    Timing,
    Workload,
    parse_megabytes,
)
from amoeba_export.ir.limits import NO_LIMITS, ContainerLimits, RuntimeLimits
from amoeba_export.ir.plan import LayerPlan, Policy, Shape, SubnetPlan
from amoeba_export.ir.progress import SILENT, Progress
from amoeba_export.ir.refit import Refit
from amoeba_export.ir.rounded import RoundingHow
from amoeba_export.ir.strategy import FixedWidth, Importance, Strategy
from amoeba_export.ir.subnet import Subnet, TensorSpec, Writer
from amoeba_export.ir.supernet import Adapter, AdapterDelta, InputId, Supernet, TensorSource
from amoeba_export.ir.validate import validate

__all__ = [
    "NO_LIMITS",
    "SILENT",
    "Adapter",
    "AdapterDelta",
    "Architecture",
    "Axis",
    "Budget",
    "ContainerLimits",
    "DenseArchitecture",
    "Family",
    "FixedWidth",
    "Importance",
    "InputId",
    "Latency",
    "LayerDims",
    "LayerKind",
    "LayerPlan",
    "Metric",
    "Part",
    "Policy",
    "Progress",
    "Refit",
    "Role",
    "Rope",
    "RoundingHow",
    "RuntimeLimits",
    "Shape",
    "Source",
    "Strategy",
    "Subnet",
    "SubnetPlan",
    "Supernet",
    "Target",
    "TensorSource",
    "TensorSpec",
    "TensorTemplate",
    "Timing",
    "Workload",
    "Writer",
    "parse_megabytes",
    "validate",
]
