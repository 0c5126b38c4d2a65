"""Make what comes next while the present is in use."""

import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


def ahead(items: Generator[Item, None, None], depth: int) -> Iterator[Item]:
    """``items`` in their order, made by a thread that is up to ``depth`` of them ahead; 0 makes each when asked for.

    The thread lives as long as the iterator that is returned: until the items end, or it is closed or dropped. What the
    making of an item raises, the iterator raises in its place. torch uses one thread of the processor in there; its
    kernels give the same numbers with any number of them.
    """
    if depth == 0:
        yield from items
        return
    room = threading.Semaphore(depth)
    made: queue.SimpleQueue[tuple[str, object]] = queue.SimpleQueue()
    closed = threading.Event()
    began = threading.Event()

    def work() -> None:
        # The number is the thread's own, but also that with which threads begin that are started later.
        torch.set_num_threads(1)
        began.set()
        try:
            while room.acquire() and not closed.is_set():
                try:
                    made.put(("item", next(items)))
                except StopIteration:
                    made.put(("end", None))
                    return
        except BaseException as error:
            made.put(("error", error))
        finally:
            items.close()

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        began.wait()
        torch.set_num_threads(torch.get_num_threads())
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            room.release()
            yield value
    finally:
        closed.set()
        room.release()
        thread.join()
