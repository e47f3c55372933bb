"""`[stores.NAME.lock]`: object lock of a bucket."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from offload.configs.base import Model, seconds
from offload.objectlock import LockRules

Days = Annotated[float, BeforeValidator(seconds), Field(ge=1)]  # seconds, or "30d"


class LockConfig(Model):
    """Backups that nobody can destroy before their time. The bucket must have object lock."""

    mode: Literal["governance", "compliance"]
    retain: Days  # from when a backup is finished
    # Packs are locked so much longer, and are extended once in that time if they are still needed.
    generation: Days = 7 * 86400.0
    max: Days = 400 * 86400.0  # no date is set that is further ahead: a clock may be wrong by years

    @model_validator(mode="after")
    def _fits(self) -> LockConfig:
        if self.retain + 2 * self.generation > self.max:
            raise ValueError("retain and two generations are longer than max: raise max")
        return self

    def options(self) -> dict[str, str]:
        """For the store's spec."""
        return LockRules(
            mode=self.mode,
            retain_s=self.retain,
            generation_s=self.generation,
            max_s=self.max,
        ).options()
