"""Routes that show and change how ``semi_pd`` instances divide their devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from hbserve.errors import ConfigError, InvalidRequestError, OverloadedError
from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
from hbserve.server.protocol import AllocationRequest
from hbserve.slo.constraints import SMAllocation


def rotation_counts(managers: Mapping[str, ProcessRotationManager]) -> dict[str, dict[str, Any]]:
    """Return the ``statistics`` of `ProcessRotationManager.get_status` by instance."""
    return {name: manager.get_status()["statistics"] for name, manager in managers.items()}


def install(app: FastAPI, managers: Mapping[str, ProcessRotationManager]) -> None:
    """Add the routes. `hbserve.server.guard` requires the admin key for changes.

    Args:
        managers: rotation managers of the system's ``semi_pd`` instances, by name.
    """

    @app.get("/v1/semi_pd/status")
    async def status() -> dict[str, Any]:
        return {"instances": {name: manager.get_status() for name, manager in managers.items()}}

    @app.post("/v1/semi_pd/allocation", status_code=202)
    async def allocation(body: AllocationRequest) -> dict[str, Any]:
        if body.instance is not None and body.instance not in managers:
            known = ", ".join(managers) or "none"
            raise InvalidRequestError(f"there is no semi_pd instance {body.instance!r}; there are: {known}", "instance")
        if not managers:
            raise InvalidRequestError("this system has no semi_pd instance; start it with mode semi_pd")
        chosen = {name: manager for name, manager in managers.items() if body.instance in (None, name)}
        split = SMAllocation(body.prefill_percentage, body.decode_percentage, body.mixed)
        for name, manager in chosen.items():
            try:
                is_accepted = manager.request_sm_reallocation(split)
            except ConfigError as error:
                raise InvalidRequestError(str(error), error.key) from None
            if not is_accepted:
                raise OverloadedError(f"instance {name} is not running now")
        return {"requested": body.model_dump(exclude={"instance"}), "instances": list(chosen)}
