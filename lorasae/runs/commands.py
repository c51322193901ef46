"""Runs train.py and eval.py as processes, several at a time.

    command = Command("train.py", ("--tokens", "20k", "--out", "runs/x"), Path("runs/x"))
    failed = run_all([command], processes=2, logs=Path("logs"))     {command.done: why}

Finished commands are not run again. Runs that were begun are resumed.
"""
import os
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.io.console import progress_line
from lorasae.runs.folder import Run

ROOT = Path(__file__).parents[2]                        # the folder of train.py and eval.py
POLL = 0.05                                             # seconds between polls of the processes


class Command(NamedTuple):
    script: str                         # "train.py" or "eval.py"
    words: tuple                        # its arguments
    folder: Path                        # the run's folder
    result: str = "results.json"        # the file in it that marks the command as finished

    @property
    def done(self):
        return self.folder / self.result

    @property
    def name(self):
        """The name in logs and progress lines: saes-topk-results, adapters-x-eval-lm."""
        return f"{self.folder.parent.name}-{self.folder.name}-{Path(self.result).stem}"

    def to_run(self):
        """The arguments to run it with now: a run that was begun is resumed."""
        if self.script == "train.py" and (self.folder / "config.json").exists():
            return "--resume", str(self.folder)
        return self.words

    def line(self):
        """The shell command that runs it from the current directory."""
        return shlex.join(["python", os.path.relpath(ROOT / self.script), *self.to_run()])


def run_all(commands, processes, logs):
    """Runs unfinished commands, `processes` at a time, sharing the cores -> {done: why it failed}.

    commands: must not depend on each other. logs: the folder for their output.
    """
    left = [command for command in commands if not command.done.exists()]
    cores = str(max(1, torch.get_num_threads() // processes))
    environment = {**os.environ, "OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores}
    running, failed, ended = {}, {}, 0
    try:
        while ended < len(left):

            # Start as many as there is room for.
            begun = ended + len(running)
            for command in left[begun:ended + processes]:
                log = logs / f"{command.name}.log"
                running[start(command, log, environment)] = command, log, time.perf_counter()
            time.sleep(POLL)

            # Report those that have ended.
            for process in [process for process in running if process.poll() is not None]:
                command, log, started = running.pop(process)
                ended += 1
                outcome = f"{time.perf_counter() - started:,.0f} s"
                if process.returncode != 0 or not command.done.exists():
                    failed[command.done] = reason_in(log, process.returncode)
                    outcome = f"failed: {failed[command.done]}"
                progress_line(f"[{ended} of {len(left)}] {command.name}: {outcome}")
    finally:
        for process in running:                         # after Ctrl-C: leave no process behind
            process.terminate()
        for process in running:
            process.wait()
    return failed


def start(command, log, environment):
    """Starts a command's process, which prints into `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    unbegun = Run(command.folder, None)
    if (command.folder / "text").exists() and not unbegun.has_begun:
        with suppress(InputError):                      # another process is writing there
            unbegun.claim()
            unbegun.close()                             # removes what a killed process left
    words = [sys.executable, ROOT / command.script, *command.to_run()]
    with open(log, "wb") as output:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=subprocess.STDOUT, env=environment)


def reason_in(log, status):
    """Why a command failed, in one line: the last error in its log."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    killed = f"killed by signal {-status} (out of memory?), " if status < 0 else ""
    return f"{killed}see {log}"
