"""The paper by one command: one rule for claims, shared runs, and a stopped command continues."""
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import command, misuse, read, refusal
from test_grids import finish, in_this_process, miniature
from lorasae.evals.common import Estimate
from lorasae.io.files import write_json
from lorasae.io.presets import PRESETS
from lorasae.paper import __main__ as paper
from lorasae.paper import gap
from lorasae.paper.results import Claim, by_chance, cell, intervals, over_seeds, table_of_claims
from lorasae.paper.study import all_jobs, around, budget, evaluation, new_sae

PAPER = "lorasae.paper.__main__"
ROOT = Path(__file__).parent.parent


@pytest.fixture
def study(tmp_path):
    return miniature(tmp_path)


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


def test_a_claim_takes_the_verdict_of_more_than_half_of_its_cases():
    yes, no, noise, none = (1, 0.5), (-1, 0.5), (0.2, 0.5), (1, None)
    assert claim(yes, yes, noise).verdict == "agrees"
    assert claim(yes, yes, noise).ours == "2 of 3 agree, 1 within noise"
    assert claim(no, no, none).ours == "2 of 3 differ, 1 no interval"
    assert claim(yes, yes, no, noise).verdict == "mixed"            # half is not enough
    assert claim(none, none, yes).verdict == "no interval" and claim().verdict == "no interval"
    assert claim((None, None), (None, None)).ours == "2 of 2 no interval"

    tested, by_luck = by_chance([claim(yes, none, (None, None)), claim(*[noise] * 39)])
    assert (tested, by_luck) == (40, 2)
    row, = table_of_claims([claim(yes)]).rows
    assert row == ["Fig. 3: says", "30 %", "+1.000 ± 0.500 nats (9 documents)", "agrees"]


def test_estimates_over_seeds():
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

def test_trainings_and_evaluations_are_commands(study):
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
    assert budget(study, gap.ONE_BLOCK).endswith("60,000 tokens (the paper: 15M). Seeds: 0, 1.")
    said = budget(study, gap.SCALING)
    assert said.startswith("SAEs train on 400,000 tokens. Adapters") and "Seeds: 42." in said
    write_json(made.folder / "config.json", {})
    assert made.line() == f"python train.py --resume {made.folder}"


@pytest.mark.parametrize("model, timed", [
    ("tiny-gemma-2", 24), ("gemma-2-2b", 27), ("/x/smollm2-135m-instruct", 11),
    ("gemma-3-270m", 8)])
def test_parts_share_trainings_and_each_comes_after_what_it_needs(study, model, timed):
    study = replace(study, model=model, sae_tokens=None, frontier_tokens=None, long_tokens=None)
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
        assert job.suite or Path(job.options["model"]).name in PRESETS
        assert "/x/" not in str(job.folder)
    assert sum(len(commands) for (_, shared), commands in stages if not shared) == timed


def test_a_real_model_on_a_laptop(tmp_path, capsys):
    """SAEs are trained here, around which all parts adapt; the long one's are shared."""
    model, data = tmp_path / "smollm2-135m-instruct", tmp_path / "mix"
    model.mkdir(), data.mkdir()
    words = ["--model", model, "--data", data, "--dry-run", "--out", tmp_path / "out"]
    command(PAPER, *words, "--only", "fig3,fig6,fig8,fig9,fig10")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    saes = [line for line in lines if " --method topk" in line]
    assert len(saes) == 1 + 5 + 2                       # Figure 6 has two
    assert sum("--tokens 2000000" in line for line in saes) == 1
    assert all(f"--model {model} " in line and f"--data {data} " in line
               for line in lines if "train.py" in line)
    assert any("--layer 12 --width 4608 --l0 32 --tokens 400000" in line for line in lines)
    assert sum("--rank 64 4 16" in line for line in lines) == 1
    assert sum("--suite" in line for line in lines) == 2

    command(PAPER, *words, "--only", "control", "--quick", "--other-data", data)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python")]
    assert sum("--method finetune --objective kl --sae" in line for line in lines) == 3
    assert sum(f"--suite elsewhere --data {data}" in line for line in lines) == 9
    assert "there is no such part" in refusal(PAPER, "--model", "gemma-3-270m", "--only", "fig6")
    assert "--model gpt2: expected tiny-gemma-2, " in refusal(PAPER, "--model", "gpt2")


# ---- The command ---------------------------------------------------------------------------------

def test_every_figure_and_table_has_a_part_and_a_dry_run_shows_its_commands(capsys, tmp_path):
    command(PAPER, "--dry-run", "--out", tmp_path / "out")
    words = re.findall(r"\w+", capsys.readouterr().out)
    figures = [f"fig{number}" for number in (1, *range(3, 12))]         # Figure 2 is the method's
    assert set(figures + [f"table{number}" for number in range(1, 7)]) <= set(words)

    command(PAPER, "--dry-run", "--only", "fig9", "--seeds", 1, "--out", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "one_block (fig9): 4 trainings on 240,000 tokens, 0 evaluations"
    assert [line.split()[:4] for line in lines[-4:]] == [
        ["python", os.path.relpath(ROOT / "train.py"), "--model", "tiny-gemma-2"]] * 4
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert "choose from frontier, fig1" in refusal(PAPER, "--only", "fig2", "--out", out)
    for option, value in ("--seeds", 0), ("--seeds", "9" * 30), ("--lora-tokens", "-3"):
        assert option in misuse(capsys, PAPER, option, value)
    for script, *more in ([PAPER, "--out"], ["lorasae.beyond.experiments", "recipe", "--out"],
                          ["lorasae.bench.__main__", "kl", "--json"], ["train", "--out"]):
        for name in "", "a\0b":
            assert more[-1] in misuse(capsys, script, *more, name)
    for name in "x" * 5000, "x/" * 2500, "new/" + "x" * 300:
        assert "name too long" in refusal(PAPER, "--only", "fig9", "--out", out / name)
    for device in "cuda:99", "abacus":
        assert f"--device {device}" in refusal(PAPER, "--device", device, "--out", out)
    assert not out.exists()


def test_a_study_keeps_its_arguments(study):
    paper.begin(study)
    paper.begin(study)
    with pytest.raises(ValueError, match="begun with lora_tokens 60000, not 1: pass another --out"):
        paper.begin(replace(study, lora_tokens=1))


def test_what_failed_is_left_out_by_name_and_the_rest_is_shown(study, monkeypatch, capsys):
    def pretend(commands, processes, logs):
        """Finishes every run but one of Figure 6."""
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
    assert "60,000 tokens" in found["budget"] and str(study.folder) not in str(found)

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

    kept = study.folder / "kept"                        # numbers alone, without the runs
    kept.mkdir()
    (study.folder / "numbers").rename(kept / "numbers")
    command(PAPER, "--redraw", "--only", "fig9", "--out", kept)
    assert "Fig. 9: The first block" in capsys.readouterr().out
    assert "4 trainings on 4,000" in (kept / "index.html").read_text()


def test_a_figure_from_its_commands_and_again_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "run_all", in_this_process)
    words = ["--only", "fig9", "--quick", "--lora-tokens", "1k", "--eval-tokens", "1k"]
    words += ["--out", tmp_path]
    command(PAPER, *words, "--device", "cpu")
    numbers = read(tmp_path / "numbers" / "one_block.json")["numbers"]
    assert [row["x"] for row in numbers["rows"]] == ["all", 1, 2, 3]
    runs = sorted((tmp_path / "adapters").iterdir())
    before = {run: (run / "results.json").stat().st_mtime_ns for run in runs}

    # What a killed run leaves behind: no results, and no adapter yet
    *kept, killed = runs
    for name in "results.json", "sequences.json":
        (killed / name).unlink()
    for checkpoint in (killed / "checkpoint").iterdir():
        checkpoint.unlink()
    command(PAPER, *words, "--device", "cpu")
    again = read(tmp_path / "numbers" / "one_block.json")["numbers"]
    for row in numbers["rows"] + again["rows"]:
        del row["seconds"]                              # all else is the same
    assert again == numbers
    assert all((run / "results.json").stat().st_mtime_ns == before[run] for run in kept)
