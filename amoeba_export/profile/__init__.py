"""How long any cut of a model takes on a target: few measurements, an additive model, honest error bars."""

from amoeba_export.profile.cost_table import CostTable, Measurement, fit_cost_table, refine
from amoeba_export.profile.design import design_graphs
from amoeba_export.profile.memory import predict_memory_mb
from amoeba_export.profile.paired import Comparison, compare_rounds, early_verdict
from amoeba_export.profile.record import Measure, Profiling, record_cost_table
from amoeba_export.profile.rounds import median_polish, pool_rounds
from amoeba_export.profile.table_file import cost_key, read_table, table_from_json, table_to_json, write_table

__all__ = [
    "Comparison",
    "CostTable",
    "Measure",
    "Measurement",
    "Profiling",
    "compare_rounds",
    "cost_key",
    "design_graphs",
    "early_verdict",
    "fit_cost_table",
    "median_polish",
    "pool_rounds",
    "predict_memory_mb",
    "read_table",
    "record_cost_table",
    "refine",
    "table_from_json",
    "table_to_json",
    "write_table",
]
