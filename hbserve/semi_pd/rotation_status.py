"""What `ProcessRotationManager.get_status` says of processes and rotations, as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from hbserve.semi_pd.recovery import Recovery
from hbserve.semi_pd.rotation import Rotation
from hbserve.semi_pd.sm_allocation import SMAllocation
from hbserve.semi_pd.utils import PHASES, ROLES, share_of
from hbserve.semi_pd.worker_set import WorkerState
from hbserve.semi_pd.workforce import Workforce


def rotation_status(
    workforce: Workforce, rotation: Rotation, recovery: Recovery, requested: SMAllocation | None
) -> dict[str, Any]:
    """State, split, processes and counts; with the books' lock held."""
    workers = list(workforce.workers.workers.values()) if workforce.workers is not None else []
    active = [worker for worker in workers if worker.state is WorkerState.ACTIVE]
    shares = {
        str(phase): worker.as_dict()
        for phase in PHASES
        for worker in active
        if worker.rung == (phase, share_of(workforce.allocation, phase))
    }
    return {
        "instance_id": workforce.instance.instance_id,
        "state": str(workforce.state),
        "current_sm_allocation": asdict(workforce.allocation),
        "requested_sm_allocation": None if requested is None else asdict(requested),
        "switch_requested": requested is not None,
        "active_processes": shares,
        "workers": [worker.as_dict() for worker in workers],
        "sleepers": workforce.workers.sleepers() if workforce.workers is not None else [],
        "warm_percentages": {
            str(role): sorted({p for other, p in (w.rung for w in active) if other is role}) for role in ROLES
        },
        "resident_manager": workforce.residents.get_status(),
        "statistics": {
            "rotations": rotation.num_done,
            "failed_rotations": rotation.num_failed,
            "last_rotation_s": rotation.last_s,
            "replaced_workers": workforce.num_replaced,
            "recoveries": recovery.num_done,
        },
        "last_error": workforce.last_error,
    }
