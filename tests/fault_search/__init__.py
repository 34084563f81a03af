"""A whole system in one thread: the real scheduler core in a simulated world that breaks, from one seed.

The core is `CpuScheduler`. Workers, memory, wires, clients, the supervisor of semi-PD and the clock are simulated, and
every process can be killed, stopped and started again at any moment. A worker computes a token as a hash of the
contents of the blocks that it was told to read, so a stale, foreign or half-written block gives a wrong token.

    python -m tests.fault_search --seed 7           # run one seed and print what happens in it
    python -m tests.fault_search --seconds 600      # search on all cores
    python -m tests.fault_search --seed 7 --shrink  # find a smaller scenario that fails in the same way
"""
