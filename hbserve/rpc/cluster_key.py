"""The key that the hosts of one system share: who has it may give orders, who has not is not heard.

    python -m hbserve.rpc.cluster_key FILE

writes a new one. Copy the file to every host (it is as secret as a password) and name it in the
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
    """A CURVE key pair that every socket of a system uses, as server and as client."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return "ClusterKey(...)"

    @staticmethod
    def generate() -> ClusterKey:
        """A new one."""
        return ClusterKey(*zmq.curve_keypair())

    @staticmethod
    def load(path: str | Path) -> ClusterKey:
        """Read a key file.

        Raises:
            ConfigError: if it cannot be read, is not one, or can be read by other users.
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
            raise ConfigError(
                f"rpc.key_file: {path} is no key; make one with python -m hbserve.rpc.cluster_key", "rpc.key_file"
            )
        return ClusterKey(lines[1].encode(), lines[2].encode())

    @staticmethod
    def of(config: Config) -> ClusterKey | None:
        """The key that a configuration names, if it does. Errors as `load`."""
        return None if config.rpc.key_file is None else ClusterKey.load(config.rpc.key_file)

    def save(self, path: Path) -> None:
        """Write a new file that only its owner may read.

        Raises:
            FileExistsError: there is one already.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{_HEADER}\n{self.public.decode()}\n{self.secret.decode()}\n")

    def for_connecting(self, socket: zmq.Socket[bytes], address: str) -> None:
        """Have a socket speak CURVE with whoever it connects to, if that is over TCP."""
        if address.startswith("tcp:"):
            socket.curve_serverkey = self.public
            socket.curve_publickey, socket.curve_secretkey = self.public, self.secret

    def for_binding(self, socket: zmq.Socket[bytes], address: str) -> Doorkeeper | None:
        """Have a socket hear only who has this key, if it listens on TCP; to be closed after the socket."""
        if not address.startswith("tcp:"):
            return None
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret
        return Doorkeeper(socket.context, self)


class Doorkeeper:
    """Answers ZeroMQ's question, in one context, whether a client's key will do."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey) -> None:
        self._key = key
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("*", credentials_provider=self)

    def callback(self, domain: str, key: bytes) -> bool:
        """Called by the authenticator with a client's public key, in Z85."""
        return key == self._key.public

    def close(self) -> None:
        """End its thread."""
        self._authenticator.stop()


def main() -> int:
    """Entry of ``python -m hbserve.rpc.cluster_key``; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hbserve.rpc.cluster_key", description="Write a new cluster key.")
    parser.add_argument("file", type=Path, help="does not exist yet")
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
