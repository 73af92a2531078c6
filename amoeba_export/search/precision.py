"""Which precision to use, when several are possible: the one whose best subnet is best after what rounding costs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from amoeba_export.errors import NothingFits
from amoeba_export.search.space import SearchResult


def search_precision(
    dtypes: Sequence[str], search: Callable[[str], SearchResult], *, worse_by: Mapping[str, float]
) -> tuple[str, SearchResult]:
    """Search every precision with its own cost model, and take the one whose choice is best.

    A coarser precision is faster, so it affords a larger subnet; what it loses by rounding is taken off. Which of the
    two wins is not known beforehand: that is why both are searched.

    Args:
        dtypes: Precisions to consider, the preferred one first; it wins ties.
        search: The search of one precision, such as `search_plan` with the cost table of that precision. All of them
            have the same quality metric.
        worse_by: By how much each precision makes the quality metric worse, measured on the full model; never negative.

    Returns:
        The precision and its search.

    Raises:
        NothingFits: No precision has a candidate that fits; the last one's error.
    """
    found: dict[str, SearchResult] = {}
    failure: NothingFits | None = None
    for dtype in dtypes:
        try:
            found[dtype] = search(dtype)
        except NothingFits as error:
            failure = error
    if not found:
        assert failure is not None, "there is no precision to choose from"
        raise failure

    def badness(dtype: str) -> float:
        result = found[dtype]
        sign = -1.0 if result.higher_is_better else 1.0
        return sign * result.best.quality.value + worse_by[dtype]

    best = min(found, key=badness)
    return best, found[best]
