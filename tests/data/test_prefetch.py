"""The thread that makes batches ahead of their use."""

import gc
import threading
import time

import pytest
import torch

from jmm_fast.data.prefetch import ahead


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert not threads()


def counting(count, made=None, at=None):
    for number in range(count):
        if number == at:
            raise LookupError("row 3")
        if made is not None:
            made.append(number)
        yield number


@pytest.mark.parametrize("depth", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_all_items_in_their_order(depth, count):
    assert list(ahead(counting(count), depth)) == list(range(count))


def settled(made):
    """The items made, once no more come."""
    before = None
    while before != len(made):
        before = len(made)
        time.sleep(0.05)
    return len(made)


@pytest.mark.parametrize("depth", [1, 3])
def test_so_many_are_made_ahead_and_no_more(depth):
    made = []
    items = ahead(counting(20, made), depth)
    assert not threads(), "nothing is made before anything is asked for"
    for number in range(5):
        assert next(items) == number
        assert settled(made) == number + 1 + depth
    items.close()
    assert settled(made) == 5 + depth


def test_without_depth_nothing_is_made_ahead():
    made = []
    items = ahead(counting(20, made), 0)
    assert next(items) == 0 and made == [0] and not threads()


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_comes_in_the_place_of_its_item(depth):
    items, found = ahead(counting(20, at=3), depth), []
    with pytest.raises(LookupError, match="row 3") as caught:
        found.extend(items)
    assert found == [0, 1, 2]
    assert any(entry.name == "counting" for entry in caught.traceback), "where it was raised is told"
    assert list(items) == []


def closed(items):
    items.close()


def interrupted(items):
    with pytest.raises(KeyboardInterrupt):
        items.throw(KeyboardInterrupt)


@pytest.mark.parametrize("end", [closed, interrupted])
def test_an_early_end_leaves_no_thread(end):
    ended = []

    def making():
        try:
            yield from counting(1000)
        finally:
            ended.append(threading.current_thread().name)

    items = ahead(making(), 2)
    next(items)
    assert len(threads()) == 1
    end(items)
    assert not threads()
    assert ended == ["prefetch"], "what the items hold is let go in the thread that made them"


def test_a_dropped_iterator_leaves_no_thread():
    items = ahead(counting(1000), 2)
    next(items)
    assert len(threads()) == 1
    del items
    gc.collect()
    assert not threads()


def test_the_thread_takes_one_core_and_no_other_thread_less():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:

        def counts():
            yield torch.get_num_threads()

        items = ahead(counts(), 1)
        assert next(items) == 1
        elsewhere = []
        later = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert (torch.get_num_threads(), elsewhere) == (3, [3])
        items.close()
    finally:
        torch.set_num_threads(before)
