"""Ranks find each other whoever else listens: real processes, squatted ports, late ranks, callers of other runs."""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.queues import Queue
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hpc.allocation import Allocation, master
from jobs import rendezvous
from jobs.rendezvous import RendezvousError
from tests.tiny_run import CHILD_LIMIT_S, CONTEXT

TOKEN, LIMIT_S = "digits-1a2b3c4d 3", 40


def allocation(rank: int, world: int, port: int, address: str = "127.0.0.1") -> Allocation:
    return Allocation(rank=rank, world_size=world, node=f"n{rank}", master_addr=address, master_port=port)


def join(place: Allocation, token: str, limit_s: float, late_s: float, answers: Queue) -> None:
    """One rank: it meets the others, and all sum their ranks."""
    time.sleep(late_s)
    try:
        store = rendezvous.connect(place, token, limit_s)
        dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)
        total = torch.tensor([place.rank])
        dist.all_reduce(total)
        answers.put((place.rank, int(total)))
        dist.barrier()
        dist.destroy_process_group()
    except RendezvousError as error:
        answers.put((place.rank, str(error)))
    answers.close()
    answers.join_thread()
    os._exit(0)


def meet(places: list[Allocation], token: str = TOKEN, limit_s: float = LIMIT_S, late: float = 0) -> dict[int, Any]:
    """What each rank got, rank 0 starting `late` seconds after the others."""
    answers: Queue = CONTEXT.Queue()
    children = [
        CONTEXT.Process(target=join, args=(place, token, limit_s, 0 if place.rank else late, answers))
        for place in places
    ]
    for child in children:
        child.start()
    try:
        return dict(answers.get(timeout=CHILD_LIMIT_S) for _ in places)
    finally:
        for child in children:
            child.join(5)
            child.kill()


def serve(listener: socket.socket, talk: Callable[[socket.socket], None]) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=talk, args=(connection,), daemon=True).start()


@contextmanager
def squatter(port: int, talk: Callable[[socket.socket], None]) -> Iterator[list[None]]:
    """Somebody else's server; yields one entry per caller that it has had."""
    callers: list[None] = []

    def counted(connection: socket.socket) -> None:
        callers.append(None)
        with connection, suppress(OSError):
            talk(connection)

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        threading.Thread(target=serve, args=(listener, counted), daemon=True).start()
        yield callers
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept


def says_nothing(connection: socket.socket) -> None:
    while connection.recv(100):
        pass
    time.sleep(60)


def garbage(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\xff\xfe" + bytes(1000))


def repeats(connection: socket.socket) -> None:
    while heard := connection.recv(1000):
        connection.sendall(heard)


def resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def drips(connection: socket.socket) -> None:
    for _ in range(200):
        connection.sendall(b"h")
        time.sleep(0.2)


def of_another_run(connection: socket.socket) -> None:
    """Our own protocol, under another token."""
    key = hashlib.sha256(b"digits-1a2b3c4d 2").digest()
    version, _, rank, nonce, _ = connection.recv(1000).decode().split()
    connection.sendall(rendezvous._Call(key, int(rank), nonce).reply(9).encode())
    assert version


@pytest.mark.parametrize("world", [1, 2, 8])
def test_all_ranks_meet(world: int) -> None:
    port = master({})[1]
    assert meet([allocation(rank, world, port) for rank in range(world)]) == dict.fromkeys(
        range(world), sum(range(world))
    )


@pytest.mark.parametrize("squatters", [(says_nothing, of_another_run), (garbage, resets), (repeats, drips)])
def test_foreign_listeners_are_passed_over(squatters: tuple[Callable[[socket.socket], None], ...]) -> None:
    port = master({})[1]
    with ExitStack() as stack:
        callers = [
            stack.enter_context(squatter(at, talk)) for at, talk in zip(rendezvous.ports(port), squatters, strict=False)
        ]
        assert meet([allocation(rank, 2, port) for rank in range(2)]) == {0: 1, 1: 1}
    assert all(callers), "a squatter was not asked: it proved nothing"


def test_rank_0_may_come_last() -> None:
    port = master({})[1]
    assert meet([allocation(rank, 3, port) for rank in range(3)], late=2) == {0: 3, 1: 3, 2: 3}


def test_callers_of_other_runs_get_nothing_and_disturb_nobody() -> None:
    """Rank 1 of another run, one that says nothing, and one that talks nonsense come before our own rank 1."""
    port = master({})[1]
    answers: Queue = CONTEXT.Queue()
    ours = [
        CONTEXT.Process(target=join, args=(allocation(rank, 2, port), TOKEN, LIMIT_S, 0, answers)) for rank in range(2)
    ]
    foreign = CONTEXT.Process(target=join, args=(allocation(1, 2, port), "another 1", 2.5, 0, answers))
    ours[0].start()
    with ExitStack() as stack:
        for said in (b"", b"GET / HTTP/1.0\r\n\r\n", b"hpc-rendezvous-1 call 1 00 11\n", bytes(5000)):
            caller = stack.enter_context(reach(port))
            with suppress(OSError):
                caller.sendall(said)
        foreign.start()
        rank, said_why = answers.get(timeout=CHILD_LIMIT_S)
        assert rank == 1 and "did not find rank 0 on 127.0.0.1" in said_why and f"{port} another's" in said_why
        ours[1].start()
        assert dict(answers.get(timeout=CHILD_LIMIT_S) for _ in ours) == {0: 1, 1: 1}
    for child in [*ours, foreign]:
        child.join(5)


def reach(port: int) -> socket.socket:
    end = time.monotonic() + 20
    while True:
        with suppress(ConnectionRefusedError):
            return socket.create_connection(("127.0.0.1", port), 5)
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("address", ["localhost", "::1", socket.gethostname()])
def test_names_and_both_families(address: str) -> None:
    try:
        family = socket.getaddrinfo(address, 1)[0][0]
        with socket.socket(family) as probe:
            probe.bind((address, 0))
    except OSError:
        pytest.skip(f"this machine has no {address}")
    port = master({})[1]
    assert meet([allocation(rank, 2, port, address) for rank in range(2)]) == {0: 1, 1: 1}


def test_a_loopback_address_listens_on_this_machine_alone() -> None:
    with rendezvous._listen("127.0.0.1", 0) as narrow, rendezvous._listen("node7.cluster", 0) as wide:
        assert narrow.getsockname()[0] == "127.0.0.1"
        assert wide.getsockname()[0] in ("::", "0.0.0.0")


def test_all_ports_taken_is_one_line() -> None:
    port = master({})[1]
    with ExitStack() as stack:
        for at in rendezvous.ports(port):
            stack.enter_context(rendezvous._listen("127.0.0.1", at))
        with pytest.raises(RendezvousError) as caught:
            rendezvous.connect(allocation(0, 2, port), TOKEN, 5)
    line = str(caught.value)
    assert all(str(at) in line for at in rendezvous.ports(port)) and "n0" in line and "\n" not in line


def test_a_rank_that_does_not_come_is_named() -> None:
    port = master({})[1]
    with pytest.raises(RendezvousError, match=r"^ranks 1, 2 of 3 did not come to 127\.0\.0\.1 \(ports .*firewall"):
        rendezvous.connect(allocation(0, 3, port), TOKEN, 0.3)


def test_rank_0_that_does_not_come_is_told_with_what_was_met() -> None:
    port = master({})[1]
    with squatter(port, says_nothing), pytest.raises(RendezvousError) as caught:
        rendezvous.connect(allocation(2, 3, port), TOKEN, 1.5)
    line = str(caught.value)
    assert f"{port} silent" in line and f"{rendezvous.ports(port)[1]} closed" in line and "\n" not in line


def test_a_name_that_means_nothing_is_told() -> None:
    with pytest.raises(RendezvousError, match="unknown host"):
        rendezvous.connect(allocation(1, 2, 12345, "no-such-node.invalid"), TOKEN, 0.2)


def test_without_a_port_the_way_to_start_ranks_is_told() -> None:
    with pytest.raises(RendezvousError, match="HPC_MASTER_PORT is not set"):
        rendezvous.connect(allocation(1, 2, 0), TOKEN, 1)


@pytest.mark.parametrize("first", [1024, 9_999, 10_000, 32_768, 59_999, 60_999, 65_535])
def test_candidates_are_ports_and_differ(first: int) -> None:
    candidates = rendezvous.ports(first)
    assert candidates[0] == first and len(set(candidates)) == rendezvous.CANDIDATES
    assert all(1024 <= port <= 65_535 for port in candidates)
