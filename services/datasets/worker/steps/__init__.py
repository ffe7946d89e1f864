"""Steps: what may be done to rows on their way in. Authors of plug-ins import `api` alone."""

from __future__ import annotations

from services.datasets.worker.steps.pipeline import Pipeline, StepFailed

__all__ = ["Pipeline", "StepFailed"]
