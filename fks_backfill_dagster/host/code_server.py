"""The address of the code server of `up`, which webserver and daemon share.

By default each of them starts code servers of its own, the daemon another one every minute. A separate workspace file
points both to one server. A killed one is restarted (`keeper`) at the same address.

A request to a code server can name code to run, and there is no authentication. It therefore listens only on a Unix
socket in a folder that no other account can enter.

Does not belong here: the server itself (`forking_server`), imports of Dagster.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fks_backfill_dagster import ownership

LOCATION = "fks_backfill"
"""The location name in workspace.yaml."""

DEFINITIONS = "fks_backfill_dagster.orchestration.definitions"

_SOCKET = "code.sock"
_WORKSPACE = """\
# Written by `fks-backfill up`: the code server that its webserver and daemon share.
load_from:
  - grpc_server: {{socket: {socket}, location_name: {location}}}
"""


class SocketFolder(Exception):
    """No folder for the socket that is closed to other accounts: one sentence with the remedy."""


def socket_of(home: Path) -> Path:
    """The socket of a home's code server; in the temporary folder if the home's path is too long for a socket.
    Raises SocketFolder."""
    try:
        return ownership.socket_folder(home / "run", _SOCKET, "fks-code", home) / _SOCKET
    except ownership.OwnershipError as error:
        raise SocketFolder(str(error)) from None


def make_folder(folder: Path) -> None:
    """Creates the folder of a socket for this account only. Raises SocketFolder if it belongs to another account."""
    if folder.is_symlink() and folder.lstat().st_uid != os.geteuid():
        raise SocketFolder(
            f"{folder} is a link of another account: delete it, or set TMPDIR to a folder of your own"
        )
    try:
        ownership.make_folder(folder)
    except ownership.OwnershipError as error:
        raise SocketFolder(str(error)) from None


def write_workspace(path: Path, socket: Path) -> None:
    """Writes the workspace file that points to the code server at `socket`."""
    ownership.write_text(path, _WORKSPACE.format(socket=json.dumps(str(socket)), location=LOCATION))
