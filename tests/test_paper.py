"""The paper by one command: one rule for claims, shared runs, and a stopped command continues."""
import os
from dataclasses import replace
from pathlib import Path

import pytest

from helpers import command, misuse, read, refusal
from test_grids import finish, miniature
from lorasae.evals.common import Estimate
from lorasae.io.files import write_json
from lorasae.io.presets import PRESETS
from lorasae.paper import __main__ as paper
from lorasae.paper import gap
from lorasae.paper.results import Claim, by_chance, cell, intervals, over_seeds, table_of_claims
from lorasae.paper.study import (Evaluation, Study, adapters, budget, command_of, new_sae,
                                 tokens_of)

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
    sae = new_sae(study, "topk", "tiny-gemma-2", 0, l0=4)
    assert sae.options["k"] == 4 and "l0" not in sae.options and sae.options["layer"] == 0
    assert new_sae(study, "jumprelu", "tiny-gemma-2", l0=4).options["l0"] == 4
    training = adapters(study, "x", "tiny-gemma-2", [sae, "elsewhere"], rank=(1, 4))
    made = command_of(study, training)
    sources = ["--sae", str(study.folder / sae.name), "elsewhere"]
    assert training.saes == (sae,) and made.done == study.folder / "adapters/x/results.json"
    assert made.line().startswith("python train.py --model tiny-gemma-2 " + " ".join(sources))
    assert "--rank 1 4" in made.line() and "--seed" not in made.line()
    assert made.line().endswith(f"--recipe tuned --optimizer adamw --device cpu --rank 1 4 --out "
                                f"{study.folder}/adapters/x")
    write_json(made.folder / "config.json", {})
    assert made.line() == f"python train.py --resume {made.folder}"
    evaluation = command_of(study, Evaluation(training, "lm", {"limit": 3}))
    assert evaluation.line() == f"python eval.py {made.folder} --suite lm --limit 3"
    assert evaluation.done == made.folder / "eval-lm.json"
    assert "60,000 tokens (the paper: 15M). Seeds: 42." in budget(study, training, "15M")


@pytest.mark.parametrize("model", ["tiny-gemma-2", "gemma-2-2b"])
def test_parts_share_trainings_and_never_mean_two_things_by_one_name(study, model):
    asked = study if model == "tiny-gemma-2" else Study(study.folder, model)
    parts = paper.chosen(None)
    runs = [made for commands, _ in paper.stages(asked, parts) for made in commands]
    assert len({made.done for made in runs}) == len(runs) == len(set(runs))
    order = [made.folder.parent.name + made.script for made in runs if made.script == "train.py"]
    assert order == sorted(order, reverse=True) and runs[-1].script == "eval.py"
    timed = [made for commands, alone in paper.stages(asked, parts) if alone for made in commands]
    assert len(timed) == 24
    for part in parts.values():
        assert part.about(asked)
        for training in part.trainings(asked):
            assert training.options["model"] in PRESETS
            if asked is not study:
                assert tokens_of(training) in (1, 15e6, 100e6, 2e9, 4e9)


# ---- The command ---------------------------------------------------------------------------------

def test_every_figure_and_table_has_a_part(capsys):
    command(PAPER, "--list")
    words = capsys.readouterr().out.replace(",", " ").split()
    figures = [f"fig{number}" for number in (1, *range(3, 12))]         # Figure 2 is the method's
    assert set(figures + [f"table{number}" for number in range(1, 7)]) <= set(words)


def test_a_dry_run_shows_the_commands(capsys, tmp_path):
    words = ["--out", "fig3", "--only", "fig3", "--only=fig4", "--seeds", "1"]
    assert paper.command_for_all(words) == "python -m lorasae.paper --out fig3 --seeds 1"
    command(PAPER, "--dry-run", "--only", "fig9", "--seeds", 1, "--out", tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["one_block", "fig9", "4", "240,000", "0"]
    assert [line.split()[:4] for line in lines[-4:]] == [
        ["python", os.path.relpath(ROOT / "train.py"), "--model", "tiny-gemma-2"]] * 4
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_leave_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert "choose from frontier, fig1" in refusal(PAPER, "--only", "fig2", "--out", out)
    assert "--quick" in refusal(PAPER, "--model", "gemma-2-2b", "--quick", "--out", out)
    for option, value in ("--seeds", 0), ("--seeds", "9" * 30), ("--jobs", 0), (
            "--model", "gpt2"), ("--lora-tokens", "-3"):
        assert option in misuse(capsys, PAPER, option, value)
    for name in "x" * 5000, "x/" * 2500, "new/" + "x" * 300:
        assert "name too long" in refusal(PAPER, "--only", "fig9", "--out", out / name)
    assert not out.exists()


def test_a_study_keeps_its_arguments_and_notes_other_code(study, capsys, tmp_path):
    paper.begin(study)
    paper.begin(study)
    assert capsys.readouterr().err == "" and not study.other_code
    with pytest.raises(ValueError, match="begun with lora_tokens 60000, not 1: pass another --out"):
        paper.begin(replace(study, lora_tokens=1))
    write_json(tmp_path / "study.json", {**read(tmp_path / "study.json"), "sources": "older"})
    paper.begin(study)
    assert "begun with other code" in capsys.readouterr().err and study.other_code


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
    assert "too little memory" in page and gap.ONE_BLOCK.title in page
    assert "Fig. 9: The first block" in shown and "Fig. 6" not in shown
    found = read(study.folder / "numbers" / "one_block.json")
    assert (found["trainings"], found["trained_tokens"], found["seconds"]) == (4, 4000, 4.0)

    monkeypatch.setattr(paper, "run_all", lambda *asked: {})        # the page keeps earlier parts
    assert "several-1-3-seed-0/results.json is missing" in refusal(PAPER, *words[:1], "fig6",
                                                                   *words[2:])
    assert gap.ONE_BLOCK.title in (study.folder / "index.html").read_text()


def test_a_figure_from_its_commands_and_again_after_a_kill(tmp_path):
    words = ["--only", "fig9", "--quick", "--lora-tokens", "1k", "--out", tmp_path, "--jobs", 1]
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
    assert read(tmp_path / "numbers" / "one_block.json")["numbers"] == numbers
    assert all((run / "results.json").stat().st_mtime_ns == before[run] for run in kept)
