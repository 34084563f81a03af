"""Every message that crosses a process border: one module per border, with both directions.

Encoded with msgpack as tagged arrays: small, typed on arrival, and nothing in them can run code.
Control only: tokens, block ids and numbers; never a tensor (KV bytes move by `kv_transfer`).

    API server, LLM         client, admin      CpuScheduler
    supervisor of workers   supervisor         CpuScheduler
    new instance            membership         CpuScheduler
    CpuScheduler            worker, transfer   rank 0 of an instance
    rank 0 of an instance   rank, transfer     its other ranks
    API server              text               text process

A decoder takes the union of what may come over its border.
"""
