"""The keeper of the code server of `up`, which the webserver and the daemon share.

Left to themselves they start a code server each, the daemon another one every minute. Here both are led to
one by a workspace file of their own. `python -m ...code_server PORT` starts the server (`forking_server`),
and starts it again when it was killed; both find it again by themselves.

Does not belong here: who starts the keeper and finds it again (`servers`, `processes`); anything of
Dagster, for the keeper lives as long as the server and should weigh nothing.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from fks_backfill_dagster.ownership import write_text

HOST = "127.0.0.1"
LOCATION = "fks_backfill"
"""As workspace.yaml names it."""

DEFINITIONS = "fks_backfill_dagster.orchestration.definitions"

_SERVER = "fks_backfill_dagster.orchestration.forking_server"
_WORKSPACE = """\
# Written by `fks-backfill up`: its webserver and daemon share the code server that it has started.
load_from:
  - grpc_server: {{host: "{host}", port: {port}, location_name: {location}}}
"""


def write_workspace(path: Path, port: int) -> None:
    """The file that leads to the code server at `port`."""
    write_text(path, _WORKSPACE.format(host=HOST, port=port, location=LOCATION))


def told_port(path: Path) -> int | None:
    """The port in such a file; None where there is none."""
    try:
        found = re.search(r"port: (\d+)", path.read_text())
    except FileNotFoundError:
        return None
    return int(found[1]) if found else None


def keep(port: int) -> int:
    """Runs the server until it ends by itself; its exit code. One that was killed is started again."""
    while True:
        code = subprocess.run([sys.executable, "-m", _SERVER, str(port)], check=False).returncode
        if code >= 0:
            return code


if __name__ == "__main__":
    sys.exit(keep(int(sys.argv[1])))
