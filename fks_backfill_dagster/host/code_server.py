"""Where the code server of `up` listens, which the webserver and the daemon share.

Left to themselves they start a code server each, the daemon another one every minute. Here both are led to
one by a workspace file of their own. One that was killed is started again (`keeper`), and both find it again.

A request can name code to call, and is authenticated by nothing. So it listens on a Unix socket in a folder that
its user alone can enter, and nowhere else.

Does not belong here: the server itself (`forking_server`), anything of Dagster.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from fks_backfill_dagster import ownership

LOCATION = "fks_backfill"
"""As workspace.yaml names it."""

DEFINITIONS = "fks_backfill_dagster.orchestration.definitions"

_SOCKET = "code.sock"
_WORKSPACE = """\
# Written by `fks-backfill up`: its webserver and daemon share the code server that it has started.
load_from:
  - grpc_server: {{socket: {socket}, location_name: {location}}}
"""


class SocketFolder(Exception):
    """There is no folder for the socket that strangers cannot enter: one sentence with the remedy."""


def socket_of(home: Path) -> Path:
    """Where the code server of a home listens; where the home's path is too long for a socket, in the
    temporary folder. Raises SocketFolder."""
    try:
        return ownership.socket_folder(home / "run", _SOCKET, "fks-code", home) / _SOCKET
    except ownership.OwnershipError as error:
        raise SocketFolder(str(error)) from None


def make_folder(folder: Path) -> None:
    """Makes the folder of a socket for this user alone. Raises SocketFolder where it is somebody else's."""
    if folder.is_symlink() and folder.lstat().st_uid != os.geteuid():
        raise SocketFolder(
            f"{folder} is a link of another account: delete it, or set TMPDIR to a folder of your own"
        )
    try:
        ownership.make_folder(folder)
    except ownership.OwnershipError as error:
        raise SocketFolder(str(error)) from None


def write_workspace(path: Path, socket: Path) -> None:
    """The file that leads to the code server at `socket`."""
    ownership.write_text(path, _WORKSPACE.format(socket=json.dumps(str(socket)), location=LOCATION))
