"""Packs sources in several processes: bounded memory, one line per bad source, nothing left running after a kill."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from itertools import islice
from multiprocessing import forkserver
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

from datasets.masks import mask_values, read_mask
from datasets.packing.journal import Finished
from datasets.packing.samples import Appender, Bench, Task, make_samples, marked
from datasets.sources import Header, Source, UnusableSource

Outcome = Finished | str
"""of a source: its samples, or the reason why there are none"""


class WorkerDied(Exception):
    """A process was killed, most often for its memory."""


def run(bench: Bench, tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, Outcome]]:
    """Each task with its outcome, in the order they end. Raises WorkFailed (OSError) and WorkerDied."""
    if workers == 1:
        writer = Appender(bench)
        try:
            for task in tasks:
                yield task, _outcome(bench, writer, task)
        finally:
            writer.close()
        return
    with _processes(workers, _begin, (bench,)) as pool:
        yield from _in_turn(pool, iter(tasks), 2 * workers)


@contextmanager
def _processes(workers: int, begin: Callable[..., None], arguments: tuple[Any, ...]) -> Iterator[ProcessPoolExecutor]:
    # not fork: the progress bar has a thread
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets.packing.pool"])
    with _deaf():
        forkserver.ensure_running()
    pool = ProcessPoolExecutor(workers, context, begin, arguments)
    try:
        with _held():
            for _ in range(workers):  # each of these jobs starts a process
                pool.submit(int)
        yield pool
    except BrokenProcessPool:
        raise WorkerDied from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf() -> Iterator[None]:
    """What starts meanwhile ignores Ctrl-C from its first moment on, as all that it forks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _held() -> Iterator[None]:
    """Signals wait meanwhile: of processes that are started by halves, some would be left, with a traceback each."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def survey(
    masks: Sequence[tuple[Source, Source, Header]], workers: int, report: Callable[[int], None]
) -> dict[int, Path]:
    """The values that masks have, each with the first that has it; masks that cannot be read are left to `run`.

    `report` is told how many were read, after each.
    """
    found: dict[int, Path] = {}
    with ExitStack() as stack:
        run_all = map if workers == 1 else stack.enter_context(_processes(workers, _keep_to_parent, ())).map
        read = zip(masks, run_all(_values, *zip(*masks, strict=True)), strict=True)
        for number, ((mask, _, _), values) in enumerate(read, 1):
            for value in values:
                found.setdefault(value, mask.path)
            report(number)
    return found


def _values(mask: Source, image: Source, wanted: Header) -> list[int]:
    try:
        return mask_values(read_mask(mask, image, wanted))
    except (UnusableSource, OSError):
        return []


def _in_turn(pool: ProcessPoolExecutor, tasks: Iterator[Task], most: int) -> Iterator[tuple[Task, Outcome]]:
    pending: dict[Future[Outcome], Task] = {pool.submit(_work, task): task for task in islice(tasks, most)}
    while pending:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            task = pending.pop(future)
            yield task, future.result()
            pending |= {pool.submit(_work, task): task for task in islice(tasks, 1)}


_work_one: Callable[[Task], Outcome]


def _keep_to_parent() -> None:
    """In each process: Ctrl-C is the parent's to answer; without a parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent.sentinel,), daemon=True).start()


def _begin(bench: Bench) -> None:
    global _work_one
    _keep_to_parent()
    writer = Appender(bench)
    _work_one = lambda task: _outcome(bench, writer, task)  # noqa: E731


def _leave_with(sentinel: int) -> None:
    wait_for([sentinel])
    os._exit(1)


def _work(task: Task) -> Outcome:
    return _work_one(task)


def _outcome(bench: Bench, writer: Appender, task: Task) -> Outcome:
    with marked(bench.folder, task.source.path):
        try:
            return make_samples(bench, writer, task)
        except UnusableSource as error:
            return str(error)
