"""The background thread: order, depth, errors, and its end in whatever way the iterator or the program ends."""
import gc
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lorasae.errors import InputError
from lorasae.io.prefetch import Prefetch, Unwanted, check, pause

ROOT = Path(__file__).parent.parent


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition, seconds=5):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_items_come_in_order_and_their_exception_in_turn():
    def items():
        yield from range(100)
        raise InputError("line 101 is bad")

    prefetch, given = Prefetch(items(), depth=3), []
    with pytest.raises(InputError, match="line 101 is bad"):
        for item in prefetch:
            given.append(item)
    assert given == list(range(100)) and list(prefetch) == []
    assert list(Prefetch(iter(range(5)))) == list(range(5))


def test_it_works_ahead_but_no_further_than_its_depth():
    made = []
    with Prefetch((made.append(i) or i for i in range(1000)), depth=4):
        assert wait_until(lambda: len(made) >= 5)                           # four in the queue, one in hand
        time.sleep(0.2)
        assert len(made) == 5


@pytest.mark.parametrize("end", ["close", "with", "drop", "abandon after an item", "error in the with"])
def test_the_thread_ends_with_the_iterator(end):
    assert wait_until(lambda: not prefetch_threads())
    prefetch = Prefetch(iter(int, 1), depth=2)
    assert len(prefetch_threads()) == 1
    if end == "close":
        prefetch.close()
        assert not prefetch_threads() and list(prefetch) == []
        prefetch.close()                                                    # a second time is as good as once
    elif end == "with":
        with prefetch:
            next(prefetch)
        assert not prefetch_threads() and list(prefetch) == []
    elif end == "error in the with":
        with pytest.raises(KeyError), prefetch:
            raise KeyError
        assert not prefetch_threads()
    elif end == "abandon after an item":
        next(prefetch)
    del prefetch
    gc.collect()
    assert wait_until(lambda: not prefetch_threads())


def test_what_the_items_hold_open_is_closed_in_the_thread_itself():
    closed = []

    def items():
        try:
            yield from iter(int, 1)
        finally:
            closed.append(threading.current_thread().name)

    with Prefetch(items(), depth=1):
        pass
    assert closed == ["prefetch"]


def test_long_work_between_two_items_is_left_where_it_checks():
    def items():
        yield 0
        try:
            while True:
                pause(0.01)
        except Exception:                                                   # does not hold it up
            pytest.fail("an ordinary exception")

    prefetch = Prefetch(items())
    assert next(prefetch) == 0
    started = time.monotonic()
    prefetch.close()
    assert time.monotonic() - started < 1


def test_a_prefetch_within_a_prefetch_ends_with_it():
    def outer():
        with Prefetch(iter(int, 1), depth=1) as inner:
            yield from inner

    prefetch = Prefetch(outer(), depth=1)
    assert next(prefetch) == 0 and len(prefetch_threads()) == 2
    prefetch.close()
    assert not prefetch_threads()


def test_the_end_of_the_program_is_not_taken_for_the_end_of_the_items():
    """The thread within may see it first; the one around it must not go on as if all items had been there."""
    program = """
import sys, time
from lorasae.io.prefetch import Prefetch, pause

def endless():
    yield 0
    while True:
        pause(0.01)

def outer():
    with Prefetch(endless(), depth=1) as inner:
        yield from inner
    print("the items ended", flush=True)

ahead = [Prefetch(outer()) for _ in range(5)]
for one in ahead:
    next(one)
"""
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


PROGRAM = """
import atexit, os, signal, sys, time
import torch
from lorasae.io.prefetch import Prefetch

def work():
    while True:
        for _ in range(2000):
            torch.ones(8) + 1
        yield

children = []
for way in sys.argv[1:]:                                # a process for each, to import torch once
    children.append(os.fork())
    if not children[-1]:
        break
else:
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    sys.exit()

ahead = [Prefetch(work(), depth=10 ** 6) for _ in range(4)]
for one in ahead:
    next(one)
ahead.pop().close()
ahead.pop()
time.sleep(0.05)
started = time.monotonic()
signal.signal(signal.SIGINT, signal.default_int_handler)                    # a background job begins with it ignored
atexit.register(lambda: print(time.monotonic() - started, file=sys.stderr))        # threads have been waited for by then
exec(way)
"""


def test_a_program_ends_with_its_own_status_while_the_thread_is_inside_torch():
    ways = {"pass": 0, "sys.exit(3)": 3, "raise ValueError('of a user')": 1, "signal.raise_signal(signal.SIGINT)": -signal.SIGINT}
    result = subprocess.run([sys.executable, "-c", PROGRAM, *ways], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert result.stdout.split() == [str(int(status)) for status in ways.values()], result.stderr
    assert "terminate called" not in result.stderr
    delays = [float(line) for line in result.stderr.splitlines() if line.replace(".", "", 1).isdigit()]
    assert len(delays) == len(ways) and max(delays) < 10                       # on a busy machine too
