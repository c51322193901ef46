"""A run's folder: what was asked (config.json), what happened (metrics.jsonl, checkpoint/), what came out (results.json).

Every file is whole or absent. A killed run loses the steps since its last checkpoint and, resumed, ends where the
uninterrupted one would have: parameters and optimiser come from the checkpoint, and the position in the data and the random
numbers of a step follow from its number. Of several processes (distributed.py) the first does all the writing.
"""
import argparse
import json
import math
import platform
import resource
import sys
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from lorasae.runs import distributed
from lorasae.io.checkpoint import load_model
from lorasae.io.corpus import Corpus
from lorasae.errors import InputError
from lorasae.io.disk import read_json, whole, write_bytes, write_json
from lorasae.io.hub import model_files
from lorasae.io.adapters import load_adapter
from lorasae.model import Transformer
from lorasae.io.sae_formats import check_fits, load_sae

LOG_EVERY = 10                                          # steps a metrics line covers; also how often the GPU is waited for


class Setting(NamedTuple):
    """What a configuration names, loaded."""
    model: Transformer
    saes: dict                                          # {layer: SAE}, frozen
    corpus: Corpus
    keep_special: bool                                  # BOS and EOS keep their activation: the SAEs never saw them


def load_setting(config, adapter=None, shard=False):
    """The model (with the adapter folder's adapters, if given), SAEs and text of a configuration, as Setting.

    shard: leave the model on the CPU, for distributed.shard to spread.
    """
    device = distributed.local(config["device"])
    model = load_model(config["model"], device="cpu" if shard else device, dtype=config["dtype"])
    saes = load_saes(config, model, device)
    if adapter is not None:
        load_adapter(model, adapter)
    special = {sae.on_special for sae in saes.values()}
    if len(special) > 1:
        raise InputError("some of the SAEs were trained on BOS and EOS and some were not: splice only one kind at a time")
    return Setting(model, saes, load_corpus(config, model.config), special == {False})


def sae_sources(config):
    """[(layer, source)] of a configuration: one source for all layers, or one a layer."""
    layers, sources = config["layer"], config["sae"] or []
    if len(sources) not in (1, len(layers)) and layers:
        raise InputError(f"--sae names {len(sources)} SAEs for {len(layers)} layers: pass one source for all, or one a layer")
    return list(zip(layers, sources * len(layers) if len(sources) == 1 else sources))


def load_saes(config, model, device):
    """{layer: SAE}, frozen."""
    layers = config["layer"]
    if len(set(layers)) < len(layers):
        raise InputError(f"--layer {' '.join(map(str, layers))} names a layer twice")
    depth, saes = len(model.layers), {}
    for layer, source in sae_sources(config):
        if not 0 <= layer < depth:
            raise InputError(f"--layer {layer} is out of range: {config['model']} has blocks 0 to {depth - 1}")
        saes[layer] = load_sae(source, layer=layer, width=config["width"], l0=config["l0"],
                               dtype=config["sae_dtype"], device=device, llama_scope=config.get("llama_scope", "openmoss"))
        check_fits(saes[layer], model.config.hidden_size)
    return saes


def load_corpus(config, model_config):
    path = model_files(config["model"]) / "tokenizer.json"
    if not path.exists():
        raise InputError(f"{path.parent} has no tokenizer.json")
    try:
        tokenizer = Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path} is not a tokenizer of the tokenizers library ({error})") from None
    return Corpus(config["data"], tokenizer, model_config.bos_token_id, model_config.eos_token_id,
                  context=config["context"], eval_tokens=config["eval_tokens"], seed=config["seed"], field=config["field"])


class Run:
    """One training run in `folder`. Build it with Run.create or Run.resume."""

    def __init__(self, folder, config):
        self.folder, self.config = Path(folder), config
        self.pending, self.seconds, self.bar = [], 0.0, None

    @classmethod
    def create(cls, folder, config):
        """A fresh folder with its config.json; refuses one that holds anything."""
        if distributed.rank() == 0:
            check_free(folder)
            write_json(Path(folder) / "config.json", {**config, "versions": versions()})
        return cls(folder, config)

    @classmethod
    def resume(cls, folder):
        """The run that `folder` holds, to be continued."""
        if (Path(folder) / "results.json").exists():
            raise InputError(f"{folder} is a finished run: there is nothing to resume (python eval.py {folder} evaluates it)")
        config = read_json(Path(folder) / "config.json")
        if not isinstance(config, dict) or not {"batch_size", "context", "checkpoint_every"} <= config.keys():
            raise InputError(f"{folder}/config.json was not written by train.py: pass the folder of a run")
        return cls(folder, config)

    def restore(self, parameters, optimizer):
        """Loads the newest whole checkpoint into parameters and optimiser; returns the steps done (0 without one)."""
        if distributed.rank() == 0:
            for unfinished in self.folder.rglob("*.part"):              # what a killed process was writing
                unfinished.unlink()
        for path in sorted((self.folder / "checkpoint").glob("step-*.pt"), reverse=True):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, OSError, ValueError, UnpicklingError) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
                print(f"{path} is damaged ({reason}): trying the one before it, else from the start", file=sys.stderr)
                continue
            if [p.shape for p in parameters] != [saved.shape for saved in state["parameters"]]:
                raise InputError(f"{path} belongs to another run: its tensors have other shapes than this one's")
            with torch.no_grad():
                for parameter, saved in zip(parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)
            optimizer.load_state_dict(state["optimizer"])
            self.seconds = state["seconds"]
            self._forget_metrics_after(state["step"])
            return state["step"]
        self._forget_metrics_after(0)
        return 0

    def save(self, step, parameters, optimizer):
        """Writes checkpoint/step-N.pt, keeping the one before it. Only ever called with finite losses behind it."""
        self.flush()
        if distributed.rank() > 0:
            return
        state = {"step": step, "parameters": [p.detach() for p in parameters], "optimizer": optimizer.state_dict(),
                 "seconds": self.seconds}
        folder = self.folder / "checkpoint"
        with whole(folder / f"step-{step:08d}.pt") as file:
            torch.save(state, file)
        for old in sorted(folder.glob("step-*.pt"))[:-2]:
            old.unlink()

    def checkpoint_due(self, step):
        return step % self.config["checkpoint_every"] == 0

    def progress(self, start, steps):
        """Counts the steps start .. steps-1 behind a progress bar (on a terminal only), timing what happens between."""
        quiet = distributed.rank() > 0 or not sys.stderr.isatty()
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=quiet, dynamic_ncols=True)
        self.started = time.perf_counter() - self.seconds
        for step in range(start, steps):
            yield step
            self.bar.update()
        self.flush()
        self.bar.close()

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
                    kept = sorted((self.folder / "checkpoint").glob("step-*.pt"))
                    raise InputError(f"{name} became {value} at step {step}: lower --lr or use --dtype float32; the last good "
                                     f"checkpoint is {kept[-1] if kept else 'none yet'}")
        step = rows[-1][0]
        means = {name: sum(values[name] for _, values in rows) / len(rows) for name in rows[0][1]}
        rate = step * self.config["batch_size"] * self.config["context"] / self.seconds
        line = {"step": step, "tokens": step * self.config["batch_size"] * self.config["context"], **means,
                "tokens_per_second": rate, "seconds": self.seconds}
        if distributed.rank() == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        name, value = next(iter(means.items()))
        self.bar.set_postfix_str(f"{name} {value:.4f}, {rate:,.0f} tok/s")

    def _forget_metrics_after(self, step):
        path = self.folder / "metrics.jsonl"
        if distributed.rank() == 0 and path.exists():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
            write_bytes(path, "".join(line + "\n" for line in lines).encode())

    def finish(self, results):
        """Writes results.json, which marks the run as finished."""
        if distributed.rank() == 0:
            write_json(self.folder / "results.json", results)


def training_curve(folder):
    """The loss that metrics.jsonl holds, for a picture: {"name", "tokens": [..], "loss": [..]}; None without the file."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    key, label = ("fvu", "FVU") if "fvu" in lines[0] else ("kl", "KL in training (nats/token)")
    return {"name": label, "tokens": [line["tokens"] for line in lines], "loss": [line[key] for line in lines]}


def count(text):
    """Token counts read 15M, 1.5e6, 15_000_000, 20k."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    try:
        value = float(text[:-1]) * units[text[-1].lower()] if text[-1:].lower() in units else float(text)
    except ValueError:
        value = 0
    if not 1 <= value < float("inf") or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of tokens, such as 15M, 1.5e6 or 15_000_000")
    return int(value)


def check_free(folder):
    """Refuses an output folder that holds anything: asked before the long work starts."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} already holds files: pass another --out, or --resume {folder} to continue that run")


def versions():
    """What a repetition needs to know about the machine's software."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__}


def peak_memory_bytes(device):
    """The most memory the run has held: of the GPU where it ran on one, else of the whole process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def print_table(rows, headings=None):
    """Prints rows (sequences of cells) as aligned columns, the first to the left and the rest to the right."""
    rows = ([headings] if headings else []) + list(rows)
    rows = [[cell if isinstance(cell, str) else f"{cell:.4f}" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join([row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]).rstrip())
