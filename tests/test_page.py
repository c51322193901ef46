"""The page of `python -m lorasae.paper`, and the parts about §5 and §6."""
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lorasae.evals import benchmarks, distances
from lorasae.evals.common import Estimate
from lorasae.evals.report import Table
from lorasae.io.files import write_json
from lorasae.paper import downstream, page, why
from lorasae.paper.results import Claim, Part
from lorasae.paper.study import Study

PARTS = (downstream.SAEBENCH, downstream.STEERING, downstream.BENCHMARKS, why.TOKENS, why.DISTANCES)


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path, sae_tokens=400_000, lora_tokens=60_000, seeds=(0, 1, 2), recipe="tuned")


def claim(*means, half=0.1, **more):
    cases = {f"case {i}": Estimate(mean, half, "9 documents") for i, mean in enumerate(means)}
    return Claim("Fig. 3", "<b>bold</b>", "30 & 55 %", cases, **more)


def render(study, claims):
    """(HTML, its text) of a page whose part fig3 is done."""
    table = Table("A table", ["", "x"], [["<script>", 0.12345]], ["a note"])
    fig3 = Part("fig3", "Gap", ("fig3", "fig4"), about=lambda study: "a < b", trainings=None,
                measure=None, tables=lambda numbers: [table], claims=lambda numbers: claims,
                draw=None, caption="Bars: over seeds.")
    parts = {"fig3": fig3, "fig8": fig3._replace(name="fig8"), "fig9": fig3._replace(name="fig9")}
    shown = {"fig3": {"numbers": {}, "trainings": 7, "trained_tokens": 42_000, "seconds": 183.2}}
    failed = {"fig8": "pip install lm-eval"}
    html = page.page(study, parts, shown, failed, "python -m lorasae.paper")
    tree = ElementTree.fromstring(re.sub("<(meta|img|br)[^>]*>", " ", html))
    return html, " ".join(" ".join(tree.itertext()).split())


def test_page_shows_claims_then_parts(study):
    (study.folder / "pictures").mkdir()
    (study.folder / "pictures" / "fig3.png").write_bytes(b"\x89PNG\r\n")
    html, text = render(study, [claim(0.2), claim(-0.3, -0.2, 0.05)])

    assert "<script" not in html and "<b>" not in html
    assert re.findall('src="(.*?)"', html) == ["data:image/png;base64,iVBORw0K"]
    assert set(re.findall('href="(.*?)"', html)) == {"#fig3"}
    assert 'id="fig3"' in html
    for words in [
        "15 % of the SAE's tokens here and 0.75 % there.",
        "2 claims: agrees (1), differs (1). They have 4 cases",
        "about 0.2 of these cases would agree by chance",
        "<b>bold</b> Fig. 3",
        "agrees ours: +0.200 ± 0.100 nats (9 documents) paper: 30 & 55 %",
        "2 of 3 differ, 1 within noise: -0.300 to +0.050 nats paper: 30 & 55 % each case case 0: "
        "-0.300 ± 0.100 nats (9 documents); case 1: -0.200 ± 0.100 nats (9 documents); case 2:",
        "Gap Fig. 3, Fig. 4 a < b Bars: over seeds. A table x <script> 0.1235 a note 7 trainings "
        "on 42,000 tokens, some shared with other parts; 183 seconds · python -m lorasae.paper "
        "--only fig3 Gap Fig. 3, Fig. 4 Left out: pip install lm-eval Gap Fig. 3, Fig. 4 Left "
        "out: not run yet Limits",
    ]:
        assert words in text


def test_page_says_what_is_missing(study):
    write_json(study.folder / "study.json", {"sources": "of another day"})
    html, text = render(replace(study, model="gemma-2-2b", seeds=(0,)), [claim(None, half=None)])
    assert "No picture: pip install matplotlib" in text and "<img" not in html
    assert "an earlier version" in text and "1 seed (" in text and "0.4M" not in text
    assert "<circle" not in html.split('class="claim"')[1]


def test_strip_keeps_the_order_of_its_marks():
    found = page.strip(claim(0.2, 0.6, threshold=0.3, paper_values=(0.55, 0.9), form=".0%"))
    (_, low, x, high), (text, next_low, next_x, _) = found["cases"]
    places = [low, x, found["threshold"], next_low, found["paper"][0], next_x, found["paper"][1]]
    assert places == sorted(places) and (low, places[-1]) == (page.LEFT, page.RIGHT)
    assert high - x == pytest.approx(x - low, abs=0.2)
    assert text == "case 1: 60% ± 10% nats (9 documents)" and found["label"] == "30%"

    (_, low, x, high), = page.strip(claim(0.2, half=None))["cases"]
    assert low == x == high                             # no interval: no whisker

def test_saebench_claims_are_of_table_3():
    row = {"difference": 0.02, "ci90": 0.01}
    numbers = {name: {"seeds": 3, "rows": dict.fromkeys(suite.PAPER, row)}
               for name, suite in downstream.SUITES.items()}
    claims = downstream.SAEBENCH.claims(numbers)
    assert [claim.paper_values[0] for claim in claims] == pytest.approx([0.078, 0.04, 0.028, 0.005])
    assert [claim.verdict for claim in claims] == ["agrees"] * 4
    assert claims[0].cases == {"scr": (0.02, 0.01, "3 seeds of the evaluation")}


def test_steering_has_a_case_for_each_latent():
    rows = []
    for latent, positive, negative, alpha in (3, 0.9, -0.2, 1), (4, 0.4, -2, 2), (5, 0, 0, 0):
        row = {"latent": latent, "alpha_base": 0, "alpha_lora": alpha}
        for side, delta in ("positive", positive), ("negative", negative):
            row[side] = {"d": {"base": [0.0] * 50}, "delta": delta, "ci90": 0.3}
        rows.append(row)
    more, alike = downstream.STEERING.claims({"rows": rows})
    assert more.counts == {"agrees": 2, "no interval": 1}
    assert alike.counts == {"agrees": 1, "differs": 1, "no interval": 1}
    assert alike.cases["latent 4"] == (2, 0.3, "50 texts")


def test_benchmarks_are_paired_by_question(monkeypatch):
    pairs = {"with_sae": [0.02, 0.01, 1200], "without_sae": [-0.02, 0.03, 1200]}
    helps, harmless = downstream.BENCHMARKS.claims({"paired": {"MMLU": pairs, "MC1": pairs}})
    assert helps.verdict == "agrees" and harmless.verdict == "within noise"
    assert helps.cases["MC1"].over == "1,200 questions"
    assert helps.paper_values == pytest.approx([0.016, 0.012, 0.007, 0.003, 0.018, 0.003])

    monkeypatch.setattr(benchmarks, "tables", lambda numbers: [])
    table, = downstream.BENCHMARKS.tables({})
    for start in 0, 1:                                  # with the SAE, and without it
        scores = [score.split(" → ") for row in table.rows[start::2] for score in row[1:]]
        assert [after > before for before, after in scores].count(True) == 15 == len(scores) - 3


def test_loss_by_token_over_seeds_or_over_documents():
    run = {"documents": 31, "improvement": 0.2, "share_worse": 0.4, "from_middle": 0.7,
           "ci90": {"improvement": 0.01, "share_worse": 0.02, "from_middle": 0.1}}
    worse, middle = why.TOKENS.claims([run])
    assert worse.cases["share"] == (0.4, 0.02, "31 documents, one seed")
    runs = [run, {**run, "share_worse": 0.41}, {**run, "improvement": 0}]
    worse, middle = why.TOKENS.claims(runs)
    assert worse.cases["share"].over == "3 seeds" and worse.verdict == "agrees"
    assert middle.verdict == "no interval" and "no improvement" in middle.ours


def test_distances_at_every_block_and_after_the_sae():
    change = {"change": [0, 0.3], "ci90": [0, 0.1], "change_after": 0.2, "ci90_after": 0.05}
    run = {where: dict.fromkeys(distances.MEASURES, change) for where in distances.POSITIONS}
    run |= {"layers": [2, 3], "documents": 31}
    assert [claim.verdict for claim in why.DISTANCES.claims([run])] == ["agrees", "differs"]
    cosines, _ = why.DISTANCES.tables([run])
    assert cosines.rows[1] == ["block 3", "+0.3000 ± 0.1000", "+0.3000 ± 0.1000"]
    assert "± 90 % over 31 documents" in cosines.caption


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_parts_read_evaluations_of_their_trainings(study, part):
    for asked in study, Study(Path("runs/x"), "gemma-2-2b"):
        trainings = part.trainings(asked)
        assert all(evaluation.training in trainings for evaluation in part.evaluations(asked))
        assert "Adapters train with AdamW" in part.about(asked)

    suites = [evaluation.suite for evaluation in part.evaluations(study)]
    for evaluation in part.evaluations(study):
        folder = study.folder / evaluation.training.name
        write_json(folder / f"eval-{evaluation.suite}.json", evaluation.suite)
    found = part.measure(study)
    assert found in (suites, *suites) or list(found.values()) == suites
