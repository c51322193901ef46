"""A run's folder: config.json (what was asked), metrics.jsonl, checkpoint/, results.json.

Every file is whole or absent, and one process at a time writes. A killed run loses the steps since
its last checkpoint and, resumed, ends where the uninterrupted one would have: parameters and
optimiser come from the checkpoint; the text and the random numbers of a step follow from its
number. With several processes (distributed.py) the first does all the writing.
"""
import itertools
import json
import math
import platform
import shutil
import time
from collections import Counter
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import numpy
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from lorasae.errors import InputError
from lorasae.io.console import note, progress_line
from lorasae.io.files import (
    damage, first_line, read_object, whole, write_bytes, write_json)
from lorasae.runs import distributed

LOG_EVERY = 10                          # steps per metrics line: reading values waits for the GPU
CHECKPOINT_SECONDS = 60                 # a large checkpoint takes seconds to write
RUNS = Path("runs")                     # where runs go by default


class Run:
    """One training run in `folder`. Build it with Run.create or Run.resume."""

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config
        self.writes = distributed.number() == 0
        self.lock, self.made = None, []                 # the folders that were made for the run
        self.pending, self.seconds, self.latest = [], 0.0, ""
        self.track = lambda values, step: None          # tracking.py takes what is logged

    # ---- Beginning and end -----------------------------------------------------------------------

    @classmethod
    def create(cls, folder, config):
        """Claims a fresh folder, by default runs/MODEL-METHOD. `begin` writes the first file."""
        made = missing(folder or RUNS)
        if folder is None and distributed.number() == 0:
            folder = new_folder(config)
            made = [folder, *made]                      # innermost first
        run = cls(distributed.agree(folder), config)
        run.claim()
        run.made = made
        return run

    @classmethod
    def resume(cls, folder, config):
        """The run that `folder` holds, to be continued. config: read_config(folder)."""
        run = cls(folder, config)
        if (run.folder / "results.json").exists():
            raise InputError(f"{folder} is a finished run: there is nothing to resume "
                             f"(python eval.py {folder} evaluates it)")
        run.claim()
        return run

    def claim(self):
        """Makes the folder, and process 0 its only writer."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.folder} is being written by another process: wait for it to "
                             "end, or pass another --out") from None
        self.lock = lock
        for unfinished in self.folder.rglob("*.part"):          # what a killed process was writing
            unfinished.unlink()

    @property
    def has_begun(self):
        return (self.folder / "config.json").exists()

    def begin(self):
        """Writes config.json: called once everything that the run reads at first has been read."""
        if self.writes and not self.has_begun:
            write_json(self.folder / "config.json",
                       {**self.config.to_json(), "versions": versions()})

    def after_interrupt(self):
        """How an interrupted run goes on, in words."""
        if not self.has_begun:
            return "interrupted: nothing was written"
        step = max(map(step_of, self.checkpoints()), default=0)
        return (f"interrupted: python train.py --resume {self.folder} goes on from step {step:,} "
                f"of {self.config.steps:,}")

    def finish(self, results):
        """Writes results.json, which marks the run as finished."""
        if self.writes:
            write_json(self.folder / "results.json", results)

    def close(self):
        """Releases the lock. If the run never began, nothing of it stays."""
        if self.lock is None:
            return
        self.lock.release()
        if not self.has_begun:
            shutil.rmtree(self.folder / "text", ignore_errors=True)
            (self.folder / ".lock").unlink(missing_ok=True)
            remove(self.made)

    # ---- Checkpoints -----------------------------------------------------------------------------

    def restore(self, tensors, optimizer):
        """Loads the newest whole checkpoint into tensors and optimiser -> steps done."""
        state, step = self.newest_checkpoint(), 0
        if state is not None:
            with damage(f"{self.folder}/checkpoint"), torch.no_grad():
                step, parameters = state["step"], state["parameters"]
                if [tensor.shape for tensor in tensors] != [saved.shape for saved in parameters]:
                    raise InputError(f"{self.folder}/checkpoint belongs to another run: its "
                                     "tensors have other shapes than this one's")
                for tensor, saved in zip(tensors, parameters):
                    tensor.copy_(saved)
                optimizer.load_state_dict(state["optimizer"])
                self.seconds = float(state["seconds"])
            progress_line(f"resuming at step {step:,} of {self.config.steps:,}")

        # Steps that will be taken again are not in the log twice.
        log = self.folder / "metrics.jsonl"
        if self.writes and log.exists():
            kept = []
            for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, TypeError, KeyError):         # half a line, of a kill
                    if json.loads(line)["step"] <= step:
                        kept.append(f"{line}\n")
            write_bytes(log, "".join(kept).encode())
        return step

    def newest_checkpoint(self):
        """The state in the newest checkpoint that is whole; None if there is none."""
        for path in reversed(self.checkpoints()):
            try:
                if digest(path) != path.with_suffix(".blake2b").read_text():
                    raise ValueError("its bytes do not fit its checksum")
                return torch.load(path, map_location="cpu", weights_only=True)
            except Exception as damage:                 # a damaged file can raise anything
                note(f"warning: {path} is damaged ({first_line(damage)}): trying the one before "
                     "it, else starting over")
                if self.writes:
                    path.rename(path.with_suffix(".damaged"))
        return None

    def save(self, step, tensors, optimizer):
        """Writes checkpoint/step-N.pt and keeps the one before it. Losses so far are finite."""
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
            file.flush()
            write_bytes(path.with_suffix(".blake2b"), digest(file.name).encode())
        for old in self.checkpoints()[:-2]:
            old.with_suffix(".blake2b").unlink(missing_ok=True)
            old.unlink()

    def checkpoints(self):
        """Their files, oldest first."""
        return sorted((self.folder / "checkpoint").glob("step-*.pt"))

    def oldest_kept_step(self):
        """Where a resumed run could have to start: at 0 until two checkpoints are there."""
        kept = self.checkpoints()
        return step_of(kept[0]) if len(kept) > 1 else 0

    def is_due(self, step):
        """Whether a checkpoint follows this step: after the last, every N steps or every minute."""
        every = self.config.checkpoint_every
        if every is None:
            due = time.perf_counter() - self.saved >= CHECKPOINT_SECONDS
        else:
            due = step % every == 0
        return due or step == self.config.steps

    # ---- Progress --------------------------------------------------------------------------------

    def progress(self, start):
        """Yields the numbers of the steps to take, behind a progress bar.

        Without a terminal, a line reports every tenth of the way instead.
        """
        steps = self.config.steps
        hidden = None if self.writes else True          # None: if there is no terminal
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
        """Keeps a step's values (numbers or 0-dim tensors); writes them every LOG_EVERY steps."""
        self.pending.append((step, values))
        if step % LOG_EVERY == 0:
            self.flush()

    def flush(self):
        """Reads the pending values, stops the run if one is not finite, and logs their means."""
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
    """Whether this many steps complete another tenth of them all."""
    return 10 * step // steps > 10 * (step - 1) // steps


def check_free(folder):
    """Raises InputError if the folder holds anything but the lock of an earlier run."""
    if any(path.name != ".lock" for path in folder.glob("*")):
        raise InputError(f"{folder} already holds files: pass another --out, or remove it (a run "
                         f"in it that has a config.json goes on with --resume {folder} alone)")


def new_folder(config):
    """Makes runs/MODEL-METHOD, or the first free one of -2, -3, ..."""
    name = f"{Path(config.model).name}-{config.method}"
    for number in itertools.count(1):
        folder = RUNS / (name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):                 # also if another run makes it right now
            folder.mkdir(parents=True)
            return folder


def begin_with(path, asked):
    """Writes the arguments {name: value} of a folder of runs, unless they are there.

    InputError if the folder was begun with other values. If nothing can be written, no folder is
    left.
    """
    if not path.exists():
        made = missing(path.parent)
        try:
            write_json(path, asked)
        except (InputError, OSError):
            remove(made)
            raise

    before = read_object(path)
    for name, value in asked.items():
        if before.get(name) != value:
            raise InputError(f"{path.parent} was begun with {name} {before.get(name)}, not "
                             f"{value}: pass another --out, or the same arguments to continue")


def missing(folder):
    """A folder and its parents that do not exist yet, innermost first."""
    return [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]


def remove(folders):
    """Removes those of the folders that are empty, innermost first."""
    for folder in folders:
        with suppress(OSError):                         # something of the user's is in it
            folder.rmdir()


def digest(path):
    """A checksum of a file's bytes: torch.load does not notice a flipped bit."""
    return blake2b(numpy.memmap(path, mode="r")).hexdigest()


def versions():
    """What a repetition needs to know about the machine's software."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "numpy": numpy.__version__}
