"""The whole paper by one command: parts share trainings, a killed command goes on, words follow figures."""
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest
from filelock import FileLock

from helpers import command, interrupted_after, misuse, random_sae, read, refusal
from lorasae.errors import InputError
from lorasae.io import presets
from lorasae.io.saes import save_sae
from lorasae.paper import (benchmarks, frontier, one_block, plan, saebench, scaling, several,
                           steered, study)
from lorasae.paper.findings import Claim, with_interval
from lorasae.paper.frontier import levels, reached
from lorasae.paper.jobs import Job, Progress, run_all
from lorasae.paper.page import reason
from lorasae.paper.study import MODELS, Models, Study
from lorasae.runs.adapting import Adapting

PAPER = "lorasae.paper.__main__"
ROOT = Path(__file__).parent.parent


# ---- A toy study ---------------------------------------------------------------------------------

@pytest.fixture
def toy(whole_model, text_folder, monkeypatch, tmp_path):
    """Arguments of the command for a study of a toy model, in this process."""
    common = {"data": str(text_folder), "dtype": "float32", "context": 32, "eval_tokens": 256,
              "batch_size": 2}
    preset = presets.Preset(
        str(whole_model), layer=1, sae=str(tmp_path / "saes" / "jumprelu"), common=common,
        lora={"tokens": 640, "rank": (2,), "lr": 1e-2},
        sae_training={"width": 96, "k": 4, "l0": 4})
    for kind in "jumprelu", "topk":
        save_sae(random_sae(kind, 48, k=4), tmp_path / "saes" / kind, model_name="test", layer=1, context=32)
    monkeypatch.setitem(presets.PRESETS, "tiny-toy", preset)
    monkeypatch.setitem(MODELS, "tiny-toy", Models(("tiny-toy",) * 3, "tiny-toy", "tiny-toy", "tiny-toy"))
    monkeypatch.setattr(several, "MINIATURE", ((1,), (0, 2)))
    monkeypatch.setattr(frontier, "TENTHS", (50, 100))
    monkeypatch.setattr("lorasae.paper.__main__.measured_rates", lambda study, jobs, processes: defaultdict(lambda: 1e3))
    return ["--model", "tiny-toy", "--jobs", 1, "--device", "cpu", "--seeds", 2,
            "--sae-tokens", 640, "--frontier-tokens", 1280, "--lora-tokens", 640,
            "--long-tokens", 640, "--eval-tokens", 256, "--out", tmp_path / "out"]


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_parts_from_their_trainings_to_the_page(toy, tmp_path, capsys):
    out = tmp_path / "out"
    command(PAPER, *toy, "--only", "fig6,fig1")
    shown = capsys.readouterr().out
    for text in ("Compound cross-entropy", "faster than e2e", "index.html"):
        assert text in shown
    page = (out / "index.html").read_text()
    assert several.TITLE in page and frontier.TITLE in page
    assert one_block.TITLE not in page and "<script" not in page
    for name in "several", "frontier":
        assert read(out / "numbers" / f"{name}.json")["seconds"] >= 0

    rows = read(out / "numbers" / "several.json")["numbers"]["rows"]
    assert [row["layers"] for row in rows] == [[1], [0, 2]] and all(len(row["ce_adapted"]) == 2 for row in rows)
    curves = read(out / "numbers" / "frontier.json")["numbers"]["fig1"]
    for lora, sae in zip(curves["topk_lora"], curves["topk"]):
        assert lora["seconds"] == pytest.approx(sae["seconds"] + lora["lora_seconds"]) and lora["lora_seconds"] > 0
    made = next(out.glob("saes/*topk-layer-1*"))
    assert curves["topk"][-1]["ce"] == pytest.approx(read(made / "results.json")["ce_sae"], rel=1e-5)

    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*/results.json")}
    # Nothing is trained again, and what was asked is on the page
    command(PAPER, *toy, "--only", "one_block,fig6")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert one_block.TITLE in (out / "index.html").read_text()
    assert "pass another --out" in refusal(PAPER, *toy, "--lora-tokens", 1280, "--only", "fig6")


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_what_cannot_be_done_is_left_out_by_name_and_the_rest_is_there(toy, tmp_path, capsys, monkeypatch):
    def impossible(study):
        raise InputError("no such thing")
    monkeypatch.setattr(one_block, "measure", impossible)
    assert "one_block was left out: no such thing" in refusal(PAPER, *toy, "--only", "fig9,fig6")
    page = (tmp_path / "out" / "index.html").read_text()
    assert "Left out: no such thing" in page and "Compound" in page


def test_mistakes_are_one_line(tmp_path, capsys):
    assert "there is no such part; choose from frontier, fig1" in refusal(PAPER, "--only", "fig2", "--out", tmp_path / "out")
    for option, value in ("--seeds", 0), ("--jobs", 0), ("--model", "gpt2"), ("--lora-tokens", "-3"):
        assert option in misuse(capsys, PAPER, option, value)
    assert not (tmp_path / "out").exists()


def test_every_figure_and_table_of_the_results_has_a_part(capsys, monkeypatch):
    command(PAPER, "--list")
    shown = capsys.readouterr().out.replace(",", " ").split()
    figures = [f"fig{number}" for number in (1, *range(3, 12))]         # Figure 2 is the method's
    assert set(figures + [f"table{number}" for number in range(1, 7)]) <= set(shown)
    real = Study(Path("out"), "gemma-2-2b")
    monkeypatch.setattr(one_block, "blocks_of", lambda study: (12, range(13, 26)))       # as its config.json says
    assert "model_or_sae" not in plan.parts_of(real)
    for part in plan.parts_of(real).values():           # the same parts at real size: the models and SAEs of the paper
        for training in part.trainings(real):
            assert training.given["model"] in presets.PRESETS and training.given["tokens"] is None
            assert plan.tokens_of(training) in (15_000_000, 100_000_000, 2_000_000_000, 4_000_000_000)
    grid, given = scaling.points(real), scaling.trainings(real)[0].given
    assert [point.l0 for point in grid["l0"]] == [22, 41, 82, 176, 445]
    assert [(point.model, point.layer) for point in grid["size"]] == [
        ("gemma-2-2b", 12), ("gemma-2-9b", 20), ("gemma-2-27b", 22)]
    assert (given["rank"], given["layer"], given["sae"]) == (scaling.RANKS, (12,), None)


def test_a_training_is_made_once_and_names_what_makes_its_saes():
    asked = Study(Path("out"), seeds=(0,), sae_tokens=1, lora_tokens=1, long_tokens=1)
    parts = {name: part for name, part in plan.parts_of(asked).items() if name in ("by_token", "by_distance", "saebench")}
    assert len(plan.trainings_of(asked, parts)) == 1
    jobs = plan.jobs_of(asked, parts)
    assert [job.name for job in jobs if job.needs == ()] == ["adapters/tiny-gemma-2-topk-seed-0"]
    assert {f"saebench/{piece}" for piece in saebench.pieces(asked)} <= set(next(job for job in jobs if job.name == "saebench").needs)

    asked = Study(Path("out"), sae_tokens=1)
    sae = study.new_sae(asked, "topk", "tiny-gemma-2", 3, l0=4)
    assert sae.given["k"] == 4 and "l0" not in sae.given and sae.given["layer"] == (3,)
    training = study.adapters(asked, "x", "tiny-gemma-2", [sae, "elsewhere"])
    assert training.needs == (sae.name,) and training.given["sae"] == (str(Path("out") / sae.name), "elsewhere")


# ---- Jobs ----------------------------------------------------------------------------------------

def note(folder, name):
    """A job that tells when it was done; for run_all's own processes, which import this file."""
    print("done", name)
    if name == "bad":
        raise InputError("it cannot be done")
    if name == "broken":
        raise RuntimeError("a mistake of ours")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    with open(folder.folder / "order", "a") as file:
        file.write(f"{name}\n")


def test_jobs_wait_for_what_they_need_and_what_needs_a_failed_one_is_not_tried(tmp_path, capsys):
    jobs = [Job("last", ("a", "b"), {}), Job("after bad", ("bad",), {}), Job("a", (), {}), Job("bad", (), {}), Job("b", ("a",), {}), Job("broken", (), {})]
    failed = run_all(jobs, note, Study(tmp_path), 1, Progress({job.name: 1.0 for job in jobs}, 1))
    assert failed.pop("broken").startswith("RuntimeError: a mistake of ours (") and "Traceback" in (tmp_path / "logs" / "broken.log").read_text()
    assert failed == {"bad": "it cannot be done", "after bad": "it cannot be done"}
    assert (tmp_path / "order").read_text().split() == ["a", "b", "last"]
    shown = capsys.readouterr().out
    assert "done a" in (tmp_path / "logs" / "a.log").read_text() and "done a" not in shown and "100%  [6 of 6]" in shown


def test_a_process_that_is_killed_is_said_in_one_line(tmp_path):
    with pytest.raises(InputError, match="worked on killed was killed"):
        run_all([Job("killed", (), {})], note, Study(tmp_path), 2)


def wait_with_lock(study, name):
    """A job that never ends, and holds a lock meanwhile."""
    with FileLock(study.folder / "lock"):
        (study.folder / "begun").touch()
        time.sleep(600)


def test_a_killed_command_leaves_no_process(tmp_path):
    """Nothing may go on writing into its folders: a lock that an orphan held would be refused."""
    code = (f"import test_paper as t; t.run_all([t.Job('wait', (), {{}})], t.wait_with_lock, "
            f"t.Study(t.Path({str(tmp_path)!r})), 2)")
    running = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT / "tests")
    try:
        begun = time.monotonic()
        while not (tmp_path / "begun").exists():
            assert time.monotonic() - begun < 120 and running.poll() is None
            time.sleep(0.05)
    finally:
        running.kill()
        running.wait()
    with FileLock(tmp_path / "lock", timeout=30):
        pass


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_an_interrupted_command_goes_on_to_the_same_numbers(toy, tmp_path):
    words = [*toy[:-1], tmp_path / "whole", "--only", "fig8,fig11"]
    command(PAPER, *words)
    words[words.index(tmp_path / "whole")] = tmp_path / "cut"
    with interrupted_after(10, Adapting, "step"), pytest.raises(SystemExit):
        command(PAPER, *words)
    assert list((tmp_path / "cut").glob("adapters/*/config.json"))
    command(PAPER, *words)
    for name in "by_token", "by_distance":
        whole, cut = (read(tmp_path / run / "numbers" / f"{name}.json") for run in ("whole", "cut"))
        assert cut["numbers"] == whole["numbers"]


# ---- Words follow figures ------------------------------------------------------------------------

def test_verdicts():
    assert Claim("", "", "", True).verdict == "agrees in direction" and Claim("", "", "", True, True).verdict == "agrees, in size too"
    assert Claim("", "", "", False, True).verdict == "does not agree" and Claim("", "", "", None, True).verdict == "cannot be said"
    assert with_interval([0.5]) == "50.0%" and with_interval([0.4, 0.6]) == "50.0% ± 63.1%"


def test_a_reason_that_holds_in_miniature_is_given_there_alone():
    both = Claim("", "", "", False, why="anywhere", why_in_miniature="here")
    here = both._replace(why="")
    tuned = Study(Path("out"), recipe="tuned")
    assert reason(tuned, both) == "anywhere" and reason(tuned, here) == "here"
    for other in Study(Path("out"), recipe="paper"), Study(Path("out"), "gemma-2-2b"):
        assert reason(other, both) == "anywhere" and reason(other, here) == ""


def test_a_difference_within_its_interval_is_not_claimed():
    for ours, ci90, verdict in ((0.02, 0.03, "cannot be said"), (0.02, None, "cannot be said"),
                                (0.02, 0.01, "agrees in direction"),
                                (-0.02, 0.01, "does not agree")):
        assert saebench.claim("TPP", 0.04, ours, ci90).verdict == verdict
    row = {"sae": (0.5, 0.03), "adapted": (0.6, 0.03), "base": (0.7, 0.03), "lora": (0.71, 0.03)}
    for one, other, word in (("adapted", "sae", "better"), ("lora", "base", "the same"),
                             ("sae", "base", "worse")):
        assert benchmarks.compared(row, one, other) == word


def steered_row(delta, ci90):
    side = {"delta": delta, "ci90": ci90}
    return {"latent": 1, "alpha_base": 1, "alpha_lora": 1, "examples": ["x"], "positive": side,
            "negative": side}


def test_what_has_no_interval_is_neither_drawn_nor_decided_as_zero(capsys):
    """Sizes of one, samples of one, too few documents: each says so, and decides nothing."""
    few = scaled(0.5, 0.4, ci90=None)
    numbers = {"ranks": [64], "l0": few, "width": few, "layer": scaled(0.3, 0.4, 0.3), "size": few}
    unsaid = [claim for claim in scaling.claims(numbers) if claim.direction is None]
    assert len(unsaid) == 3
    assert {claim.why for claim in unsaid} == {"too few documents for an interval: 3"}
    captions = [table.caption for table in scaling.tables(numbers)]
    assert sum("(too few documents for an interval: 3)" in caption for caption in captions) == 3
    assert sum("± 90 % over documents" in caption for caption in captions) == 1

    positive, _ = steered.claims({"rows": [steered_row(0.4, None)]})
    assert positive.ours == "+0.40; beyond its interval for 0 of 1 latents"
    table, = steered.tables({"rows": [steered_row(0.4, None)]})
    assert "±" not in str(table.rows)
    unknown = {setting: (value, None) for setting, value in
               (("sae", 0.5), ("adapted", 0.6), ("base", 0.7), ("lora", 0.7))}
    assert benchmarks.compared(unknown, "adapted", "sae") == "cannot be said"
    assert "6 without a standard error" in benchmarks.counted(["cannot be said"] * 6)

    figures = pytest.importorskip("matplotlib.figure", reason="draws the pictures")
    drawings = {**ALONE, scaling: {**numbers, "layer": few}}
    for part, found in drawings.items():
        figure = figures.Figure()
        part.draw(found, figure)
        bars = [bar for axes in figure.axes for bar in axes.containers]
        drawn = [segment for bar in bars for lines in bar.lines[2] for segment in
                 lines.get_segments()]
        assert bars and not any(len(segment) for segment in drawn)


ALONE = {                                               # one seed each
    several: {"rows": [{"layers": [1], "ce_base": [1], "ce_sae": [2], "ce_adapted": [1.5],
                        "gap_closed": [0.5]}]},
    one_block: {"sae_layer": 2, "blocks": [3], "improvement": {"after": [0.2], "3": [0.1]}},
}


def test_single_blocks_are_held_against_all_after_the_sae():
    numbers = {"sae_layer": 2, "blocks": [3, 4], "improvement": {"after": [0.2, 0.1], "3": [0.18, 0.088], "4": [0.1, 0.05]}}
    first, falls = one_block.claims(numbers)
    assert first.ours.startswith("89.0%") and first.verdict == "agrees, in size too" and falls.verdict == "agrees in direction"
    numbers["improvement"]["4"] = [0.19, 0.1]
    assert one_block.claims(numbers)[1].verdict == "does not agree"
    numbers["improvement"]["after"] = [-0.002, 0.1]     # shares of nothing
    assert [claim.verdict for claim in one_block.claims(numbers)] == ["cannot be said"]


def curve(*points):
    return [{"seconds": seconds, "ce": ce, "percent": 10} for seconds, ce in points]


def test_the_time_to_a_loss_is_on_the_line_between_points_or_at_the_first_point_that_is_there():
    points = curve((10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0))
    assert reached(points, 2.5) == 15 and reached(points, 2.5, between=False) == 20
    assert reached(points, 2.0) == 20 and reached(points, 1.75) == 35 and reached(points, 1.75, between=False) == 40
    assert reached(points, 3.5) == 10 and reached(points, 0.9) is None


POINTS = {"topk": curve((10, 4.0), (20, 3.0)), "e2e": curve((50, 3.0), (150, 2.0)), "topk_lora": curve((12, 2.8), (22, 2.2))}


def test_the_table_of_times_is_from_the_first_loss_of_lora_on_and_claims_follow_it():
    rows = levels(POINTS)
    assert [row["ce"] for row in rows] == pytest.approx([2.8, 2.6, 2.4, 2.2, 2.0])
    assert [row["topk_lora"] for row in rows] == [12, 22, 22, 22, None] and all(row["topk"] is None for row in rows)
    assert [row["e2e"] for row in rows] == pytest.approx([70, 90, 110, 130, 150])
    assert [row["speedup"] for row in rows[:4]] == pytest.approx([70 / 12, 90 / 22, 5, 130 / 22]) and rows[4]["speedup"] is None

    found = {"model": "toy", "levels": rows, **POINTS}
    sooner, ends = frontier.claims({"fig1": found})
    assert sooner.verdict == "agrees, in size too" and sooner.ours == "4.09x to 5.91x"
    assert ends.verdict == "does not agree" and ends.ours.startswith("e2e: 2.0000")        # in Figure 1 it is TopK + LoRA
    late = {**POINTS, "e2e": curve((50, 2.1), (150, 2.0))}
    assert [row["speedup"] for row in levels(late)[:4]] == [None] * 4                      # e2e was there before its first point


def scaled(*shares, ci90=0.01):
    return [{"layer": i, "l0": i, "width": i, "model": str(i), "ce_base": 1.0, "ce_sae": 2.0,
             "documents": 3, "ranks": {"64": {"gap_closed": share, "ci90": ci90,
                                              "improvement": share}}}
            for i, share in enumerate(shares)]


def test_a_trend_within_its_intervals_is_not_claimed():
    falls, level = scaled(0.5, 0.4), scaled(0.41, 0.40)
    numbers = {"ranks": [64], "l0": falls, "width": level, "layer": scaled(0.3, 0.4, 0.3), "size": scaled(0.4, 0.3)}
    assert [claim.direction for claim in scaling.claims(numbers)] == [True, True, True, None, True, False]
    numbers["size"][0]["ranks"]["64"]["gap_closed"] = None
    assert [claim.verdict for claim in scaling.claims(numbers)] == ["cannot be said"]
