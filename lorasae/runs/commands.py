"""train.py and eval.py as processes, several at a time.

    command = Command("train.py", ("--tokens", "20k", "--out", "runs/x"), Path("runs/x"))
    failed = run_all([command], processes=2, logs=Path("logs"))     {command.done: why}

What is finished is not run again, and a run that was begun is resumed. If a process of an earlier,
killed command still writes to the run, its end is awaited.
"""
import os
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from lorasae.io.console import progress_line

ROOT = Path(__file__).parents[2]                        # where train.py and eval.py are


class Command(NamedTuple):
    script: str                         # "train.py" or "eval.py"
    words: tuple                        # its arguments
    folder: Path                        # of the run
    result: str = "results.json"        # the file in it that says that the command is finished

    @property
    def done(self):
        return self.folder / self.result

    @property
    def name(self):
        """For logs and progress: saes-topk-results, adapters-x-eval-lm."""
        return f"{self.folder.parent.name}-{self.folder.name}-{Path(self.result).stem}"

    def to_run(self):
        """The words that run it now: a run that was begun is resumed."""
        if self.script == "train.py" and (self.folder / "config.json").exists():
            return "--resume", str(self.folder)
        return self.words

    def line(self):
        """The same as a line to paste into a shell in the current directory."""
        return shlex.join(["python", os.path.relpath(ROOT / self.script), *self.to_run()])


def run_all(commands, processes, logs):
    """Runs what is not finished, so many at a time, which share the cores -> {done: why it failed}.

    commands: those of one call must not need each other. logs: the folder of what they print.
    """
    left = [command for command in commands if not command.done.exists()]
    cores = str(max(1, torch.get_num_threads() // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores}
    children, stopping, failed = [], threading.Event(), {}

    bar = tqdm(total=len(left), dynamic_ncols=True, leave=False, disable=not sys.stderr.isatty())
    with bar, ThreadPoolExecutor(processes) as pool:
        try:
            futures = {pool.submit(run, command, environment, logs, children, stopping): command
                       for command in left}
            for number, future in enumerate(as_completed(futures), start=1):
                command, (reason, seconds) = futures[future], future.result()
                if reason is not None:
                    failed[command.done] = reason
                came = f"{seconds:,.0f} s" if reason is None else f"failed: {reason}"
                bar.clear()
                progress_line(f"[{number} of {len(left)}] {command.name}: {came}")
                bar.update()
        except BaseException:                           # Ctrl-C above all: no process stays behind
            stopping.set()
            for process in children:
                process.terminate()
            raise
    return failed


def run(command, environment, logs, children, stopping):
    """Runs a command in a process -> (None or why it failed, seconds).

    children: where the process is noted, for whoever stops it; stopping: an Event, set before.
    """
    started = time.perf_counter()
    wait_for_lock(command.folder / ".lock", stopping)
    if stopping.is_set() or command.done.exists():
        return None, 0.0

    log = logs / f"{command.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, ROOT / command.script, *command.to_run()]
    with open(log, "wb") as output:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, env=environment)
        children.append(process)
        if stopping.is_set():                           # it was noted too late
            process.terminate()
        status = process.wait()
    reason = None if status == 0 and command.done.exists() else reason_in(log, status)
    return reason, time.perf_counter() - started


def wait_for_lock(path, stopping):
    """Returns when no process writes to the run whose lock this is."""
    while path.exists() and not stopping.is_set():
        with suppress(Timeout), FileLock(path, timeout=1):
            return


def reason_in(log, status):
    """Why a command failed, in one line: the last error that its log names."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    killed = f"signal {-status} killed it (too little memory?), " if status < 0 else ""
    return f"{killed}see {log}"
