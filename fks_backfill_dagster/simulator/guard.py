"""Who may use the control routes: programs of this machine, and no web page that its browser shows.

A page of any other site can make the browser send a GET or a form's POST to a port of this machine, and with a name
of its own that resolves to it (DNS rebinding) read the answer too. Two things that such a page cannot change tell it:
the name in `Host`, and the `Origin`, which comes with every POST of a page. A program sends none, whatever the type of
its body (`curl -d`).
"""

from __future__ import annotations

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fks_backfill_dagster.loopback import is_loopback

_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/@\s]+))(?::\d{1,5})?")


def refusal(request: Request, bound: str) -> Response | None:
    """The answer to a request that is not let through; None for the others. `bound` is where the server listens."""
    hosts = request.headers.getlist("host")
    match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
    name = "" if match is None else (match[1] or match[2]).lower()
    server = request.scope.get("server")
    # Of a server that listens everywhere: the address that this connection came to.
    own = {bound.lower(), server[0] if server else ""}
    if not name or not (is_loopback(name) or name in own):
        return _answer(421, "the control routes are reached by a loopback address or by that of --host only")
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "none")
    if (origin is not None and origin.lower() != f"http://{hosts[0].lower()}") or site not in (
        "none",
        "same-origin",
    ):
        return _answer(403, "the control routes are not for web pages of other sites")
    return None


def _answer(status: int, sentence: str) -> Response:
    return JSONResponse({"error": sentence}, status_code=status)
