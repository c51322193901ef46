"""Work done ahead of its use, in a background thread that ends before the interpreter does.

    with Prefetch(items) as ahead:
        for item in ahead: ...

Python ends a daemon thread at exit by unwinding it wherever it next asks for the interpreter's lock. In C++ code that
lets no exception pass, as in torch, this aborts the whole process: "terminate called without an active
exception", status 134, after all work was done. So the thread here is none: the interpreter waits for it, and it leaves
when nobody wants its items any more.
"""
import queue
import threading
import time
import weakref

POLL = 0.05                                             # seconds between looks at whether the items are still wanted


class Unwanted(BaseException):
    """Ends the work of a background thread; no `except Exception` holds it up."""


class Prefetch:
    """Iterates over `items`, taken by a background thread at most `depth` ahead; what they raise is raised here.

    close(), or the end of a `with`, returns when the thread has ended. It ends by itself soon after the iterator is
    dropped or the main thread has ended, in whatever way.
    """

    def __init__(self, items, depth=64):
        self.ready = queue.Queue(depth)
        self.thread = _Worker(items, self.ready)
        weakref.finalize(self, self.thread.stopped.set)
        self.thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        while not self.thread.stopped.is_set():
            check()                                     # this may itself be in the thread of another Prefetch
            working = self.thread.is_alive()
            try:
                item, error = self.ready.get(timeout=POLL)
            except queue.Empty:
                if working:
                    continue
                break                                   # it ended because the main thread did

            if error is None:
                return item
            self.close()
            raise error
        check()
        raise StopIteration

    def close(self):
        self.thread.stopped.set()
        if self.thread is not threading.current_thread():
            self.thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Worker(threading.Thread):
    """The thread. It holds no reference to the Prefetch, whose end is what stops it."""

    def __init__(self, items, ready):
        super().__init__(name="prefetch", daemon=False)
        self.items, self.ready, self.stopped = items, ready, threading.Event()

    def run(self):
        try:
            for item in self.items:
                self.put(item)
                check()
            self.put(None, StopIteration())
        except Unwanted:
            pass
        except BaseException as error:                  # whatever it is, it belongs to the consumer
            try:
                self.put(None, error)
            except Unwanted:
                pass
        finally:
            if hasattr(self.items, "close"):            # in this thread, not in the one that drops the last reference
                self.items.close()
            self.items = None

    def put(self, item, error=None):
        while True:
            check()
            try:
                return self.ready.put((item, error), timeout=POLL)
            except queue.Full:
                pass


def check():
    """To be called now and then in long work: in a background thread whose items nobody wants any more, it ends it."""
    thread = threading.current_thread()
    if isinstance(thread, _Worker):
        if thread.stopped.is_set() or not threading.main_thread().is_alive():
            raise Unwanted


def pause(seconds):
    """Sleeps, in slices short enough that a background thread ends in time."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(left, POLL))
