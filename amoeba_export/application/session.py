"""One export at work: what was asked, the model that it is asked of, and what every stage needs besides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from amoeba_export.application.request import ResolvedRequest
from amoeba_export.backends import Backend, find_backend
from amoeba_export.cache import Cache
from amoeba_export.errors import NotForExperts
from amoeba_export.ir import SILENT, Architecture, DenseArchitecture, Progress, Strategy, Supernet, Target
from amoeba_export.ir.rounded import RoundedWeights
from amoeba_export.load import load_supernet
from amoeba_export.model.host import Host
from amoeba_export.refit import OFF, Draw


@dataclass(frozen=True, kw_only=True)
class Session:
    """Made once per export by `open_session`; a stage that settles something gives back a copy that says so.

    Attributes:
        rounded: Integers that were chosen with data, for the plan that is written next.
    """

    settings: ResolvedRequest
    supernet: Supernet
    cache: Cache = field(default_factory=Cache)
    progress: Progress = SILENT
    rounded: RoundedWeights | None = None

    @property
    def architecture(self) -> Architecture:
        """The supernet's dims."""
        return self.supernet.architecture

    @property
    def full(self) -> DenseArchitecture:
        """The uncut model."""
        return self.architecture.uncut

    @property
    def target(self) -> Target:
        """Where latency counts. Only where there is one."""
        assert self.settings.target, "nothing is searched or measured without a target"
        return self.settings.target

    @property
    def backend(self) -> Backend:
        """What measures on the target, or estimates. Only where there is one."""
        return find_backend(self.target.backend)

    @property
    def is_measured(self) -> bool:
        """Whether there is a target whose latencies are measured, not estimated."""
        return self.settings.target is not None and self.backend.source == "measured"

    @property
    def strategy(self) -> Strategy:
        """What decides which weights stay. Only after `selection.with_strategy`, where a search needs one."""
        assert self.supernet.strategy, "a search needs a strategy"
        return self.supernet.strategy

    @property
    def dtype(self) -> str:
        """The precision that was asked for or chosen, or else the one that the target prefers."""
        return self.settings.dtype or self.target.dtype

    @property
    def host(self) -> Host:
        """Where refits and rounding are computed."""
        return Host(cache_dir=self.cache.root, progress=self.progress)

    def draw(self, recipe_name: str, *, tokens: int | None = None) -> Draw:
        """The samples of a refit recipe, half of them of the user's texts where there are some; of so many `tokens`."""
        request = self.settings.request
        recipe = request.refit_recipe(recipe_name)
        if tokens is not None:
            recipe = recipe.model_copy(update={"tokens": tokens})
        return Draw(recipe=recipe, seed=request.seed)

    def in_dtype(self, dtype: str) -> Session:
        """A copy with this precision."""
        return self.with_settings(replace(self.settings, dtype=dtype))

    def with_settings(self, settings: ResolvedRequest) -> Session:
        """A copy with settings of which more is known."""
        return replace(self, settings=settings)

    def with_supernet(self, supernet: Supernet) -> Session:
        """A copy with a supernet of which more is known."""
        return replace(self, supernet=supernet)


def open_session(settings: ResolvedRequest, *, cache: Cache | None = None, progress: Progress = SILENT) -> Session:
    """Open the model that `settings` names, with its adapters and the strategy file, if one was given.

    Raises:
        InputError: The model, an adapter, the strategy or the vocabulary cannot be read, or does not belong to the
            others.
        NotForExperts: A healing is asked for, and the model is a mixture of experts.
    """
    from amoeba_export.application.vocabulary import with_vocabulary  # needs torch, which a build may do without

    request = settings.request
    supernet = load_supernet(request.model, adapters=request.adapters, strategy=request.strategy, progress=progress)
    supernet = with_vocabulary(supernet, request, settings.plan, progress=progress)
    settings = _settled(settings, supernet, progress)
    return Session(settings=settings, supernet=supernet, cache=cache or Cache(), progress=progress)


def _settled(settings: ResolvedRequest, supernet: Supernet, progress: Progress) -> ResolvedRequest:
    """`settings` without what is not computed for this model. Raises `NotForExperts` where it was asked for."""
    if not supernet.architecture.expert_size or settings.refit == OFF:
        return settings
    if settings.request.heal not in (None, OFF):
        raise NotForExperts("healed", "--heal off")
    progress.note(f"{supernet.name} is a mixture of experts: of a cut, o_proj is refitted, and nothing is healed.")
    return replace(settings, heal=None)
