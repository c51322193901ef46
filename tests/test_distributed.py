"""Several processes on a CPU: the same steps as one, one writer, a clear error if one dies."""
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import train
from helpers import (
    command, metrics, processes, read, refusal, same_tensors, stopped_at, without_costs, words)
from lorasae.adapt import World
from lorasae.io.shards import Text
from lorasae.runs.config import Config
from lorasae.runs.training import frozen_parts

ROOT = Path(__file__).parent.parent
PLAIN = ("--batch-size", 4, "--dropout", 0)             # dropout masks differ between processes


class Part(NamedTuple):
    """What `Echo` computes from tokens."""
    x: torch.Tensor
    nothing: None
    half: torch.Tensor


class Echo:
    """A kind of step whose frozen part is the tokens themselves."""
    model = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, config, world):
        self.config, self.world, self.sizes = config, world, []

    def frozen(self, tokens):
        self.sizes.append(len(tokens))
        return Part(tokens, None, tokens[:, 0] / 2)


def batch(step):
    return torch.arange(4 * step, 4 * step + 4)[:, None].repeat(1, 2)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("ahead, micro_batch", [(1, 1), (3, 1), (8, 1), (1, 4)])
def test_every_batch_is_seen_exactly_once_from_any_step_by_any_number_of_processes(
        ahead, micro_batch, count):
    config = Config(batch_size=4, context=2, tokens=8 * 11, micro_batch=micro_batch, ahead=ahead)
    for start in range(11):
        seen = []
        for number in range(count):
            kind = Echo(config, World(number, count))
            parts = frozen_parts(kind, batch, start)
            seen.append([next(parts) for _ in range(start, config.steps)])
            assert max(kind.sizes) <= max(ahead, min(micro_batch, 4 // count))
        for step, shares in enumerate(zip(*seen, strict=True), start):
            assert torch.equal(torch.cat([part.x for part in shares]), batch(step))
            assert torch.equal(torch.cat([part.half for part in shares]), batch(step)[:, 0] / 2)
            assert all(part.nothing is None for part in shares)


def test_text_that_a_resumed_run_needs_is_kept(site, tmp_path, monkeypatch):
    """It reads from before its checkpoint, as it computes a whole group of steps together."""
    asked, kept, real = [], [0], Text.batch
    monkeypatch.setattr(Text, "batch", lambda self, step: asked.append(step) or real(self, step))
    monkeypatch.setattr(Text, "keep_from", lambda self, step: kept.append(step))
    how = ("--checkpoint-every", 3, "--ahead", 8)       # groups of four steps
    with stopped_at(13):
        command("train", *words(site, "lora", *how), "--out", tmp_path / "run")
    (tmp_path / "run/checkpoint/step-00000012.pt").write_bytes(b"damaged")
    first, asked[:] = kept[-1], []
    command("train", "--resume", tmp_path / "run")
    later = [step for step in asked if step > 0]        # step 0 checks that there is enough text
    assert 0 < first <= min(later) <= 9 and later[-1] >= 19


def test_half_of_torchruns_environment_is_refused_in_one_clear_line(site, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    handler = signal.getsignal(signal.SIGTERM)
    line = refusal("train", *words(site), "--out", tmp_path / "run")
    signal.signal(signal.SIGTERM, handler)
    assert "environment variable RANK" in line and "or unset WORLD_SIZE" in line
    assert not (tmp_path / "run").exists()


def work(number, count, port, arguments, log):
    """What each process runs, started as by torchrun; its output goes to files."""
    if count > 1:
        os.environ.update(WORLD_SIZE=str(count), RANK=str(number), LOCAL_RANK=str(number),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        os.dup2(os.open(f"{log}-{number}.{name}", os.O_WRONLY | os.O_CREAT), stream.fileno())
    torch.set_num_threads(1)
    train.main(arguments)


class Processes:
    """`count` processes of one run; their output goes to LOG-NUMBER.out and LOG-NUMBER.err."""

    def __init__(self, count, arguments, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log, arguments = log, [str(word) for word in arguments]
        self.all = [processes().Process(target=work, args=(number, count, port, arguments, log))
                    for number in range(count)]
        for process in self.all:
            process.start()

    def join(self):
        """Waits until all have ended -> [exit code]"""
        for process in self.all:
            process.join()
        return [process.exitcode for process in self.all]

    def said(self, name):
        return [Path(f"{self.log}-{number}.{name}").read_text() for number in range(len(self.all))]


def run(count, folder, *arguments):
    them = Processes(count, arguments, folder.with_suffix(""))
    assert them.join() == [0] * count, them.said("err")
    return them.said("out")


@pytest.fixture(scope="module")
def pair(site, tmp_path_factory):
    """A finished run of two processes: (its folder, what each printed)"""
    folder = tmp_path_factory.mktemp("pair") / "run"
    return folder, run(2, folder, *words(site, "lora", *PLAIN), "--out", folder)


def numbers(nest):
    """All numbers of a results.json, in order."""
    if isinstance(nest, dict):
        return [number for value in nest.values() for number in numbers(value)]
    return [nest] if isinstance(nest, float) else []


def close(folder, other, tolerance):
    """Checks that two runs agree: tensors within `tolerance` of their norms, results roughly."""
    paths = [path for path in sorted(other.rglob("*.safetensors")) if "pct" not in str(path)]
    for path in paths:
        found, expected = load_file(folder / path.relative_to(other)), load_file(path)
        same_tensors(found.values(), expected.values(), tolerance)
    assert paths
    found, expected = (without_costs(read(each / "results.json")) for each in (folder, other))
    assert numbers(found) == pytest.approx(numbers(expected), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind, more", [
    ("lora", ["--dropout", 0]), ("lora", ["--dropout", 0, "--shard"]),
    ("several", ["--dropout", 0, "--adapt", "after", "--micro-batch", 1, "--ahead", 8]),
    ("both", ["--dropout", 0, "--optimizer", "muon"]), ("jumprelu", []),
    ("e2e", ["--auxk"])],
    ids=["data parallel", "sharded", "several", "with the SAE", "an SAE", "end to end"])
def test_two_processes_take_the_same_steps_as_one(site, tmp_path, pair, kind, more):
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = words(site, kind, "--batch-size", 4, "--tokens", 1280, *more)
    if kind == "lora" and "--shard" not in more:
        two, said = pair
    else:
        said = run(2, two, *arguments, "--out", two)
    command("train", *[word for word in arguments if word != "--shard"], "--out", one)

    lines, expected = metrics(two), metrics(one)
    assert lines[-1]["step"] == 10
    for line, alone in zip(lines, expected, strict=True):
        assert line == pytest.approx(alone, rel=1e-3)
    close(two, one, 1e-3)
    assert said[0].startswith("writing to") and said[1] == ""           # one prints and writes
    assert not list(two.rglob("*.part"))


@pytest.fixture(scope="module")
def killed(site, tmp_path_factory):
    """A run of two processes, one of which was killed after a checkpoint at step 4."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    arguments = words(site, "lora", *PLAIN, "--checkpoint-every", 2)
    them = Processes(2, [*arguments, "--out", folder], folder.with_suffix(""))
    while not (folder / "checkpoint/step-00000004.pt").exists():
        assert them.all[0].is_alive(), them.said("err")
        time.sleep(0.005)
    them.all[1].kill()
    assert them.join() == [1, -signal.SIGKILL]
    line, = them.said("err")[0].splitlines()
    assert line.startswith("error: lost another process of this run (")
    assert line.endswith("--resume RUN_DIR continues from the last checkpoint")
    return folder


@pytest.mark.parametrize("count", [1, 4])
def test_a_run_that_lost_a_process_resumes_with_any_number_of_them(killed, pair, tmp_path, count):
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    run(count, folder, "--resume", folder)
    whole, _ = pair
    close(folder, whole, 1e-5)
    assert metrics(folder)[-1]["tokens"] == metrics(whole)[-1]["tokens"] == 1280


def test_torchrun_starts_the_processes_and_a_mistake_is_reported(site, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "train.py"]
    arguments = words(site, "lora", "--batch-size", 3, "--out", tmp_path / "run")
    process = subprocess.run([*launcher, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode != 0 and not (tmp_path / "run/config.json").exists()
    assert "2 processes cannot share the 3 sequences of a step" in process.stderr
