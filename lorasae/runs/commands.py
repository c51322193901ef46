"""train.py and eval.py as processes, several at a time.

    command = Command("train.py", ("--tokens", "20k", "--out", "runs/x"), Path("runs/x"))
    failed = run_all([command], processes=2, logs=Path("logs"))     {command.done: why}

What is finished is not run again, and a run that was begun is resumed.
"""
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

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
    logs.mkdir(parents=True, exist_ok=True)
    failed = {}

    def run(command):
        """How a command went, in words."""
        log, begun = logs / f"{command.name}.log", time.perf_counter()
        words = [sys.executable, ROOT / command.script, *command.to_run()]
        with open(log, "wb") as output:
            ended = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=output,
                                   stderr=subprocess.STDOUT, env=environment)
        if ended.returncode == 0 and command.done.exists():
            return f"{time.perf_counter() - begun:,.0f} s"
        failed[command.done] = reason_in(log, ended.returncode)
        return f"failed: {failed[command.done]}"

    pool = ThreadPoolExecutor(processes)
    try:
        names = {pool.submit(run, command): command.name for command in left}
        for number, future in enumerate(as_completed(names), 1):
            progress_line(f"[{number} of {len(left)}] {names[future]}: {future.result()}")
    finally:
        pool.shutdown(cancel_futures=True)              # Ctrl-C ends the processes, too
    return failed


def reason_in(log, status):
    """Why a command failed, in one line: the last error that its log names."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    killed = f"signal {-status} killed it (too little memory?), " if status < 0 else ""
    return f"{killed}see {log}"
