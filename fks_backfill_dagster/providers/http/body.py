"""Reads the body of a response, bounded in size and time."""

from __future__ import annotations

import time

import requests
from urllib3.exceptions import (
    HTTPError,
    ReadTimeoutError,
)

# Well above any documented response (50,000 Polygon bars have 6 MB), compressed and decompressed. Parsed JSON takes
# up to thirty times as much memory.
MAX_JSON_BYTES = 16 * 1024 * 1024
_CHUNK = 1 << 18


class TooLarge(requests.RequestException):
    """A response of more than `limit` bytes; the remainder is not read."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"more than {limit:,} bytes")


def read_body(response: requests.Response, max_bytes: int, seconds: float) -> bytes:
    """The decoded body of a streamed response, bounded in size and in time.

    The timeout of requests restarts with every byte, so it alone never ends a slowly dripping response.
    Raises only exceptions of requests.
    """
    deadline = time.monotonic() + seconds
    body = bytearray()
    try:
        while chunk := response.raw.read1(_CHUNK, decode_content=True):
            body += chunk
            if len(body) > max_bytes:
                raise TooLarge(max_bytes)
            if time.monotonic() > deadline:
                raise requests.ReadTimeout("timed out")
    except requests.RequestException:
        raise
    except ReadTimeoutError:
        raise requests.ReadTimeout("timed out") from None
    except HTTPError as error:
        raise requests.exceptions.ChunkedEncodingError(str(error)) from None
    return bytes(body)
