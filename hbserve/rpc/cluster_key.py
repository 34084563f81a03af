"""Cluster key that the hosts of one system share: holders may send control messages, all others are rejected.

    python -m hbserve.rpc.cluster_key FILE

writes a new key. Copy the file to every host (it is as secret as a password) and name it in the
configuration as ``rpc.key_file``. Control sockets between hosts are then encrypted and
authenticated in both directions by ZeroMQ's CURVE (Bernstein 2011, CurveCP).
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from hbserve.config import Config
from hbserve.errors import ConfigError

_HEADER = "hbserve cluster key"


@dataclass(frozen=True)
class ClusterKey:
    """CURVE key pair that every socket of a system uses, as server and as client."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return "ClusterKey(...)"

    @staticmethod
    def generate() -> ClusterKey:
        """Make a new key."""
        return ClusterKey(*zmq.curve_keypair())

    @staticmethod
    def load(path: str | Path) -> ClusterKey:
        """Read a key file.

        Raises:
            ConfigError: if the file cannot be read, holds no key, or can be read by other users.
        """
        path = Path(path).expanduser()
        try:
            mode = path.stat().st_mode
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"rpc.key_file: cannot read {path}: {error}", "rpc.key_file") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"rpc.key_file: other users may read {path}; chmod 600 it", "rpc.key_file")
        if len(lines) != 3 or lines[0] != _HEADER or len(lines[1]) != 40 or len(lines[2]) != 40:
            what = f"{path} is no key; make one with python -m hbserve.rpc.cluster_key"
            raise ConfigError(f"rpc.key_file: {what}", "rpc.key_file")
        return ClusterKey(lines[1].encode(), lines[2].encode())

    @staticmethod
    def of(config: Config) -> ClusterKey | None:
        """Load the key that a configuration names, or return None. Errors as in `load`."""
        return None if config.rpc.key_file is None else ClusterKey.load(config.rpc.key_file)

    def save(self, path: Path) -> None:
        """Write a new file that only its owner may read.

        Raises:
            FileExistsError: if the file exists.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{_HEADER}\n{self.public.decode()}\n{self.secret.decode()}\n")

    def for_connecting(self, socket: zmq.Socket[bytes], address: str) -> None:
        """Make a socket that will connect over TCP speak CURVE."""
        if address.startswith("tcp:"):
            socket.curve_serverkey = self.public
            socket.curve_publickey, socket.curve_secretkey = self.public, self.secret

    def for_binding(self, socket: zmq.Socket[bytes], address: str) -> Doorkeeper | None:
        """Make a socket that will listen on TCP accept only holders of this key.

        Returns:
            Authenticator of the socket's context, to be closed after the socket; None without TCP.
        """
        if not address.startswith("tcp:"):
            return None
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        return Doorkeeper(socket.context, self)


class Doorkeeper:
    """Authenticator of one ZeroMQ context: accepts clients that have the key. Runs a thread of its own."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey) -> None:
        self._key = key
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Return whether a client's public key, in Z85, is the cluster's; called by the authenticator."""
        return key == self._key.public

    def close(self) -> None:
        """End the thread."""
        self._authenticator.stop()


def main() -> int:
    """Entry point of ``python -m hbserve.rpc.cluster_key``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hbserve.rpc.cluster_key", description="Write a new cluster key.")
    parser.add_argument("file", type=Path, help="file to write; must not exist")
    path: Path = parser.parse_args().file
    try:
        ClusterKey.generate().save(path)
    except OSError as error:
        print(f"error: cannot write {path}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"wrote {path}; copy it to every host and name it as rpc.key_file")
    return 0


if __name__ == "__main__":
    sys.exit(main())
