"""What an HTTP server on a node answers, such as flanneld's health endpoints."""

from __future__ import annotations

from testbed.errors import LabError
from testbed.labs import interpreter
from testbed.labs.base import Place

_STATUS = """
import http.client, sys
connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=3)
try:
    connection.request("GET", sys.argv[2])
    print(connection.getresponse().status)
except (OSError, http.client.HTTPException):
    print(0)
"""


def http_status(place: Place, port: int, path: str) -> int:
    """The status by which a server on a node's own loopback answers; 0 for none. Raises LabError."""
    said = place.run([interpreter(), "-I", "-S", "-c", _STATUS, str(port), path], timeout=20).stdout
    try:
        return int(said)
    except ValueError as error:
        raise LabError(f"the client printed no status: {said[:200]!r}", where=place.name) from error
