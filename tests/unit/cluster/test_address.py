"""Addresses of clusters."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from batchrun.cluster import address as addresses
from batchrun.cluster.address import check_address, find_dashboard
from batchrun.cluster.jobs import ClusterJobs
from batchrun.cluster.session import ray_session
from batchrun.errors import ClusterError

Listen = Callable[[bytes | None], str]


@pytest.fixture
def listen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listen]:
    """Somebody who answers one call with some bytes and hangs up, or never (None); host:port."""
    monkeypatch.setattr(addresses, "ANSWER_S", 0.2)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # whatever other tests have started
    with ExitStack() as stack:

        def answer(server: socket.socket, said: bytes) -> None:
            with server.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(said)

        def start(said: bytes | None) -> str:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            if said is not None:
                thread = threading.Thread(target=answer, args=(server, said))
                thread.start()
                stack.callback(thread.join)
            return f"127.0.0.1:{server.getsockname()[1]}"

        yield start


@pytest.mark.parametrize("address", ["rubbish", "ftp://host", "127.0.0.1:99999", "http://", ":80"])
def test_what_is_no_address_is_named(address: str) -> None:
    """A wrong address is named at once, with one that would do, and nobody is asked."""
    with pytest.raises(ClusterError, match="is no address of a Ray dashboard") as caught:
        check_address(address)
    assert "--address http://127.0.0.1:8265" in caught.value.hint
    with pytest.raises(ClusterError, match="is no address of a Ray dashboard"):
        ClusterJobs(address)


@pytest.mark.parametrize("scheme", ["", "http://", "ray://"])
def test_who_never_answers_is_named(listen: Listen, scheme: str) -> None:
    """Exit code 2 after seconds, with the address and what to give instead, for jobs of a cluster
    and for a run inside one."""
    address = scheme + listen(None)
    with pytest.raises(ClusterError, match=f"no Ray dashboard answers at '{address}': ") as caught:
        ClusterJobs(address)
    assert caught.value.exit_code == 2
    assert "--address http://127.0.0.1:8265" in caught.value.hint
    with pytest.raises(ClusterError, match=f"no Ray cluster answers at '{address}': timed out"):
        with ray_session(address, 1, {}):
            pass


def test_who_answers_is_told_apart(listen: Listen) -> None:
    """A host and port where HTTP is spoken are a dashboard; the head's are left as they are."""
    assert find_dashboard(place := listen(b"HTTP/1.1 200 OK\r\n\r\n")) == f"http://{place}"
    assert find_dashboard(place := listen(b"\0\0\x18\4\0\0\0")) == place
    assert find_dashboard("auto") == "auto"
    with pytest.raises(OSError, match="closed without an answer"):
        find_dashboard(listen(b""))
    url = "http://" + listen(b"HTTP/1.1 401 Unauthorized\r\n\r\n")
    assert find_dashboard(url) == url
    with pytest.raises(ClusterError, match="a dashboard listens there"):
        with ray_session(listen(b"HTTP/1.1 200 OK\r\n\r\n"), 1, {}):
            pass
