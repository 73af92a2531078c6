"""Recovery: once its shape is settled, a cut gets weights that were fitted to do the work of what is gone.

Whether a shape keeps a budget does not depend on values, so shapes are tried as they are cut. What is shipped is
refitted and healed, written again, and measured again.
"""

from __future__ import annotations

import dataclasses

from amoeba_export.application.fit import Build, Fitted, measured_again
from amoeba_export.application.refits import healed_unless_worse, refitted_unless_worse
from amoeba_export.errors import InputError
from amoeba_export.refit import OFF


def recovered(fitted: Fitted, build: Build) -> Fitted:
    """`fitted` with fitted weights, built and measured again; unchanged where nothing was cut, or with `--refit off`.

    A plan that names a refit keeps it. With `--heal`, it is healed from there. A cut of a large model is healed only
    where that is asked for.

    Raises:
        InputError: `--refit` or `--heal` was given and the texts of its recipe cannot be used with this model.
    """
    session, plan = fitted.session, fitted.plan
    settings = session.settings
    is_asked = settings.heal is not None and settings.request.heal is not None
    if plan.keeps_everything(session.architecture):
        if is_asked:
            session.progress.warn("Nothing is cut, so nothing is healed.")
        return fitted
    if settings.refit == OFF or (plan.refit_id is not None and not is_asked):
        return fitted
    if plan.refit_id is None:
        try:
            session, plan = refitted_unless_worse(session, plan, settings.refit)
        except InputError as error:
            if settings.request.refit is not None or is_asked:
                raise
            session.progress.warn(f"The weights are not refitted: {error.what} '--refit off' accepts that.")
            return fitted
    try:
        session, plan = healed_unless_worse(session, plan)
    except InputError as error:
        if is_asked:
            raise
        session.progress.warn(f"The cut is refitted and not healed: {error.what} '--heal off' accepts that.")
    if plan.refit_id == fitted.plan.refit_id:
        return fitted
    folder = build(session, plan)
    return measured_again(dataclasses.replace(fitted, session=session, plan=plan), folder)
