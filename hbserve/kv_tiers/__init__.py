"""KV tiers in the worker: copies of KV blocks between the device and other memory, beside the steps.

The scheduler decides what is stored and loaded, and knows what each tier holds (`hbserve.scheduler.tiers`). Every rank
has its part of each block, so a job is done by all ranks, and rank 0 joins their results::

    event loop thread      StoreBlocks, LoadBlocks ──► RankTiers.handle ──► one queue for each tier and direction
    lane threads           Lane: arena ◄──► buffer on the device (checksums) ◄──► slots of the tier ──► TierResult

A lane has a stream and a buffer of its own on the device. Neither direction waits for the other or for steps.
"""
