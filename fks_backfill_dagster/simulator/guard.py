"""Access to the control routes: programs of this machine are permitted, web pages of other sites are not.

A page of any other site can make the browser send a GET or a form's POST to a port of this machine, and, with a
hostname of its own that resolves to it (DNS rebinding), read the response too. Two headers identify it, and it
cannot change them: `Host`, and `Origin`, which the browser sends with every POST of a page. Programs send no
`Origin`, whatever the type of their body (`curl -d`).
"""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fks_backfill_dagster.loopback import is_loopback

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+))(?::\d{1,5})?")


def rejection_of(request: Request, bound: str) -> Response | None:
    """The response to a forbidden request; None if it is permitted. `bound` is the host on which the server listens."""
    hosts = request.headers.getlist("host")
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    name = "" if match is None else (match[1] or match[2]).lower()
    server = request.scope.get("server")
    # If the server listens on all addresses: the local address of this connection.
    own = {bound.lower(), server[0] if server else ""}
    if not name or not (is_loopback(name) or name in own):
        return _rejection(421, "the control routes accept only a loopback address or that of --host")
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    if (origin is not None and origin.lower() != f"http://{hosts[0].lower()}") or site not in (
        "none",
        "same-origin",
    ):
        return _rejection(403, "the control routes reject web pages of other sites")
    return None


def _rejection(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)
