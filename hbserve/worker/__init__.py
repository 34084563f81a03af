"""The worker: the process that runs an instance of the model, plans in, tokens out; and its other ranks' processes.

    process of rank 0 (process.py, worker_process.py)         process of rank 1, 2, ... (rank_process.py)
    ┌───────────────────────────────────────────────┐         ┌───────────────────────────────────────┐
    │ main       launches steps     step_pipeline ──┼─ plans ─┼► main       launches its part of them │
    │   │ launched steps                            │         │    │                                  │
    │   ▼                                           │         │    ▼                                  │
    │ collector  waits for results  step_pipeline   │         │  collector  waits for results         │
    │   │ events                    events          │         │    │ events                           │
    │   ▼                                           │         │    ▼                                  │
    │ io         event loop: RPC,   worker_process  │         │  io         event loop: commands,     │
    │            KV transfers       rank_group ◄────┼─ replies┼─            KV transfers              │
    │ watchers   one for each rank  rank_group      │         │  life-line  ends the process with     │
    │ signals    SIGTERM, SIGINT    process         │         │             rank 0                    │
    │ life-line  its launcher                       │         │                                       │
    └───────────────────────────────────────────────┘         └───────────────────────────────────────┘

Both load their part of the model with loaded_rank.py, in the main thread. standby.py is a process of either kind before
it knows what it will be. scheduler_session.py says which scheduler a worker obeys, and join_client.py asks a running
system to take the worker.
"""
