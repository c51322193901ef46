"""train.py and eval.py as processes: what is finished is skipped, what was begun is resumed."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorasae.runs import commands
from lorasae.runs.commands import Command, run_all

ROOT = Path(__file__).parent.parent
SCRIPT = '''
import os, pathlib, sys, time
word, folder = sys.argv[-2:]
folder = pathlib.Path(folder)
folder.mkdir(parents=True, exist_ok=True)
(folder / "words").write_text(" ".join(sys.argv[1:]))
print(os.environ["OMP_NUM_THREADS"], sys.stdin.read())
if word == "fail":
    print("error: not this one\\nerror: too few tokens")
    sys.exit("(--help lists the options)")
if word == "killed":
    os.kill(os.getpid(), 9)
if word == "lazy":
    sys.exit()
if word == "slow":
    time.sleep(100)
(folder / "results.json").write_text("{}")
'''


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Commands of a script that does what its word says: made("fail")."""
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(commands, "ROOT", tmp_path)

    def make(word):
        folder = tmp_path / "runs" / word
        return Command("train.py", (word, str(folder)), folder)
    return make


def test_a_failure_has_a_reason_and_the_others_run(made, tmp_path, capsys):
    asked = [made(word) for word in ("fail", "well", "killed", "lazy")]
    failed = run_all(asked, 2, tmp_path / "logs")
    log = tmp_path / "logs" / "runs-lazy-results.log"
    assert failed == {
        asked[0].done: "too few tokens",
        asked[2].done: "signal 9 killed it (too little memory?), see "
                       f"{log.parent}/runs-killed-results.log",
        asked[3].done: f"see {log}",
    }
    shown = capsys.readouterr().out
    assert "of 4] runs-fail-results: failed: too few tokens" in shown
    assert "runs-well-results: " in shown
    assert log.read_text().split()[0].isdigit()         # its threads


def test_what_is_finished_is_skipped_and_what_was_begun_is_resumed(made, tmp_path):
    finished, begun = made("fail"), made("well")
    for each, name in (finished, "results.json"), (begun, "config.json"):
        each.folder.mkdir(parents=True)
        (each.folder / name).touch()
    assert run_all([finished, begun], 1, tmp_path / "logs") == {}
    assert not (finished.folder / "words").exists()
    assert (begun.folder / "words").read_text() == f"--resume {begun.folder}"
    evaluation = Command("eval.py", ("--suite", "lm"), begun.folder, "eval-lm.json")
    assert evaluation.to_run() == evaluation.words and evaluation.name == "runs-well-eval-lm"


def test_an_interrupt_leaves_no_process_and_starts_no_more(made, tmp_path):
    words = [f"commands.Command('train.py', ('slow', {str(tmp_path / name)!r}), "
             f"commands.Path({str(tmp_path / name)!r}))" for name in ("a", "b")]
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"from lorasae.runs import commands; commands.ROOT = commands.Path({str(tmp_path)!r}); "
            f"commands.run_all([{', '.join(words)}], 1, commands.ROOT / 'logs')")
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE,
                               start_new_session=True)
    begun = time.monotonic()
    while not (tmp_path / "a" / "words").exists():
        assert time.monotonic() - begun < 120 and running.poll() is None
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGINT)               # as a terminal does for Ctrl-C
    _, errors = running.communicate(timeout=60)         # ends at once, without the 100 seconds
    assert b"KeyboardInterrupt" in errors
    assert not (tmp_path / "b").exists() and not (tmp_path / "a" / "results.json").exists()
