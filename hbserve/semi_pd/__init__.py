"""Prefill and decode as workers that share one device, its weights and its KV cache.

Processes of one instance, and the files that run in them::

    launcher (API server or Python program)
      └─ process_rotation_manager    starts, watches and ends all others; names workers to the scheduler
           │   supervisor thread:    rotation, recovery, one at a time
           │   watcher threads:      one per child, over instance_life, instance_state, worker_pool
           │   link thread:          scheduler_link, the only user of the socket to the scheduler
           │   controller thread:    slo_algorithm, slo_service: windows in, splits out
           ├─ MPS daemon             device_sharing, unless the user runs one
           ├─ resident process       resident_process, one per rank: holds weights and KV, computes nothing
           ├─ worker                 worker_process, one per phase and share level: attaches to that memory
           └─ standby                worker_process too: has imported everything, and waits to become a worker

One rotation, from one split to another while requests are served:

1. `ProcessRotationManager.request_sm_reallocation` notes the split and wakes the supervisor.
2. `Rotation.rotate` calls `InstanceState.prepare`: standbys become the workers that the split lacks, attach, warm up.
3. `Rotation._put_in_force` makes it the split in force.
4. For each phase that changes, `InstanceState.activate` names the new workers to the scheduler (`SetWorkers`). The
   scheduler plans for them, and sends `Shutdown` to the old ones when nothing of them is in flight.
5. `Rotation._drain` waits until the old workers have ended.
6. `InstanceState.replace_lost` replaces workers that were lost meanwhile, and starts new standbys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hbserve.lazy import lazy_attributes

if TYPE_CHECKING:
    from hbserve.semi_pd.process_rotation_manager import ProcessRotationManager
    from hbserve.semi_pd.resident_process_manager import ResidentProcessManager
    from hbserve.slo.constraints import SMAllocation

__all__ = ["ProcessRotationManager", "ResidentProcessManager", "SMAllocation"]

__getattr__: Any = lazy_attributes(
    {
        "ProcessRotationManager": "hbserve.semi_pd.process_rotation_manager",
        "ResidentProcessManager": "hbserve.semi_pd.resident_process_manager",
        "SMAllocation": "hbserve.slo.constraints",
    },
    __name__,
)
