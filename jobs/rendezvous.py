"""How the ranks of a run meet, whoever else has taken the port: one store for all of them, or one line why not."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # its stub leaves it out

from hpc.allocation import Allocation

CANDIDATES = 5
_LOWEST, _SPAN, _STRIDE = 10_000, 50_000, 997
_VERSION = "hpc-rendezvous-1"
_LONGEST_LINE = 256
_PATIENCE_S, _MOST_PATIENCE_S = 1.0, 5.0
"""How long a listener may take to answer: at the first try, and after several (the right one may be slow)."""
_ENTER_S = 10.0
"""How long the store, once named, may take to be reached."""
_CONVERSATIONS = 64
"""Callers that rank 0 listens to at once; more are turned away and come again."""
_JOINED = "rendezvous/{}"


class RendezvousError(RuntimeError):
    """The ranks did not find each other: one line that names the host, the ports and what to check."""


def connect(allocation: Allocation, token: str, timeout_s: float) -> TCPStore:
    """The store that all ranks of this attempt share; every rank calls this once.

        store = connect(allocation, f"{run.name} {allocation.generation}", 300)
        dist.init_process_group("gloo", store=store, rank=allocation.rank, world_size=allocation.world_size)

    The batch shell found a free port, which somebody else may have taken since. So rank 0 lets the store listen on a
    port that the system chooses, and tells it at the first free one of `ports(allocation.master_port)` to callers that
    know the token; the others ask at each of these until an answer shows the token. Neither side sends the token
    itself, only an HMAC-SHA256 under it, so that a listener that repeats what it hears is not believed.

    `allocation.master_addr` may be a name or an address, IPv4 or IPv6; with a loopback address nothing listens on other
    interfaces. Returns on rank 0 when all ranks have come. Raises RendezvousError after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    if allocation.world_size > 1 and not allocation.master_port:
        raise RendezvousError(
            f"rank {allocation.rank} of {allocation.world_size} on {allocation.node} was told no port to meet at: "
            f"HPC_MASTER_PORT is not set; start ranks through the run's job script ('hpc submit')"
        )
    key = hashlib.sha256(token.encode()).digest()
    store = _Host(allocation, key, deadline).gather() if allocation.rank == 0 else _join(allocation, key, deadline)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def ports(first: int) -> list[int]:
    """Where rank 0 answers: the port that the batch shell found free, then others, the same for all ranks."""
    others = [_LOWEST + (first - _LOWEST + _STRIDE * number) % _SPAN for number in range(1, CANDIDATES)]
    return [first, *others]


def _mac(key: bytes, *parts: object) -> str:
    return hmac.new(key, " ".join(map(str, parts)).encode(), "sha256").hexdigest()


@dataclass(frozen=True)
class _Call:
    """What a rank says to a listener, and what only the right one can reply: the port of the store."""

    key: bytes
    rank: int
    nonce: str

    def line(self) -> str:
        return f"{_VERSION} call {self.rank} {self.nonce} {_mac(self.key, 'call', self.rank, self.nonce)}\n"

    def reply(self, port: int) -> str:
        return f"{_VERSION} reply {port} {_mac(self.key, 'reply', port, self.rank, self.nonce)}\n"

    def port(self, reply: str) -> int | None:
        """The port in a reply, None for one that is not rank 0's of this attempt."""
        words = reply.split()
        known = len(words) == 4 and words[2].isascii() and words[2].isdecimal()
        return int(words[2]) if known and hmac.compare_digest(self.reply(int(words[2])), reply) else None

    @staticmethod
    def heard(key: bytes, line: str, world_size: int) -> _Call | None:
        """The call in a line, None for one that is no rank's of this attempt."""
        words = line.split()
        known = len(words) == 5 and words[2].isascii() and words[2].isdecimal()
        call = _Call(key, int(words[2]), words[3]) if known else None
        fits = call and 0 < call.rank < world_size and hmac.compare_digest(call.line(), line)
        return call if fits else None


def _read_line(connection: socket.socket, seconds: float) -> str:
    """One line of ASCII, empty for what is none; TimeoutError when it has not come in time, however it drips."""
    deadline, received = time.monotonic() + seconds, b""
    while not received.endswith(b"\n"):
        if (left := deadline - time.monotonic()) <= 0:
            raise TimeoutError
        connection.settimeout(left)
        part = connection.recv(_LONGEST_LINE - len(received))
        if not part:  # the end, or too long
            return ""
        received += part
    return received.decode("ascii", "backslashreplace")


class _Host:
    """Rank 0: it hosts the store, and tells the other ranks where."""

    def __init__(self, allocation: Allocation, key: bytes, deadline: float) -> None:
        self._allocation, self._key, self._deadline = allocation, key, deadline
        listener = _listen(allocation.master_addr, 0)
        self._port = int(listener.getsockname()[1])
        self._store = TCPStore(
            _loopback(allocation.master_addr) or "127.0.0.1",  # no name is needed to reach oneself
            self._port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_ENTER_S),
            master_listen_fd=listener.detach(),
        )
        self._talking = threading.BoundedSemaphore(_CONVERSATIONS)

    def gather(self) -> TCPStore:
        """Answer callers until all ranks have come."""
        others = range(1, self._allocation.world_size)
        if not others:
            return self._store
        with self._answering_socket() as listener:
            while missing := [rank for rank in others if not self._store.check([_JOINED.format(rank)])]:
                if time.monotonic() > self._deadline:
                    raise RendezvousError(self._nobody(missing))
                self._accept(listener)
        return self._store

    def _answering_socket(self) -> socket.socket:
        address = self._allocation.master_addr
        candidates = ports(self._allocation.master_port)
        for port in candidates:
            with suppress(OSError):
                listener = _listen(address, port)
                listener.settimeout(0.05)
                return listener
        raise RendezvousError(
            f"rank 0 cannot listen on {self._allocation.node}: ports {_listed(candidates)} are all taken; "
            f"look at who listens there ('ss -ltnp'), or start again for other ports"
        )

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # nobody came, or is gone already
            connection, _ = listener.accept()
            if self._talking.acquire(blocking=False):
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection, suppress(OSError):
                line = _read_line(connection, _MOST_PATIENCE_S)
                if call := _Call.heard(self._key, line, self._allocation.world_size):
                    connection.sendall(call.reply(self._port).encode())
        finally:
            self._talking.release()

    def _nobody(self, missing: list[int]) -> str:
        ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
        return (
            f"{ranks} of {self._allocation.world_size} did not come to {self._allocation.master_addr} "
            f"(ports {_listed(ports(self._allocation.master_port))}): look at their output for why they did not start, "
            f"and whether their nodes reach {self._allocation.node} (name resolution, firewall between nodes)"
        )


def _join(allocation: Allocation, key: bytes, deadline: float) -> TCPStore:
    """Every other rank: ask at each port in turn until one shows the token, then join the store that it names."""
    host, candidates = allocation.master_addr, ports(allocation.master_port)
    patience, met = _PATIENCE_S, dict.fromkeys(candidates, "not tried")
    while time.monotonic() < deadline:
        for port in candidates:
            call = _Call(key, allocation.rank, secrets.token_hex(16))
            met[port], store_port = _ask(host, port, call, min(patience, max(deadline - time.monotonic(), 0.001)))
            if store_port is None:
                continue
            if store := _enter(allocation, store_port):
                return store
            met[port] = f"rank 0, but its store at port {store_port} is out of reach"
        patience = min(1.5 * patience, _MOST_PATIENCE_S)
        time.sleep(0.1)
    answers = ", ".join(f"{port} {what}" for port, what in met.items())
    raise RendezvousError(
        f"rank {allocation.rank} on {allocation.node} did not find rank 0 on {host} (ports: {answers}): look at rank "
        f"0's output for why it did not start, and whether {allocation.node} reaches {host} (name, firewall)"
    )


def _ask(host: str, port: int, call: _Call, seconds: float) -> tuple[str, int | None]:
    """What a listener is found to be, and the store's port where it is rank 0."""
    try:
        with socket.create_connection((host, port), seconds) as connection:
            # A connection to a free local port may meet itself, and would then keep rank 0 from that port.
            if connection.getsockname() == connection.getpeername():
                return "closed", None
            connection.sendall(call.line().encode())
            store_port = call.port(_read_line(connection, seconds))
    except socket.gaierror:
        return "unknown host", None
    except TimeoutError:
        return "silent", None
    except ConnectionRefusedError:
        return "closed", None
    except OSError as error:
        return str(error.strerror or error).lower(), None
    return ("another's", None) if store_port is None else ("found", store_port)


def _enter(allocation: Allocation, port: int) -> TCPStore | None:
    """The store, with this rank on its list; None where it cannot be reached."""
    with suppress(RuntimeError):
        store = TCPStore(allocation.master_addr, port, is_master=False, timeout=timedelta(seconds=_ENTER_S))
        store.set(_JOINED.format(allocation.rank), allocation.node)
        return store
    return None


def _listen(address: str, port: int) -> socket.socket:
    """A listening socket; on this machine alone for a loopback address, else on all interfaces. Raises OSError."""
    loopback = _loopback(address)
    wide = loopback is None and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if wide or (loopback and ":" in loopback) else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if port:  # a connection that has just ended does not hold it
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if wide:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((loopback or "", port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _loopback(address: str) -> str | None:
    if address == "localhost":
        return "127.0.0.1"
    with suppress(ValueError):
        return address if ipaddress.ip_address(address).is_loopback else None
    return None


def _listed(candidates: list[int]) -> str:
    return ", ".join(map(str, candidates))
