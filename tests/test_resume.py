"""Resuming: a run killed at any moment, or with damaged checkpoints, ends with the same bits.

Also a run's folder: only one process writes to it, and a run that never began leaves none.
"""
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

import train
from helpers import (
    command, counted, metrics, processes, products, read, refusal, refuses, same_run, stopped_at,
    words)
from lorasae.runs.config import Config, read_config
from lorasae.runs.folder import Run
from test_train import SPOILT


def newest(folder):
    """The step of the newest checkpoint, or 0 without one."""
    steps = [int(path.stem.removeprefix("step-")) for path in folder.glob("checkpoint/step-*.pt")]
    return max(steps, default=0)


@pytest.mark.parametrize("kind, more", [
    ("lora", ("--ahead", 12, "--micro-batch", 1)), ("several", ()),
    ("both", ("--optimizer", "muon")), ("finetune", ()), ("topk", ("--auxk",)), ("jumprelu", ()),
    ("e2e", ())],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)))
def test_resuming_an_interrupted_run_gives_the_same_bits(site, finished, tmp_path, kind, more):
    whole, run = finished(kind, *more), tmp_path / "run"
    with stopped_at(13):
        command("train", *words(site, kind, *more), "--out", run)
    assert newest(run) == 8 and not (run / "results.json").exists()
    checkpoint = run / "checkpoint/step-00000008.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "seconds": 1000.0}, checkpoint)        # as if the first part were slow
    with counted(Run, "log") as steps:
        command("train", "--resume", run)
    assert steps.call_count == 20 - 8
    same_run(run, whole)
    assert read(run / "results.json")["seconds"] > 1000


def test_a_run_killed_many_times_ends_like_an_uninterrupted_one(site, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = words(site, "lora", "--tokens", 40 * 64, "--checkpoint-every", 3)
    command("train", *arguments, "--out", whole)

    chance, deaths, line = random.Random(0), 0, [*arguments, "--out", str(killed)]
    while not (killed / "results.json").exists():
        process = processes().Process(target=train.main, args=(line,))
        process.start()
        moment = 0.3 * chance.random()                  # at the start,
        if chance.random() < 0.5:                       # or near one of its checkpoints
            moment, start = 0.2 * moment, newest(killed)
            while newest(killed) == start and process.is_alive():
                time.sleep(0.001)
        process.join(moment if deaths < 4 else None)
        if process.is_alive():
            process.kill()                              # SIGKILL
            process.join()
            deaths += 1
        else:
            assert process.exitcode == 0
        if (killed / "config.json").exists():
            line = ["--resume", str(killed)]
    assert deaths >= 3
    same_run(killed, whole)


@pytest.fixture(scope="module")
def stopped_run(site, tmp_path_factory):
    """A run that stopped at step 19, after checkpoints at 8 and 16."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with stopped_at(19):
        command("train", *words(site), "--out", folder)
    return folder


@pytest.fixture
def stopped(stopped_run, tmp_path):
    return Path(shutil.copytree(stopped_run, tmp_path / "run"))


def flip(path):
    """Flips a bit in the middle of a tensor, which torch.load does not notice."""
    data = bytearray(path.read_bytes())
    tensor = torch.load(path, weights_only=True)["parameters"][0].flatten()[:16]
    data[data.index(tensor.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


@pytest.mark.parametrize("damage", [SPOILT["half"], flip])
def test_if_a_checkpoint_is_damaged_the_one_before_it_is_used(stopped, finished, damage, capsys):
    damage(stopped / "checkpoint/step-00000016.pt")
    (stopped / "checkpoint/step-00000019.ptx.part").write_bytes(b"unfinished")
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"step": 18, "kl')                  # a line that a killed process was writing
    capsys.readouterr()
    command("train", "--resume", stopped)
    line, = capsys.readouterr().err.splitlines()
    assert "step-00000016.pt is damaged" in line and "trying the one before it" in line
    same_run(stopped, finished("lora"))


@pytest.mark.parametrize("damage", ["half", "garbage"])
def test_a_damaged_log_loses_lines_but_nothing_else(stopped, finished, damage):
    SPOILT[damage](stopped / "metrics.jsonl")
    command("train", "--resume", stopped)
    steps = [line["step"] for line in metrics(stopped)]
    assert steps[-1] == 20 and steps == sorted(steps)
    assert products(stopped) == products(finished("lora"))


def test_without_an_intact_checkpoint_a_run_starts_over(stopped, finished, capsys, monkeypatch):
    files = sorted(stopped.glob("checkpoint/*.pt"))
    for path, damage in zip(files, (SPOILT["half"], flip), strict=True):
        damage(path)
    kept, save = [], Run.save

    def watched(self, step, *rest):
        save(self, step, *rest)
        kept.append((step, newest(stopped)))

    monkeypatch.setattr(Run, "save", watched)
    command("train", "--resume", stopped)
    assert capsys.readouterr().err.count("is damaged") == 2
    assert kept == [(8, 8), (16, 16), (20, 20)]         # the damaged ones do not count
    same_run(stopped, finished("lora"))


def test_the_newest_two_checkpoints_are_kept(finished):
    files = sorted(path.name for path in (finished("lora") / "checkpoint").iterdir())
    assert files == ["step-00000016.pt", "step-00000020.pt"]


def test_a_run_that_cannot_be_resumed_is_one_clear_line(stopped, finished):
    assert "is a finished run" in refusal("train", "--resume", finished("lora"))
    path = stopped / "checkpoint/step-00000016.pt"
    state = torch.load(path, weights_only=True)
    shorter = {"parameters": [saved[:1] for saved in state["parameters"]]}      # copy_ broadcasts
    fewer = {"parameters": state["parameters"][1:]}
    for other in shorter, fewer, {"parameters": None}, {"optimizer": [1]}, {"seconds": None}:
        torch.save({**state, **other}, path)
        line = refusal("train", "--resume", stopped)
        of_another_run = other is shorter or other is fewer
        assert f"{stopped}/checkpoint" in line and ("another run" in line) == of_another_run


def hold(folder, ready, done):
    """A process that claims a folder and does nothing with it."""
    run = Run.create(folder, Config())
    ready.set()
    done.wait()
    run.close()


def test_a_folder_in_use_is_refused_until_its_writer_dies(site, tmp_path):
    folder, ready, done = tmp_path / "run", processes().Event(), processes().Event()
    holder = processes().Process(target=hold, args=(folder, ready, done))
    holder.start()
    assert ready.wait(60)
    line = refusal("train", *words(site), "--out", folder)
    assert f"another process is writing to {folder}" in line and "another --out" in line
    assert [path.name for path in folder.iterdir()] == [".lock"]    # the refused run left nothing
    holder.kill()
    holder.join()
    command("train", *words(site, "lora", "--tokens", 64), "--out", folder)
    assert (folder / "results.json").exists()


def test_a_run_in_progress_cannot_be_resumed(stopped, finished):
    config = read_config(stopped)
    first = Run.resume(stopped, config)
    refuses("another process is writing to", Run.resume, stopped, config)
    first.close()
    command("train", "--resume", stopped, "--device", "cpu")
    same_run(stopped, finished("lora"))


@pytest.mark.parametrize("there", [[], ["mine"], ["mine", "mine/run"]])
def test_a_run_that_never_began_removes_only_its_own_folders(tmp_path, there):
    for folder in there:
        (tmp_path / folder).mkdir()
    before, folder = set(tmp_path.rglob("*")), tmp_path / "mine/run"
    Run.create(folder, Config()).close()
    assert set(tmp_path.rglob("*")) == before
    run = Run.create(folder, Config())
    (folder / "notes.txt").write_text("mine")           # files that a user adds stay
    run.close()
    assert set(tmp_path.rglob("*")) == {folder.parent, folder, folder / "notes.txt"}


def default_run(place, arguments, go):
    os.chdir(place)
    go.wait()
    train.main(arguments)


def test_two_runs_started_together_without_out_get_two_folders(site, tmp_path):
    go, arguments = processes().Event(), words(site, "lora", "--tokens", 64)
    both = [processes().Process(target=default_run, args=(tmp_path, arguments, go)) for _ in "ab"]
    for process in both:
        process.start()
    go.set()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(path.parent.name for path in tmp_path.glob("runs/*/results.json")) == [
        "gemma2-lora", "gemma2-lora-2"]
