"""Resuming: a process killed at any moment, a damaged checkpoint, and the same adapter in the end, to the bit."""
import json
import multiprocessing
import random
import time

import pytest
import torch

import train
from lorasae.runs.folder import Run

STEPS, EVERY = 60, 3
pytestmark = pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)


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


def metrics(folder):
    """[(step, kl, grad_norm)] of metrics.jsonl."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["kl"], line["grad_norm"]) for line in lines]


def same_run(folder, other):
    assert (folder / "adapter/adapter_model.safetensors").read_bytes() == (other / "adapter/adapter_model.safetensors").read_bytes()
    assert metrics(folder) == metrics(other)
    assert not list(folder.rglob("*.part"))
    results = [json.loads((run / "results.json").read_text()) for run in (folder, other)]
    assert results[0]["ce_adapted"] == results[1]["ce_adapted"]


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

    train.main([*arguments, "--out", str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Run, "log", stop)
        train.main([*arguments, "--out", str(tmp_path / "run")])
    return tmp_path / "run", tmp_path / "whole"


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("damage", [cut, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"not a checkpoint")],
                         ids=["truncated", "empty", "garbage"])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_is_used(interrupted, damage, capsys):
    run, whole = interrupted
    assert newest(run) == 18
    damage(run / "checkpoint/step-00000018.pt")
    (run / "checkpoint/step-00000021.ptx.part").write_bytes(b"unfinished")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "kl')                                  # a line that a killed process was writing
    train.main(["--resume", str(run)])
    assert "step-00000018.pt is damaged" in capsys.readouterr().err
    same_run(run, whole)


def test_without_any_whole_checkpoint_a_run_starts_again(interrupted, capsys):
    run, whole = interrupted
    for path in (run / "checkpoint").iterdir():
        cut(path)
    train.main(["--resume", str(run)])
    assert capsys.readouterr().err.count("damaged") == 2
    same_run(run, whole)


def test_a_checkpoint_holds_the_step_and_no_more_than_its_newest_two_are_kept(interrupted):
    run, whole = interrupted
    assert sorted(path.name for path in (whole / "checkpoint").iterdir()) == ["step-00000027.pt", "step-00000030.pt"]
    state = torch.load(run / "checkpoint/step-00000018.pt", weights_only=True)
    assert state["step"] == 18 and {int(own["step"]) for own in state["optimizer"]["state"].values()} == {18}


def test_what_cannot_be_resumed_is_one_clear_line(interrupted, tmp_path):
    run, whole = interrupted
    with pytest.raises(SystemExit, match="finished run"):
        train.main(["--resume", str(whole)])
    with pytest.raises(SystemExit, match="no config.json"):
        train.main(["--resume", str(tmp_path / "nowhere")])
    state = torch.load(run / "checkpoint/step-00000018.pt", weights_only=True)
    state["parameters"] = state["parameters"][1:]
    torch.save(state, run / "checkpoint/step-00000018.pt")
    with pytest.raises(SystemExit, match="another run"):
        train.main(["--resume", str(run)])


def test_an_output_folder_that_cannot_be_is_one_clear_line(arguments, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="cannot write"):
        train.main([*arguments, "--out", str(tmp_path / "file" / "run")])
