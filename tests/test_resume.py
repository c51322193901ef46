"""Resuming: a process killed at any moment, a damaged checkpoint, and the same adapter in the end, to the bit; one writer a folder."""
import multiprocessing
import os
import random
import socket
import time
from pathlib import Path

import pytest
import torch

import train
from conftest import GEMMA
from helpers import command, metrics, read, refusal
from lorasae.errors import InputError
from lorasae.runs.config import Config
from lorasae.runs.folder import Run, checksum, read_checkpoint
from lorasae.runs.lock import new_folder

STEPS, EVERY = 60, 3


@pytest.fixture
def raw_config():
    return GEMMA


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have torch and train.py imported already, in milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    return context


@pytest.fixture
def arguments(whole_model, sae_folder, text_folder):
    words = ["--model", whole_model, "--sae", sae_folder, "--layer", 1, "--data", text_folder, "--context", 32, "--tokens", STEPS * 64,
             "--eval-tokens", 128, "--batch-size", 2, "--rank", 4, "--lr", 1e-3, "--dropout", 0.1, "--dtype", "float32", "--ahead", 8,
             "--device", "cpu", "--checkpoint-every", EVERY]
    return [str(word) for word in words]


def newest(folder):
    """The step of the last checkpoint, 0 without one."""
    return max((int(path.stem.removeprefix("step-")) for path in (folder / "checkpoint").glob("step-*.pt")), default=0)


def same_run(folder, other):
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (other / "adapter/adapter_model.safetensors").read_bytes()
    assert metrics(folder) == metrics(other)
    assert not list(folder.rglob("*.part"))
    results = [read(run / "results.json") for run in (folder, other)]
    for name in results[0].keys() - {"seconds", "tokens_per_second", "peak_memory_bytes"}:
        assert results[0][name] == results[1][name], name


def test_a_run_killed_a_dozen_times_ends_as_the_uninterrupted_one(processes, arguments, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = processes.Process(target=train.main, args=([*arguments, "--out", str(whole)],))
    process.start()
    process.join()
    assert process.exitcode == 0

    chance, deaths, command = random.Random(0), 0, [*arguments, "--out", str(killed)]
    while not (killed / "results.json").exists():
        process = processes.Process(target=train.main, args=(command,))
        process.start()
        moment = 0.3 * chance.random()                                  # while it starts,
        if chance.random() < 0.5:                                       # or around one of its checkpoints
            moment, start = 0.2 * moment, newest(killed)
            while newest(killed) == start and process.is_alive():
                time.sleep(0.001)
        process.join(moment if deaths < 12 else None)
        if process.is_alive():
            process.kill()                                              # SIGKILL
            process.join()
            deaths += 1
        else:
            assert process.exitcode == 0
        if (killed / "config.json").exists():
            command = ["--resume", str(killed)]
    assert deaths >= 10
    same_run(killed, whole)


class Killed(Exception):
    pass


@pytest.fixture
def interrupted(arguments, tmp_path, monkeypatch):
    """A run of 30 steps that stopped at step 20, between checkpoints, and the one that did not."""
    arguments += ["--tokens", str(30 * 64)]
    log = Run.log

    def stop(self, step, **values):
        if step == 20:
            raise Killed
        log(self, step, **values)

    command("train", *arguments, "--out", tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "log", stop)
        command("train", *arguments, "--out", tmp_path / "run")
    return tmp_path / "run", tmp_path / "whole"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"not a checkpoint")


def flip(path):
    """Another bit in the middle of a tensor: zip's own sums are not looked at, ours are."""
    data = bytearray(path.read_bytes())
    tensor = torch.load(path, weights_only=True)["parameters"][0].flatten()[:16].numpy().tobytes()
    data[data.index(tensor) + 5] ^= 1
    path.write_bytes(data)


def rewrite(path, **changes):
    """A sound checkpoint with other contents."""
    state = {**torch.load(path, weights_only=True), **changes}
    state.pop("checksum", None)
    torch.save({**state, "checksum": checksum(state)}, path)


@pytest.mark.parametrize("damage", [cut, empty, garble, flip])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(interrupted, damage, capsys):
    run, whole = interrupted
    assert newest(run) == 18
    damage(run / "checkpoint/step-00000018.pt")
    (run / "checkpoint/step-00000021.ptx.part").write_bytes(b"unfinished")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "kl')                                  # a line that a killed process was writing
    capsys.readouterr()
    command("train", "--resume", run)
    line, = capsys.readouterr().err.splitlines()
    assert "step-00000018.pt is damaged" in line and "trying the one before it" in line
    same_run(run, whole)


def test_without_any_whole_checkpoint_a_run_starts_again_and_its_new_ones_are_kept(interrupted, capsys, monkeypatch):
    run, whole = interrupted
    for path, damage in zip(sorted((run / "checkpoint").iterdir()), (cut, flip), strict=True):
        damage(path)
    kept, save = [], Run.save

    def watched(self, step, *rest):
        save(self, step, *rest)
        kept.append((step, newest(run)))

    monkeypatch.setattr(Run, "save", watched)
    command("train", "--resume", run)
    assert capsys.readouterr().err.count("is damaged") == 2
    assert kept == [(step, step) for step in range(3, 31, 3)]           # the damaged ones of steps 15 and 18 are not the newest
    same_run(run, whole)


def test_a_checksum_sees_every_number_and_every_name(tmp_path):
    state = {"step": 3, "parameters": [torch.arange(6.0), torch.ones(2, 3, dtype=torch.bfloat16)], "position": {"batch": 1, "of": None},
             "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999)}]}}
    others = [
        {**state, "step": 4}, {**state, "position": {"batch": 2, "of": None}}, {**state, "position": {"batch": 1, "off": None}},
        {**state, "parameters": [torch.arange(6.0).view(2, 3), state["parameters"][1]]}, {**state, "parameters": state["parameters"][:1]},
        {**state, "parameters": [torch.arange(6.0) + 1e-7, state["parameters"][1]]},
        {**state, "position": torch.arange(3).as_strided((1,), (0,))}, {**state, "position": torch.arange(0)},
        {**state, "optimizer": {**state["optimizer"], "param_groups": [{"lr": 1e-3 + 1e-18, "betas": (0.9, 0.999)}]}}]
    assert len({checksum(each) for each in [state, *others]}) == 1 + len(others)
    torch.save({**state, "checksum": checksum(state)}, tmp_path / "whole.pt")
    assert checksum(read_checkpoint(tmp_path / "whole.pt")) == checksum(state)


def test_a_checkpoint_of_an_earlier_version_is_refused_and_left_alone(interrupted):
    run, _ = interrupted
    path = run / "checkpoint/step-00000018.pt"
    state = torch.load(path, weights_only=True)
    state.pop("checksum")
    torch.save(state, path)
    assert "earlier version" in refusal("train", "--resume", run) and path.exists()
    with pytest.raises(InputError, match="start again with another --out"):
        read_checkpoint(path)


def test_a_checkpoint_holds_the_step_and_no_more_than_its_newest_two_are_kept(interrupted):
    run, whole = interrupted
    assert sorted(path.name for path in (whole / "checkpoint").iterdir()) == ["step-00000027.pt", "step-00000030.pt"]
    state = torch.load(run / "checkpoint/step-00000018.pt", weights_only=True)
    assert state["step"] == 18 and {int(own["step"]) for own in state["optimizer"]["state"].values()} == {18}


def test_what_cannot_be_resumed_is_one_clear_line(interrupted, tmp_path):
    run, whole = interrupted
    assert "finished run" in refusal("train", "--resume", whole)
    assert "no config.json" in refusal("train", "--resume", tmp_path / "nowhere") and not (tmp_path / "nowhere").exists()
    path = run / "checkpoint/step-00000018.pt"
    rewrite(path, parameters=torch.load(path, weights_only=True)["parameters"][1:])
    assert "another run" in refusal("train", "--resume", run)
    assert not list(tmp_path.rglob(".lock"))


def test_an_output_folder_that_cannot_be_is_one_clear_line(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    line = refusal("train", *arguments, "--out", tmp_path / "file" / "run")
    assert f"{tmp_path}/file/run" in line and "Not a directory" in line
    assert (tmp_path / "file").read_text() == ""


# ---- One writer a folder ---------------------------------------------------------------------------------------------

def hold(folder, ready, done):
    """A process that has claimed a folder, and does nothing with it."""
    run = Run.create(folder, Config())
    ready.set()
    done.wait()
    run.close()


def test_a_folder_in_use_is_refused_by_the_name_of_who_has_it_and_free_when_he_dies(processes, arguments, tmp_path):
    folder, ready, done = tmp_path / "run", processes.Event(), processes.Event()
    holder = processes.Process(target=hold, args=(folder, ready, done))
    holder.start()
    assert ready.wait(60)
    line = refusal("train", *arguments, "--out", folder)
    assert f"{folder} is being written by process {holder.pid} on {socket.gethostname()}" in line and "pass another --out" in line
    assert [path.name for path in folder.iterdir()] == [".lock"]        # the loser took nothing away
    holder.kill()
    holder.join()
    command("train", *arguments, "--tokens", 64, "--out", folder)       # what it left behind is not in the way
    assert (folder / "results.json").exists() and not (folder / ".lock").exists()


def test_a_run_that_goes_on_elsewhere_is_not_resumed_twice(interrupted, processes):
    run, whole = interrupted
    first = Run.resume(run)
    with pytest.raises(InputError, match=f"is being written by process {os.getpid()}"):
        Run.resume(run)
    first.close()
    command("train", "--resume", run)
    same_run(run, whole)


def test_a_finished_holder_leaves_nothing_where_nothing_was_begun(processes, tmp_path):
    folder, ready, done = tmp_path / "run", processes.Event(), processes.Event()
    holder = processes.Process(target=hold, args=(folder, ready, done))
    holder.start()
    assert ready.wait(60) and (folder / ".lock").exists()
    done.set()
    holder.join()
    assert holder.exitcode == 0 and not folder.exists()


def default_run(place, arguments, go):
    os.chdir(place)
    go.wait()
    train.main(arguments)


def test_two_runs_started_together_without_out_get_two_folders(processes, arguments, tmp_path):
    go = processes.Event()
    both = [processes.Process(target=default_run, args=(tmp_path, [*arguments, "--tokens", "64"], go)) for _ in range(2)]
    for process in both:
        process.start()
    go.set()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert sorted(str(path.relative_to(tmp_path / "runs")) for path in tmp_path.rglob("results.json")) == \
        ["model-lora-2/results.json", "model-lora/results.json"]


def test_a_default_folder_is_never_one_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [new_folder("some/place/model", "topk") for _ in range(3)]
    assert found == [Path("runs/model-topk"), Path("runs/model-topk-2"), Path("runs/model-topk-3")]
    (tmp_path / "runs" / "other-lora").write_text("")
    assert new_folder("other", "lora") == Path("runs/other-lora-2")
