"""The account at the other end of a loopback connection.

Linux publishes the owner of every socket in /proc/net/tcp, to every account; on other systems it is unknown. This
corresponds to PostgreSQL's method `peer`, for TCP instead of Unix sockets.

Does not belong here: what an account may do (`guard`).
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

Address = tuple[str, int]
"""An IPv4 address and a port."""

_TABLE = Path("/proc/self/net/tcp")
_ESTABLISHED = "01"

# Columns of the table: proc_pid_net(5).
_LOCAL, _REMOTE, _STATE, _UID, _INODE = 1, 2, 3, 7, 9


def account_of(client: Address, server: Address) -> int | None:
    """The uid of the process that connected from `client` to `server`; None if unknown.

    It is unknown for a connection that its client has closed: the entry no longer names the owner.
    """
    try:
        wanted = [_written(client), _written(server), _ESTABLISHED]
        table = _TABLE.read_text("ascii")
    except (OSError, ValueError):
        return None
    # A machine may have very many connections: only lines with both addresses are parsed.
    start = table.find(f" {wanted[0]} {wanted[1]} ")
    if start < 0:
        return None
    line = table[table.rfind("\n", 0, start) + 1 : table.find("\n", start)].split()
    if line[_LOCAL : _STATE + 1] != wanted or line[_INODE] == "0":
        return None
    return int(line[_UID])


def _written(address: Address) -> str:
    """In the table's format: the four bytes as one number in this machine's byte order, and the port."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"
