"""A run's folder: config.json (its settings), metrics.jsonl, checkpoint/, results.json.

Every file but the log is either complete or absent, and only one process writes at a time. A killed
run loses the steps since its last checkpoint. When resumed, it ends where the uninterrupted run
would have: parameters and optimiser come from the checkpoint; a step's text and random numbers
follow from its number. (On a GPU only up to rounding: fused attention adds gradients in any order.)
"""
import itertools
import json
import math
import platform
import shutil
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from shlex import quote
from zipfile import ZipFile

import numpy
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from lorasae.errors import InputError
from lorasae.io.console import note, progress_line
from lorasae.io.files import damage, first_line, whole, write_bytes, write_json
from lorasae.runs import distributed

LOG_EVERY = 10                          # steps per metrics line: reading values waits for the GPU
CHECKPOINT_SECONDS = 60                 # a large checkpoint takes seconds to write
RUNS = Path("runs")                     # the default folder for runs


class Run:
    """One training run in `folder`. Build it with Run.create or Run.resume."""

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config
        self.writes = distributed.number() == 0
        self.lock, self.made = None, []                 # folders created for the run
        self.pending, self.seconds, self.latest = [], 0.0, ""
        self.track = lambda values, step: None          # replaced by tracking.py

    # ---- Beginning and end -----------------------------------------------------------------------

    @classmethod
    def create(cls, folder, config):
        """Claims a new folder, by default runs/MODEL-METHOD. `begin` writes the first file."""
        place = Path(folder or RUNS)
        made = [path for path in (place, *place.parents) if not path.exists()]
        if folder is None and distributed.number() == 0:
            folder = new_folder(config)
            made = [folder, *made]                      # innermost first
        run = cls(distributed.agree(folder), config)
        run.claim()
        run.made = made
        return run

    @classmethod
    def resume(cls, folder, config):
        """The unfinished run in `folder`, to be continued. config: read_config(folder)."""
        run = cls(folder, config)
        if (run.folder / "results.json").exists():
            raise InputError(f"{folder} is a finished run: there is nothing to resume "
                             f"(python eval.py {quote(str(folder))} evaluates it)")
        run.claim()
        return run

    def claim(self):
        """Creates the folder and locks it, so that process 0 is its only writer."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"another process is writing to {self.folder}: wait for it to "
                             "end, or pass another --out") from None
        self.lock = lock
        for unfinished in self.folder.rglob("*.part"):          # left by a killed process
            unfinished.unlink()

    @property
    def has_begun(self):
        return (self.folder / "config.json").exists()

    def begin(self):
        """Writes config.json. Called once everything that is read at the start has been read."""
        if self.writes and not self.has_begun:
            write_json(self.folder / "config.json",
                       {**self.config.to_json(), "versions": versions()})

    def after_interrupt(self):
        """A message that says how to continue an interrupted run."""
        if not self.has_begun:
            return "interrupted: nothing was written"
        step = max(map(step_of, self.checkpoints()), default=0)
        return (f"interrupted: python train.py --resume {quote(str(self.folder))} continues at "
                f"step {step:,} of {self.config.steps:,}")

    def finish(self, results):
        """Writes results.json, which marks the run as finished."""
        if self.writes:
            write_json(self.folder / "results.json", results)

    def close(self):
        """Releases the lock. If the run never began, removes what it created."""
        if self.lock is None:
            return
        self.lock.release()
        if not self.has_begun:
            shutil.rmtree(self.folder / "text", ignore_errors=True)
            (self.folder / ".lock").unlink(missing_ok=True)
            with suppress(OSError):                     # the user's files are in it
                for folder in self.made:
                    folder.rmdir()

    # ---- Checkpoints -----------------------------------------------------------------------------

    def restore(self, tensors, optimizer):
        """Loads the newest intact checkpoint into tensors and optimiser -> number of steps done."""
        state, step = self.newest_checkpoint(), 0
        if state is not None:
            with damage(f"{self.folder}/checkpoint"), torch.no_grad():
                step, parameters = state["step"], state["parameters"]
                if [tensor.shape for tensor in tensors] != [saved.shape for saved in parameters]:
                    raise InputError(f"{self.folder}/checkpoint belongs to another run: its "
                                     "tensors have different shapes")
                for tensor, saved in zip(tensors, parameters):
                    tensor.copy_(saved)
                optimizer.load_state_dict(state["optimizer"])
                self.seconds = float(state["seconds"])
            progress_line(f"resuming at step {step:,} of {self.config.steps:,}")

        # Remove from the log the steps that will be repeated.
        log = self.folder / "metrics.jsonl"
        if self.writes and log.exists():
            kept = []
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError, KeyError):         # a line cut off by a kill
                    if json.loads(line)["step"] <= step:
                        kept.append(f"{line}\n")
            write_bytes(log, "".join(kept).encode())
        return step

    def newest_checkpoint(self):
        """The state in the newest intact checkpoint; None if there is none."""
        for path in reversed(self.checkpoints()):
            try:
                if ZipFile(path).testzip():             # torch.load does not notice flipped bits
                    raise ValueError("its bytes do not match their checksums")
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:                  # a damaged file can raise anything
                note(f"warning: {path} is damaged ({first_line(error)}): trying the one before "
                     "it, or starting over")
                if self.writes:
                    path.rename(path.with_suffix(".damaged"))
        return None

    def save(self, step, tensors, optimizer):
        """Writes checkpoint/step-N.pt if all losses are finite, and keeps the one before it."""
        self.flush()
        self.saved = time.perf_counter()
        if not self.writes:
            return
        state = {
            "step": step,
            "parameters": [tensor.detach() for tensor in tensors],
            "optimizer": optimizer.state_dict(),
            "seconds": self.seconds,
        }
        path = self.folder / "checkpoint" / f"step-{step:08d}.pt"
        with whole(path) as file:
            torch.save(state, file)
        for old in self.checkpoints()[:-2]:
            old.unlink()

    def checkpoints(self):
        """The checkpoint files, oldest first."""
        return sorted((self.folder / "checkpoint").glob("step-*.pt"))

    def oldest_kept_step(self):
        """The earliest step a resumed run may start from: 0 until there are two checkpoints."""
        kept = self.checkpoints()
        return step_of(kept[0]) if len(kept) > 1 else 0

    def is_due(self, step):
        """Whether to save after this step: after the last, and every N steps or every minute."""
        every = self.config.checkpoint_every
        long_ago = time.perf_counter() - self.saved >= CHECKPOINT_SECONDS
        due = long_ago if every is None else step % every == 0
        return due or step == self.config.steps

    # ---- Progress --------------------------------------------------------------------------------

    def progress(self, start):
        """Yields the steps to take; shows a bar or, without a terminal, a line after each tenth."""
        steps = self.config.steps
        hidden = None if self.writes else True          # None: hidden without a terminal
        self.saved = time.perf_counter()
        self.started = self.saved - self.seconds
        with tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True,
                  disable=hidden) as bar:
            for step in range(start, steps):
                yield step
                bar.set_postfix_str(self.latest, refresh=False)
                bar.update()
                if bar.disable and ends_a_tenth(step + 1, steps):
                    done = (step + 1) / steps
                    left = (1 / done - 1) * (time.perf_counter() - self.started)
                    progress_line(f"{done:4.0%}  step {step + 1:,} of {steps:,}  {self.latest}"
                                  f"{left:,.0f} s left")
            self.flush()

    def log(self, step, values):
        """Collects a step's values (numbers or 0-dim tensors); logs them every LOG_EVERY steps."""
        self.pending.append((step, values))
        if step % LOG_EVERY == 0:
            self.flush()

    def flush(self):
        """Reads the collected values, stops the run if one is not finite, and logs their means."""
        self.seconds = time.perf_counter() - self.started
        if not self.pending:
            return
        means = Counter()
        for step, values in self.pending:
            for name, value in values.items():
                value = float(value)
                if not math.isfinite(value):
                    raise InputError(f"{name} became {value} at step {step}: start again with a "
                                     "lower --lr or --dtype float32")
                means[name] += value / len(self.pending)
        self.pending = []

        tokens = step * self.config.tokens_per_step
        rate = tokens / self.seconds
        values = {"tokens": tokens, **means, "tokens_per_second": rate, "seconds": self.seconds}
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            self.track(values, step=step)
        name, value = next(iter(means.items()))
        self.latest = f"{name} {value:.4f}, {rate:,.0f} tok/s  "


# ---- Files ---------------------------------------------------------------------------------------

def step_of(checkpoint):
    return int(checkpoint.stem.removeprefix("step-"))


def ends_a_tenth(step, steps):
    """Whether this step completes another tenth of all steps."""
    return 10 * step // steps > 10 * (step - 1) // steps


def check_free(folder):
    """Raises InputError if the folder contains anything but an earlier run's lock."""
    if any(path.name != ".lock" for path in folder.glob("*")):
        raise InputError(f"{folder} is not empty: pass another --out, or remove it (if it has a "
                         f"config.json, --resume {quote(str(folder))} continues its run)")


def new_folder(config):
    """Creates runs/MODEL-METHOD; if that is taken, the first free one with -2, -3, ..."""
    name = f"{Path(config.model).name}-{config.method}"
    for number in itertools.count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):                 # another run may be creating it
            folder.mkdir(parents=True)
            return folder


def versions():
    """The software versions needed to repeat a run."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": numpy.__version__}
