"""From latencies and qualities to one choice: the grid of the paper, or every layer on its own."""

from amoeba_export.ir.pareto import pareto_front
from amoeba_export.search.choose import search_plan
from amoeba_export.search.dtypes import Found, Option, least_badness, search_precisions
from amoeba_export.search.predict import Predictor
from amoeba_export.search.space import Candidate, Memory, Problem, SearchResult, Seen, Space
from amoeba_export.search.surface import Quality, QualitySurface, quality_surface

__all__ = [
    "Candidate",
    "Found",
    "Memory",
    "Option",
    "Predictor",
    "Problem",
    "Quality",
    "QualitySurface",
    "SearchResult",
    "Seen",
    "Space",
    "least_badness",
    "pareto_front",
    "quality_surface",
    "search_plan",
    "search_precisions",
]
