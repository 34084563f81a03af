"""Transfers of KV from the arena of one instance to the arena of another.

All of this runs in the workers. Each rank process has one `RankTransfers`, which makes one `KVTransferManager` for each
epoch. A manager runs in the event loop of its process. Threads do what blocks: one for each link and direction. Rank 0
also has the `JointResults`, which join the replies of all ranks into one for the scheduler.

The scheduler leads, with the messages of `hbserve.messages.transfer`. The life of one transfer, on a rank of the sender
(S) and on a rank of the receiver (R):

One-sided (`one_sided/`: ``shm``, ``mooncake``). The sender writes alone.

1. R, `OpenLink`: ``DirectTransfers._open_receive_window`` lets S write into the arena. R answers `LinkOpened`.
2. S, `ConnectLink`: ``DirectTransfers._connect`` starts a `SendQueue`; its thread connects to the arena of R.
3. S, `SendBlocks` in a plan: when the step has stored the KV, ``RankTransfers.send`` calls ``KVTransferManager.send``,
   ``_send_all``, ``DirectTransfers._send`` and ``SendQueue.put``.
4. S, in the queue's thread: ``SendQueue`` calls ``_Writer``, and that ``OneSidedKVTransfer.write``.
5. S: ``KVTransferManager._on_end`` reports `TransferResult`. The scheduler unpins the blocks of both sides.
6. R, `FinishBlocks`, only if heads have to be merged or checksums compared: ``KVTransferManager._finish_blocks``. R
   reports a `TransferResult` of its own, and only then does the scheduler unpin the blocks of R.

Two-sided (`two_sided/`: ``nccl``, a user's backend). Both ends take part.

1. R, `OpenLink`: ``TorchTransfers._open_receive_window`` starts ``ReceivingLink.rendezvous``. R answers `LinkOpened`.
2. S, `ConnectLink`: ``TorchTransfers._connect`` starts a `SendQueue`; its thread calls ``SendingLink.rendezvous``.
3. R, `ReceiveBlocks`: ``KVTransferManager.handle``, ``_receive_all``, ``TorchTransfers._receive``; in the link's thread
   ``ReceivingLink.receive``.
4. S, `SendBlocks`: as in step 3 above, to ``TorchTransfers._send``; in the queue's thread ``SendingLink.send``.
5. S and R: ``KVTransferManager._on_end`` reports a `TransferResult` each. The scheduler unpins that side.
6. R, `FinishBlocks`: as above, only if checksums are compared.

If one transfer fails, its whole link fails. S gets `CancelTransfer` (``KVTransferManager.cancel``) and `DisconnectLink`
(``_disconnect``), and answers every transfer. Then R gets `CloseLink`: ``_close_receive_window`` returns when no write
of S can arrive any more, and R answers `LinkClosed`. Only then does the scheduler unpin the blocks of R.
"""
