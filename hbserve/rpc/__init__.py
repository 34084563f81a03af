"""Control plane: sockets that carry the typed messages of `hbserve.messages` between processes.

    connects, or inherits         listens, or makes     socket                      ends of the line
    API server, Python program    scheduler             ZeroMQ DEALER to ROUTER     EngineClient, SchedulerShell
    instance that joins           scheduler             the same ROUTER             JoinClient, SchedulerShell
    supervisor of semi-PD workers scheduler             the same ROUTER             SchedulerLink, SchedulerShell
    scheduler                     rank 0 of an instance ZeroMQ DEALER to ROUTER     RpcClient, RpcServer
    text process                  API server            ZeroMQ DEALER to DEALER     TextWorker, TextProcess
    rank 1, 2, ...                rank 0                two socket pairs            RankLine; a Connection for plans
    child process                 its parent            standard input, status pipe child, ChildProcess

ZeroMQ runs over private socket files of one host, or over TCP where the configuration names a port; beyond the host
only with the cluster key. KV does not go over these sockets: see `hbserve.kv_transfer`.
"""
