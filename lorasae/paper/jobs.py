"""Work shared out over processes: each job after those that it needs, one line of progress for all of them.

A job prints into a log of its own. A process whose parent is gone ends too, so a killed command leaves nothing behind that
writes to its folders. One at a time, jobs are done in the command's own process.
"""
import os
import signal
import threading
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context, parent_process
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.io.console import progress_line


class Job(NamedTuple):
    name: str
    needs: tuple                                        # names of jobs
    work: dict                                 # {kind of work: tokens}, from which its time follows


def run_all(jobs, work, study, processes, progress=None):
    """Does work(study, job's name) for every job, the first that is ready first -> {name: why it could not be done}.

    What needs a job that could not be done is not tried.
    """
    waiting, running = list(jobs), {}                   # running: {Future: Job}
    done, failed = set(), {}

    def end(job, reason, seconds):
        if reason is None:
            done.add(job.name)
        else:
            failed[job.name] = reason
        if progress is not None:
            progress.report(job.name, reason, seconds)

    def start(job, pool):
        waiting.remove(job)
        missing = [name for name in job.needs if name in failed]
        if missing:
            end(job, failed[missing[0]], 0.0)
        else:
            running[pool.submit(logged, work, study, job.name)] = job

    with executor(processes) as pool:
        try:
            while waiting or running:
                free = processes - len(running)
                for job in ready(waiting, done | failed.keys())[:free]:
                    start(job, pool)

                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    reason, seconds = future.result()
                    end(running.pop(future), reason, seconds)
        except BrokenProcessPool:
            names = ", ".join(job.name for job in running.values())
            raise InputError(f"a process that worked on {names} was killed (too little memory?): "
                             "the same command continues; --jobs 1 needs the least") from None
        except BaseException:
            for process in active_children():
                process.terminate()
            raise
    return failed


def ready(waiting, over):
    """The jobs all of whose needs are over, one way or the other."""
    return [job for job in waiting if over.issuperset(job.needs)]


class Progress:
    """How far the whole is, by the seconds that its jobs were expected to take and those that they took.

    expected: {job's name: seconds}
    """

    def __init__(self, expected, processes):
        self.expected = expected
        self.processes = processes
        self.whole = sum(expected.values())

        self.ended = 0                                  # jobs
        self.over = 0.0              # the expected seconds of jobs that ended, one way or the other
        self.expected_of_done = 0.0                     # of those that were done
        self.taken = 0.0                                # the seconds that these took

    def report(self, name, reason, seconds):
        """A job has ended: done, or not for a reason."""
        self.ended += 1
        self.over += self.expected[name]
        if reason is None:                       # what fails is quick, and says nothing of the pace
            self.expected_of_done += self.expected[name]
            self.taken += seconds

        pace = self.taken / self.expected_of_done if self.expected_of_done else 1.0
        left = pace * (self.whole - self.over) / self.processes
        came = f"{seconds:.0f} s" if reason is None else f"left out: {reason}"
        jobs = f"[{self.ended} of {len(self.expected)}]"
        progress_line(f"{self.over / self.whole:4.0%}  {jobs}  {name}: {came}; about {left / 60:.0f} min left")


# ---- The processes -------------------------------------------------------------------------------

def executor(processes):
    """Does what is submitted to it, so many at a time; several share the threads of this process."""
    if processes == 1:
        return Here()
    threads = max(1, torch.get_num_threads() // processes)
    return ProcessPoolExecutor(processes, get_context("spawn"), begin, (threads,))


class Here(Executor):
    """Does what is submitted at once."""

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future


def begin(threads):
    """The first that a process of the pool does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)     # the parent answers it, and ends its processes
    torch.set_num_threads(threads)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    parent_process().join()
    os._exit(1)


def logged(work, study, name):
    """Does a job -> (None, or why it could not be done; seconds).

    What it says goes to its log, an error of ours with its traceback.
    """
    path = study.folder / "logs" / f"{name.replace('/', '-').replace(' ', '-')}.log"
    path.parent.mkdir(parents=True, exist_ok=True)

    reason = None
    started = time.perf_counter()
    with open(path, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            work(study, name)
        except InputError as error:
            reason = str(error)
            print(f"error: {reason}")
        except Exception as error:                      # the other parts can still be done
            first_line, _, _ = str(error).partition("\n")
            reason = f"{type(error).__name__}: {first_line} ({path} has the traceback)"
            traceback.print_exc()
    return reason, time.perf_counter() - started
