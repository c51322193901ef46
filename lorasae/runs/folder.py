"""A run's folder: what was asked (config.json), what happened (metrics.jsonl, checkpoint/), what came out (results.json).

Every file is whole or absent, and one process at a time writes. A killed run loses the steps since its last checkpoint
and, resumed, ends where the uninterrupted one would have: parameters and optimiser come from the checkpoint, text
and random numbers of a step follow from its number. Of several processes (distributed.py) the first
does all the writing.
"""
import json
import math
import platform
import sys
import time
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from pickle import UnpicklingError

import numpy
import torch
from tqdm import tqdm

from lorasae.errors import InputError
from lorasae.io.console import note, progress_line
from lorasae.io.files import whole, write_bytes, write_json
from lorasae.runs import distributed
from lorasae.runs.config import read_config
from lorasae.runs.lock import Lock, check_free


LOG_EVERY = 10                                          # steps a metrics line covers; reading their values waits for the GPU
CHECKPOINT_SECONDS = 60                                 # a large one takes seconds to write
RUNS = Path("runs")                                     # where runs go by default


class Run:
    """One training run in `folder`. Build it with Run.create or Run.resume."""

    def __init__(self, folder, config, lock=None):
        self.folder, self.config, self.lock = Path(folder), config, lock
        self.pending, self.seconds, self.bar = [], 0.0, None
        self.latest = ""                                # what the progress bar says

    # ---- Beginning and end ---------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, folder, config):
        """Claims a fresh folder; refuses one that holds anything. `begin` writes the first file."""
        folder, lock = Path(folder), None
        if distributed.process() == 0:
            check_free(folder)
            lock = Lock(folder)
        return cls(folder, config, lock)

    @classmethod
    def resume(cls, folder, device=None):
        """The run that `folder` holds, to be continued, on another device if one is named."""
        folder, lock = Path(folder), None
        config = read_config(folder)
        if device is not None:
            config = replace(config, device=device)
        if distributed.process() == 0:
            lock = Lock(folder)
        if (folder / "results.json").exists():
            if lock is not None:
                lock.release()
            raise InputError(f"{folder} is a finished run: there is nothing to resume (python eval.py {folder} evaluates it)")
        return cls(folder, config, lock)

    def begin(self):
        """Writes config.json: called when everything that the run reads has been read."""
        if distributed.process() == 0 and not (self.folder / "config.json").exists():
            write_json(self.folder / "config.json", {**self.config.to_json(), "versions": versions()})

    def finish(self, results):
        """Writes results.json, which marks the run as finished."""
        if distributed.process() == 0:
            write_json(self.folder / "results.json", results)

    def close(self):
        """Lets go of the folder, and leaves nothing of one in which nothing was begun."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    # ---- Checkpoints ---------------------------------------------------------------------------------------------------

    def restore(self, tensors, optimizer):
        """Loads the newest whole checkpoint into tensors and optimiser -> steps done."""
        if distributed.process() == 0:
            for unfinished in self.folder.rglob("*.part"):              # what a killed process was writing
                unfinished.unlink()
        for path in reversed(self.checkpoints()):
            try:
                state = read_checkpoint(path)
            except InputError:
                raise
            except ValueError as damage:
                note(f"{path} is damaged ({damage}): trying the one before it, else from the start")
                if distributed.process() == 0:
                    path.rename(path.with_suffix(".damaged"))           # it must not crowd out the ones to come
                continue
            self.take_up(state, tensors, optimizer, path)
            return state["step"]
        self.forget_metrics_after(0)
        return 0

    def take_up(self, state, tensors, optimizer, path):
        """Puts a checkpoint's state in place."""
        if [tensor.shape for tensor in tensors] != [saved.shape for saved in state["parameters"]]:
            raise InputError(f"{path} belongs to another run: its tensors have other shapes than this one's")
        with torch.no_grad():
            for tensor, saved in zip(tensors, state["parameters"], strict=True):
                tensor.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        self.seconds = state["seconds"]
        self.forget_metrics_after(state["step"])

    def save(self, step, tensors, optimizer):
        """Writes checkpoint/step-N.pt, keeping the one before it. Only ever called with finite losses behind it."""
        self.flush()
        if distributed.process() > 0:
            return
        state = {"step": step, "parameters": [tensor.detach() for tensor in tensors], "optimizer": optimizer.state_dict(),
                 "seconds": self.seconds}
        with whole(self.folder / "checkpoint" / f"step-{step:08d}.pt") as file:
            torch.save({**state, "checksum": checksum(state)}, file)
        for old in self.checkpoints()[:-2]:
            old.unlink()

    def checkpoints(self):
        """Their files, oldest first."""
        return sorted((self.folder / "checkpoint").glob("step-*.pt"))

    def save_if_due(self, step, tensors, optimizer):
        """Every `checkpoint_every` steps, or else every minute; and after the last step."""
        every = self.config.checkpoint_every
        if every is not None:
            due = step % every == 0
        else:
            due = time.perf_counter() - self.saved >= CHECKPOINT_SECONDS
        if due or step == self.config.steps:
            self.save(step, tensors, optimizer)
            self.saved = time.perf_counter()

    # ---- Progress ------------------------------------------------------------------------------------------------------

    def watch(self, updates, start):
        """Yields the updates of a training from step `start` on, timing it, behind a progress bar.

        Where there is no terminal, a line tells of every tenth of the way instead.
        """
        speaks = distributed.process() == 0
        terminal = sys.stderr.isatty()
        steps = self.config.steps
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not (speaks and terminal), dynamic_ncols=True)
        self.saved = time.perf_counter()                # when the last checkpoint was written, or would have been
        self.started = self.saved - self.seconds
        for done, update in enumerate(updates, start + 1):
            yield update
            self.bar.update()
            if speaks and not terminal and 10 * done // steps > 10 * (done - 1) // steps:
                self.tell(done)
        self.flush()
        self.bar.close()

    def tell(self, step):
        """A line on how far the run is."""
        steps = self.config.steps
        seconds = time.perf_counter() - self.started
        remaining = (steps - step) * seconds / step
        parts = [f"{step / steps:4.0%}", f"step {step:,} of {steps:,}", self.latest, f"{remaining:,.0f} s left"]
        progress_line("  ".join(part for part in parts if part))

    def log(self, step, **values):
        """Notes a step's values (floats or 0-dim tensors); every LOG_EVERY steps they are read and written as a line."""
        self.pending.append((step, values))
        if step % LOG_EVERY == 0:
            self.flush()

    def flush(self):
        """Waits for the pending values, stops the run if one is not finite, and appends their means to metrics.jsonl."""
        self.seconds = time.perf_counter() - self.started
        if not self.pending:
            return
        rows = [(step, {name: float(value) for name, value in values.items()}) for step, values in self.pending]
        self.pending = []
        for step, values in rows:
            for name, value in values.items():
                if not math.isfinite(value):
                    self.diverged(name, value, step)

        step = rows[-1][0]
        means = {}
        for name in rows[0][1]:
            means[name] = sum(values[name] for _, values in rows) / len(rows)
        tokens = step * self.config.tokens_per_step
        rate = tokens / self.seconds
        self.append({"step": step, "tokens": tokens, **means, "tokens_per_second": rate, "seconds": self.seconds})

        name, value = next(iter(means.items()))
        self.latest = f"{name} {value:.4f}, {rate:,.0f} tok/s"
        self.bar.set_postfix_str(self.latest)

    def diverged(self, name, value, step):
        kept = self.checkpoints()
        raise InputError(f"{name} became {value} at step {step}: start again with a lower --lr or --dtype float32; the last "
                         f"good checkpoint is {kept[-1] if kept else 'none yet'}")

    # ---- metrics.jsonl -------------------------------------------------------------------------------------------------

    def append(self, line):
        if distributed.process() > 0:
            return
        path = self.folder / "metrics.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error

    def forget_metrics_after(self, step):
        """Drops the lines of steps that will be taken again, and a half-written one."""
        path = self.folder / "metrics.jsonl"
        if distributed.process() > 0 or not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.endswith("}") and json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        write_bytes(path, "".join(kept).encode())


# ---- Files -------------------------------------------------------------------------------------------------------------

DAMAGED = (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, UnpicklingError)


def read_checkpoint(path):
    """The state in a checkpoint. Raises ValueError, with a reason, for a file whose bytes are not those that were written.

    InputError (which is a ValueError, but no damage) for one of an earlier version.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        written = state.pop("checksum", None)
        found = checksum(state)
    except DAMAGED as error:
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None
    if written is None:
        raise InputError(f"{path} was written by an earlier version and cannot be continued: start again with another --out")
    if found != written:
        raise ValueError("its contents do not fit its checksum")
    return state


def checksum(state):
    """A digest of every number in a nest of dicts, lists and tensors."""
    digest = blake2b(digest_size=16)

    def feed(value):
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            value = value.detach().cpu().contiguous()
            flat = value.as_strided((value.numel(),), (1,))             # a single number may come with a stride of 0
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, dict):
            for key in value:
                digest.update(repr(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(b"[")
            for item in value:
                feed(item)
        else:
            digest.update(repr(value).encode())

    feed(state)
    return digest.hexdigest()


def versions():
    """What a repetition needs to know about the machine's software."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}
