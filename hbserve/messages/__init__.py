"""Every message that crosses a process border: one module for each border, with both directions.

Messages are msgpack arrays with a tag: small, checked on arrival, and unable to run code. They carry control only:
tokens, block ids and numbers, never a tensor (`hbserve.kv_transfer` moves the bytes of KV).

    API server, LLM         client, admin      CpuScheduler
    supervisor of workers   supervisor         CpuScheduler
    new instance            membership         CpuScheduler
    CpuScheduler            worker, transfer   rank 0 of an instance
    rank 0 of an instance   rank, transfer     its other ranks
    API server              text               text process

A decoder takes the union of all messages that may cross its border.
"""
