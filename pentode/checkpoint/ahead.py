"""Many calls that wait for a network, several at a time, their results in order.

Unlike those of `concurrent.futures`, the threads are daemons: a process that must leave does not wait for a request.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")
S = TypeVar("S")


def ahead(function: Callable[[S], T], asked: Iterable[S], *, workers: int) -> Iterator[T]:
    """What the function gives for each thing asked, in order, `workers` calls at a time and as many done ahead.

    The first error is raised when its turn comes, after the calls under way have ended; the others are not made.
    """
    tasks: SimpleQueue[tuple[Future[T], S] | None] = SimpleQueue()

    def work() -> None:
        while (task := tasks.get()) is not None:
            future, one = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(one))
                except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
                    future.set_exception(error)

    threads = [threading.Thread(target=work, name="s3", daemon=True) for _ in range(workers)]
    waiting: deque[Future[T]] = deque()
    try:
        for thread in threads:
            thread.start()
        for one in asked:
            future: Future[T] = Future()
            waiting.append(future)
            tasks.put((future, one))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()
