"""The paper in one command: verdicts on claims, shared runs, processes, continuing after a stop."""
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import command, misuse, read, refusal
from test_grids import finish, in_this_process
from lorasae.evals.common import Estimate
from lorasae.io.files import write_json
from lorasae.io.presets import PRESETS
from lorasae.paper import __main__ as paper
from lorasae.paper import gap
from lorasae.paper.results import Claim, by_chance, cell, intervals, over_seeds, table_of_claims
from lorasae.paper.study import all_jobs, around, budget, evaluation, new_sae
from lorasae.runs import commands
from lorasae.runs.commands import Command, run_all

PAPER = "lorasae.paper.__main__"
ROOT = Path(__file__).parent.parent


# ---- Claims --------------------------------------------------------------------------------------

def claim(*cases, **how):
    """A Claim with cases (mean, half)."""
    named = {f"case {i}": [mean, half, "9 documents"] for i, (mean, half) in enumerate(cases)}
    return Claim("Fig. 3", "says", "30 %", named, **how)


@pytest.mark.parametrize("mean, half, verdict", [
    (0.41, 0.1, "agrees"), (0.19, 0.1, "differs"), (0.35, 0.1, "within noise"),
    (0.25, 0.1, "within noise"), (0.41, None, "no interval"), (None, None, "no interval"),
    (0.3, 0.0, "within noise"),
])
def test_a_case_is_decided_by_its_interval_and_the_threshold(mean, half, verdict):
    one = claim((mean, half), threshold=0.3, form=".1%", unit="of the gap")
    assert one.verdict == one.verdict_of("case 0") == verdict
    other = {"agrees": "differs", "differs": "agrees"}.get(verdict, verdict)
    assert claim((mean, half), threshold=0.3, larger=False).verdict == other
    assert ("±" in one.ours) == (half is not None) and "9 documents" in one.ours


def test_a_claim_gets_the_verdict_of_more_than_half_of_its_cases():
    yes, no, noise, none = (1, 0.5), (-1, 0.5), (0.2, 0.5), (1, None)
    assert claim(yes, yes, noise).verdict == "agrees"
    assert claim(yes, yes, noise).ours == "2 of 3 agree, 1 within noise"
    assert claim(no, no, none).ours == "2 of 3 differ, 1 no interval"
    assert claim(yes, yes, no, noise).verdict == "mixed"            # half is not enough
    assert claim(none, none, yes).verdict == "no interval"
    assert claim((None, None), (None, None)).ours == "2 of 2 no interval"

    tested, by_luck = by_chance([claim(yes, none, (None, None)), claim(*[noise] * 39)])
    assert (tested, by_luck) == (40, 2)
    row, = table_of_claims([claim(yes)]).rows
    assert row == ["Fig. 3: says", "30 %", "+1.000 ± 0.500 nats (9 documents)", "agrees"]


def test_estimates_are_combined_over_seeds():
    one = Estimate(0.2, 0.1, "29 documents")
    assert over_seeds([list(one)]) == over_seeds([one, one]) == one         # nothing varies
    assert over_seeds([one, one._replace(mean=0.4)]) == (
        pytest.approx(0.3), pytest.approx(0.631, abs=1e-3), "2 seeds")
    undefined = over_seeds([one, Estimate(None, None, "no gap")])
    assert undefined.mean is None and cell(undefined) == "not defined for every seed"
    assert cell(one, "+.2f") == "+0.20 ± 0.10" and cell((0.2, None, "")) == "0.2000"
    spread = intervals([one, one, (1.0, None, "3 documents"), (None, None, "no gap")])
    assert spread == "± 90 % over 29 documents, no interval over 3 documents"


# ---- The study -----------------------------------------------------------------------------------

def test_training_runs_and_evaluations_are_commands(study):
    sae = new_sae(study, "topk", "tiny-gemma-2", layer=0, k=4)
    assert sae.folder.name == "tiny-gemma-2-topk-layer-0-k-4-tokens-400000"
    job = around(study, "x", [sae], rank=(1, 4), seed=None)
    made = job.command
    assert job.needs == (sae,) and made.done == study.folder / "adapters/x/results.json"
    assert made.line().startswith(f"python train.py --model tiny-gemma-2 --sae {sae.folder} --tok")
    assert made.line().endswith(f"--device cpu --rank 1 4 --out {study.folder}/adapters/x")
    assert "--seed" not in made.line()
    of_job = evaluation(job, "lm", limit=3)
    assert of_job.command.line() == f"python eval.py {made.folder} --suite lm --limit 3"
    assert of_job.command.done == made.folder / "eval-lm.json"
    assert budget(study, gap.ONE_BLOCK) == {
        "sae_tokens": [], "adapter_tokens": [60_000], "seeds": [0, 1], "optimizer": "adamw",
        "recipe": "tuned"}
    made_by = budget(study, gap.SCALING)
    assert made_by["sae_tokens"] == [400_000] and made_by["seeds"] == [42]
    write_json(made.folder / "config.json", {})
    assert made.line() == f"python train.py --resume {made.folder}"


@pytest.mark.parametrize("model, timed", [
    ("tiny-gemma-2", 24), ("gemma-2-2b", 27), ("/x/smollm2-135m-instruct", 11),
    ("gemma-3-270m", 8)])
def test_parts_share_training_runs_and_jobs_follow_what_they_need(study, model, timed):
    study = replace(study, model=model, sae_tokens=None, frontier_tokens=None, long_tokens=None,
                    data="/d")
    parts = paper.chosen(study, None)
    jobs = all_jobs(job for part in parts for job in part.jobs(study))
    options = {}
    for part in parts:                                  # one folder never means two things
        for done, job in all_jobs(part.jobs(study)).items():
            assert options.setdefault(done, job.command) == job.command
    stages = paper.stages(jobs)
    place = {made.done: i for i, (_, commands) in enumerate(stages) for made in commands}
    assert place.keys() == jobs.keys()
    for done, job in jobs.items():
        assert all(place[needed.command.done] < place[done] for needed in job.needs)
        assert job.suite or job.options["data"] == "/d"
        assert job.suite or Path(job.options["model"]).name in PRESETS
        assert "/x/" not in str(job.folder)
    assert sum(len(commands) for (_, shared), commands in stages if not shared) == timed


# ---- The command ---------------------------------------------------------------------------------

def test_every_figure_and_table_has_a_part_and_a_dry_run_shows_its_commands(capsys, tmp_path):
    command(PAPER, "--dry-run", "--out", tmp_path / "out")
    words = re.findall(r"\w+", capsys.readouterr().out)
    figures = [f"fig{number}" for number in (1, *range(3, 12))]         # Figure 2 shows the method
    assert set(figures + [f"table{number}" for number in range(1, 7)]) <= set(words)

    command(PAPER, "--dry-run", "--only", "fig9", "--seeds", 1, "--out", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "one_block (fig9): 4 training runs on 240,000 tokens, 0 evaluations"
    assert [line.split()[:4] for line in lines[-4:]] == [
        ["python", os.path.relpath(ROOT / "train.py"), "--model", "tiny-gemma-2"]] * 4
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_leave_nothing_behind(tmp_path, capsys):
    out = tmp_path / "out"
    assert "choose from frontier, fig1" in refusal(PAPER, "--only", "fig2", "--out", out)
    assert "there is no such part" in refusal(PAPER, "--model", "gemma-3-270m", "--only", "fig6")
    assert "--model gpt2: expected tiny-gemma-2, " in refusal(PAPER, "--model", "gpt2")
    for option, value in ("--seeds", 0), ("--seeds", "9" * 30), ("--lora-tokens", "-3"):
        assert option in misuse(capsys, PAPER, option, value)
    for script, *more in ([PAPER, "--out"], ["lorasae.bench.__main__", "kl", "--json"],
                          ["train", "--out"]):
        for name in "", "a\0b":
            assert more[-1] in misuse(capsys, script, *more, name)
    for name in "x" * 5000, "x/" * 2500:
        assert "name too long" in refusal(PAPER, "--only", "fig9", "--out", out / name)
    for device in "cuda:99", "abacus":
        assert f"--device {device}" in refusal(PAPER, "--device", device, "--out", out)
    assert not out.exists()


def test_a_study_keeps_its_arguments(study):
    paper.begin(study)
    paper.begin(study)
    with pytest.raises(ValueError, match="begun with lora_tokens 60000, not 1: pass another --out"):
        paper.begin(replace(study, lora_tokens=1))


def test_failed_parts_are_left_out_by_name_and_the_rest_is_shown(study, monkeypatch, capsys):
    def pretend(commands, processes, logs):
        """Finishes every run except one of Figure 6's."""
        failed = {}
        for each in commands:
            if "several-1-3-seed-0" in each.name:
                failed[each.done] = "too little memory"
            else:
                finish(each.folder, seconds=1.0, base=2.0, sae=3.0, adapted=2.5)
        return failed

    monkeypatch.setattr(paper, "run_all", pretend)
    words = ["--only", "fig6,fig9", "--seeds", 1, "--out", study.folder]
    assert refusal(PAPER, *words) == "several was left out: too little memory"
    page, shown = (study.folder / "index.html").read_text(), capsys.readouterr().out
    assert "too little memory" in page and gap.ONE_BLOCK.words["title"] in page
    assert "Fig. 9: The first block" in shown and "Fig. 6" not in shown
    found = read(study.folder / "numbers" / "one_block.json")
    assert (found["trainings"], found["trained_tokens"], found["seconds"]) == (4, 4000, 4.0)
    assert "60,000 tokens\n(the paper: 15M)" in page and str(study.folder) not in str(found)

    path = study.folder / "numbers/one_block.json"                  # earlier parts stay
    good = path.read_text()
    for spoilt in "[]", '{"numbers": 7}', good.replace("rows", "lines"):
        path.write_text(spoilt)
        assert str(path) in refusal(PAPER, *words[:1], "fig6", *words[2:])
    path.write_text(good)
    monkeypatch.setattr(paper, "run_all", lambda *asked: {})
    assert "several-1-3-seed-0/results.json is missing" in refusal(PAPER, *words[:1], "fig6",
                                                                   *words[2:])
    assert gap.ONE_BLOCK.words["title"] in (study.folder / "index.html").read_text()

    kept = study.folder / "kept"                        # only the numbers, without the runs
    kept.mkdir()
    (study.folder / "numbers").rename(kept / "numbers")
    command(PAPER, "--redraw", "--only", "fig9", "--out", kept)
    assert "Fig. 9: The first block" in capsys.readouterr().out
    assert "4 training runs on\n4,000" in (kept / "index.html").read_text()


def test_a_figure_is_measured_with_runs_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "run_all", in_this_process)
    words = ["--only", "fig9", "--quick", "--lora-tokens", "1k", "--eval-tokens", "1k"]
    words += ["--out", tmp_path]
    command(PAPER, *words, "--device", "cpu")
    numbers = read(tmp_path / "numbers" / "one_block.json")["numbers"]
    assert [row["x"] for row in numbers["rows"]] == ["all", 1, 2, 3]


# ---- Running the commands as processes -----------------------------------------------------------

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
    """made("fail"): a command whose script does what the word says."""
    (tmp_path / "train.py").write_text(SCRIPT)
    monkeypatch.setattr(commands, "ROOT", tmp_path)

    def make(word):
        folder = tmp_path / "runs" / word
        return Command("train.py", (word, str(folder)), folder)
    return make


def test_a_failure_is_reported_with_its_reason_and_the_others_run(made, tmp_path, capsys):
    asked = [made(word) for word in ("fail", "well", "killed", "lazy")]
    failed = run_all(asked, 2, tmp_path / "logs")
    log = tmp_path / "logs" / "runs-lazy-results.log"
    assert failed == {
        asked[0].done: "too few tokens",
        asked[2].done: "killed by signal 9 (out of memory?), see "
                       f"{log.parent}/runs-killed-results.log",
        asked[3].done: f"see {log}",
    }
    shown = capsys.readouterr().out
    assert "of 4] runs-fail-results: failed: too few tokens" in shown
    assert "runs-well-results: " in shown
    assert log.read_text().split()[0].isdigit()         # its number of threads


def test_finished_runs_are_skipped_and_unfinished_ones_resumed(made, tmp_path):
    finished, begun, early = made("fail"), made("well"), made("early")
    for each, name in (finished, "results.json"), (begun, "config.json"), (early, "text/a.npy"):
        (each.folder / name).parent.mkdir(parents=True)
        (each.folder / name).touch()
    assert run_all([finished, begun, early], 1, tmp_path / "logs") == {}
    assert not (early.folder / "text").exists()         # it was killed before it began
    assert not (finished.folder / "words").exists()
    assert (begun.folder / "words").read_text() == f"--resume {begun.folder}"
    evaluation = Command("eval.py", ("--suite", "lm"), begun.folder, "eval-lm.json")
    assert evaluation.to_run() == evaluation.words and evaluation.name == "runs-well-eval-lm"


def test_an_interrupt_leaves_no_process_and_starts_no_other(made, tmp_path):
    words = [f"commands.Command('train.py', ('slow', {str(tmp_path / name)!r}), "
             f"commands.Path({str(tmp_path / name)!r}))" for name in ("a", "b")]
    code = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
            f"from lorasae.runs import commands; commands.ROOT = commands.Path({str(tmp_path)!r}); "
            f"commands.run_all([{', '.join(words)}], 1, commands.ROOT / 'logs')")
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE)
    begun = time.monotonic()
    while not (tmp_path / "a" / "words").exists():
        assert time.monotonic() - begun < 120 and running.poll() is None
        time.sleep(0.05)
    os.kill(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)         # ends at once, not after 100 seconds
    assert b"KeyboardInterrupt" in errors
    assert not (tmp_path / "b").exists() and not (tmp_path / "a" / "results.json").exists()
