"""Addresses of Ray clusters: whether a text is one, and whether anybody answers there.

Ray's own clients would try a wrong one for most of a minute, and a silent one for ever.
"""

from __future__ import annotations

import socket
import ssl
import urllib.error
import urllib.request

from batchrun.errors import ClusterError

ANSWER_S = 5.0
"""How long a cluster may take to say its first word."""

_FOUND_BY_RAY = ("auto", "local")
_SCHEMES = ("http", "https", "ray")
_MAX_PORT = 65535
_QUESTION = "/api/version"
_HTTP = b"HTTP"
HINT = (
    "give the dashboard's address, e.g. --address http://127.0.0.1:8265; in Kubernetes, "
    "`kubectl port-forward service/CLUSTER-head-svc 8265` brings it to this machine"
)


def check_address(address: str) -> None:
    """Raise ClusterError for what is no address, before anybody is asked."""
    scheme, separator, place = address.rpartition("://")
    if separator:
        is_address = scheme in _SCHEMES and place.strip("/") != ""
    else:
        is_address = address in _FOUND_BY_RAY or host_and_port(address) is not None
    if not is_address:
        raise ClusterError(f"{address!r} is no address of a Ray dashboard", HINT)


def host_and_port(address: str) -> tuple[str, int] | None:
    """What ``host:port``, with or without a scheme, names; None where it names no port."""
    host, _, port = address.rpartition("://")[2].partition("/")[0].rpartition(":")
    if host and port.isdecimal() and 0 < int(port) <= _MAX_PORT:
        return host.strip("[]"), int(port)
    return None


def find_dashboard(address: str) -> str:
    """``address`` when somebody answers there; as the URL of a dashboard where it is one.

    Raises OSError when nobody says a word within some seconds.
    """
    if address.startswith(("http://", "https://")):
        _ask_dashboard(address)
        return address
    place = host_and_port(address)
    if place is None:
        return address  # Ray finds it by itself
    with socket.create_connection(place, timeout=ANSWER_S) as connection:
        connection.sendall(f"GET {_QUESTION} HTTP/1.0\r\n\r\n".encode())
        word = connection.recv(len(_HTTP), socket.MSG_WAITALL)
    if not word:
        raise ConnectionError("the connection was closed without an answer")
    # The head of a cluster, which Ray's clients take too, does not speak HTTP.
    return f"http://{address}" if word == _HTTP and "://" not in address else address


def _ask_dashboard(address: str) -> None:
    try:
        urllib.request.urlopen(address.rstrip("/") + _QUESTION, timeout=ANSWER_S).close()
    except urllib.error.HTTPError:
        return  # what it thinks of the question is for Ray's client to see
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            return  # as well
        raise error.reason if isinstance(error.reason, OSError) else error from error
