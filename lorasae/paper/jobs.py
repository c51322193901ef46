"""Work shared out over processes: each job after those that it needs, one line of progress for all of them.

A job prints into a log of its own. A process whose parent is gone ends too, so a killed command leaves nothing behind that
writes to its folders. One at a time, jobs are done in the command's own process.
"""
import os
import signal
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import active_children, get_context
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.io.console import tell


class Job(NamedTuple):
    name: str
    needs: tuple                                        # names of jobs
    seconds: float                                      # what it is expected to take


def run_all(jobs, work, study, processes):
    """Does work(study, job's name) for every job, the first that is ready first -> {name: why it could not be done}.

    What needs a job that could not be done is not tried.
    """
    failed, done, running = {}, set(), {}
    waiting, progress = list(jobs), Progress(jobs, processes)
    with executor(processes) as pool:
        try:
            while waiting or running:
                for job in ready(waiting, done | set(failed))[:processes - len(running)]:
                    waiting.remove(job)
                    missing = next((name for name in job.needs if name in failed), None)
                    if missing is None:
                        running[pool.submit(logged, work, study, job.name)] = job
                    else:
                        failed[job.name] = failed[missing]
                ended, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in ended:
                    reason, seconds = future.result()
                    job = running.pop(future)
                    if reason is None:
                        done.add(job.name)
                    else:
                        failed[job.name] = reason
                    progress.tell(job, seconds, reason)
        except BrokenProcessPool:
            raise InputError(f"a process that worked on {', '.join(job.name for job in running.values())} was killed (too little memory?): "
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
    """How far the whole is, by the seconds that its jobs were expected to take and those that they took."""

    def __init__(self, jobs, processes):
        self.count, self.ended, self.processes = len(jobs), 0, processes
        self.expected = sum(job.seconds for job in jobs)
        self.expected_so_far = self.taken_so_far = 0.0

    def tell(self, job, seconds, reason):
        self.ended += 1
        self.expected_so_far += job.seconds
        self.taken_so_far += seconds
        pace = self.taken_so_far / max(self.expected_so_far, 1e-9)
        left = pace * (self.expected - self.expected_so_far) / self.processes
        part = self.expected_so_far / max(self.expected, 1e-9)
        came = f"{seconds:.0f} s" if reason is None else f"left out: {reason}"
        tell(f"{part:4.0%}  [{self.ended} of {self.count}]  {job.name}: {came}; about {left / 60:.0f} min left")


# ---- The processes -----------------------------------------------------------------------------------------------------

def executor(processes):
    if processes == 1:
        return Here()
    threads = max(1, torch.get_num_threads() // processes)
    return ProcessPoolExecutor(processes, get_context("spawn"), begin, (os.getpid(), threads))


class Here(Executor):
    """Does what is submitted at once."""

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future


def begin(parent, threads):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent answers it, and ends its processes
    torch.set_num_threads(threads)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent):
    """Ends this process as soon as its parent has ended."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def logged(work, study, name):
    """(None, or what the user can mend; seconds)"""
    path = study.folder / "logs" / f"{name.replace('/', '-').replace(' ', '-')}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(path, "a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            work(study, name)
            reason = None
        except InputError as error:
            reason = str(error)
            print(f"error: {reason}")
    return reason, time.perf_counter() - started
