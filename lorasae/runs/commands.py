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
from pathlib import Path
from typing import NamedTuple

import torch

from lorasae.io.console import progress_line

ROOT = Path(__file__).parents[2]                        # where train.py and eval.py are
POLL = 0.05                                             # seconds between two looks at processes


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
                came = f"{time.perf_counter() - started:,.0f} s"
                if process.returncode != 0 or not command.done.exists():
                    failed[command.done] = reason_in(log, process.returncode)
                    came = f"failed: {failed[command.done]}"
                progress_line(f"[{ended} of {len(left)}] {command.name}: {came}")
    finally:
        for process in running:                         # Ctrl-C: no process stays behind
            process.terminate()
    return failed


def start(command, log, environment):
    """The process of a command, which prints into `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, ROOT / command.script, *command.to_run()]
    with open(log, "wb") as output:
        return subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=subprocess.STDOUT, env=environment)


def reason_in(log, status):
    """Why a command failed, in one line: the last error that its log names."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return errors[-1].removeprefix("error: ")
    killed = f"signal {-status} killed it (too little memory?), " if status < 0 else ""
    return f"{killed}see {log}"
