"""A process that works on grammars for the one beside it, with limits of time and memory.

A grammar is a stranger's program, and its library computes in C, where no thread can be interrupted. A process can be
ended: the request at fault fails, and all other outputs go on in the next process.

    worker, or a program that embeds the engine      hbserve-grammars
    GrammarProcess ── FollowOutput, CheckOutput ──►  lanes of threads
    (parent.py)    ◄── Mask, OutputChecked ───────── (worker.py)
"""
