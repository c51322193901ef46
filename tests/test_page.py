"""The page of `python -m lorasae.paper`, and the parts that eval.py's suites measure."""
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from lorasae.evals import distances
from lorasae.evals.common import Estimate
from lorasae.evals.report import Table
from lorasae.io.files import write_json
from lorasae.paper import downstream, page
from lorasae.paper.results import PAPER, Claim, Part
from lorasae.paper.study import Study, around_topk


@pytest.fixture
def study(tmp_path):
    return Study(tmp_path, sae_tokens=400_000, lora_tokens=60_000, seeds=[0, 1, 2])


def claim(*means, half=0.1, **more):
    cases = {f"case {i}": Estimate(mean, half, "9 documents") for i, mean in enumerate(means)}
    return Claim("Fig. 3", "<b>bold</b>", "30 & 55 %", cases, **more)


@pytest.fixture
def render(study, monkeypatch):
    """(HTML, its text) of a page whose part fig3 is done and makes some claims."""
    def make(*claims, study=study):
        parts, table = [], Table("A table", ["", "x"], [["<script>", 0.12345]], ["a note"])
        for name in "fig3", "fig8", "fig9":
            parts.append(Part(name, lambda study: [around_topk(study, 0), around_topk(study, 1)],
                              measure=None, draw=None, own_tables=lambda numbers: [table]))
            monkeypatch.setitem(PAPER, name, {
                "title": "Gap", "figures": ["fig3", "fig4"], "about": "a < b",
                "caption": "Bars: over seeds."})
        monkeypatch.setattr(Part, "claims", lambda part, numbers: claims)
        shown = {"fig3": {"numbers": {}, "trainings": 7, "trained_tokens": 42_000,
                          "seconds": 183.2, "budget": "Adapters train."}}
        reasons = {"fig8": "pip install lm-eval"}
        html = page.page(study, parts, shown, reasons, "python -m lorasae.paper")
        tree = ElementTree.fromstring(re.sub("<(meta|img|br)[^>]*>", " ", html))
        return html, " ".join(" ".join(tree.itertext()).split())
    return make


def test_page_shows_claims_then_parts(study, render):
    (study.folder / "pictures").mkdir()
    (study.folder / "pictures" / "fig3.png").write_bytes(b"\x89PNG\r\n")
    html, text = render(claim(0.2), claim(-0.3, -0.2, 0.05))

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
        "-0.300 ± 0.100 nats (9 documents); case 1: -0.200",
        "a < b Adapters train. Bars: over seeds. A table x <script> 0.1235 a note 7 trainings on "
        "42,000 tokens, some shared with other parts; 183 seconds · python -m lorasae.paper --only",
        "Left out: pip install lm-eval Gap Fig. 3, Fig. 4 Left out: not run yet Limits",
    ]:
        assert words in text


def test_page_says_what_is_missing(study, render):
    real = replace(study, model="gemma-2-2b", seeds=(0,))
    html, text = render(claim(None, half=None), study=real)
    assert "No picture: pip install matplotlib" in text and "<img" not in html
    assert "1 seed (" in text and "0.4M" not in text
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


# ---- What the suites found -----------------------------------------------------------------------

def claims_of(part, cases):
    """{claim: Claim} of a part that found these cases."""
    return dict(zip(part.words["claims"], part.claims({"cases": cases})))


def test_saebench_claims_are_of_table_3():
    row = {"difference": 0.02, "ci90": 0.01}
    found = [{"seeds": 3, "rows": dict.fromkeys(suite.PAPER, row)}
             for suite in downstream.SUITES.values()]
    claims = claims_of(downstream.SAEBENCH, downstream.saebench_cases(found))
    for (name, suite), claim in zip(downstream.SUITES.items(), claims.values(), strict=True):
        lora, base = next(iter(suite.PAPER.values()))
        assert claim.paper_values == [pytest.approx(lora - base)]
        assert claim.paper == (f"{lora - base:+.3f} in one seed; SAEBench's reruns differ by up to "
                               f"{suite.TOLERANCE}")
        assert name in claim.says and claim.verdict == "agrees"
        assert claim.cases == {name: (0.02, 0.01, "3 seeds of the evaluation")}


def test_steering_has_a_case_for_each_latent():
    rows = []
    for latent, positive, negative, alpha in (3, 0.9, -0.2, 1), (4, 0.4, -2, 2), (5, 0, 0, 0):
        row = {"latent": latent, "alpha_base": 0, "alpha_lora": alpha}
        for side, delta in ("positive", positive), ("negative", negative):
            row[side] = {"d": {"base": [0.0] * 50}, "delta": delta, "ci90": 0.3}
        rows.append(row)
    claims = claims_of(downstream.STEERING, downstream.steering_cases({"rows": rows}))
    more, alike = claims["positive"], claims["negative"]
    assert more.counts == {"agrees": 2, "no interval": 1}
    assert alike.counts == {"agrees": 1, "differs": 1, "no interval": 1}
    assert alike.cases["latent 4"] == (2, 0.3, "50 texts")


def test_benchmarks_are_paired_by_question_and_beside_table_5():
    pairs = {"with_sae": [0.02, 0.01, 1200], "without_sae": [-0.02, 0.03, 1200]}
    cases = downstream.benchmark_cases({"paired": {"MMLU": pairs, "MC1": pairs}})
    claims = claims_of(downstream.BENCHMARKS, cases)
    assert [claim.verdict for claim in claims.values()] == ["agrees", "within noise"]
    assert claims["with_sae"].cases["MC1"].over == "1,200 questions"

    table, = downstream.BENCHMARKS.words["tables"]
    for start, claim in enumerate(claims.values()):     # with the SAE, and without it
        scores = [[float(value) for value in score.split(" → ")]
                  for row in table["rows"][start::2] for score in row[1:]]
        assert [after > before for before, after in scores].count(True) == 15 == len(scores) - 3
        changes = [(after - before) / 100 for before, after in scores[:6]]
        assert claim.paper_values == pytest.approx(changes)


def test_loss_by_token_over_seeds_or_over_documents():
    run = {"documents": 31, "improvement": 0.2, "share_worse": 0.4, "from_middle": 0.7,
           "ci90": {"improvement": 0.01, "share_worse": 0.02, "from_middle": 0.1}}
    worse = claims_of(downstream.TOKENS, downstream.token_cases([run]))["share_worse"]
    assert worse.cases["share"] == (0.4, 0.02, "31 documents, one seed")
    runs = [run, {**run, "share_worse": 0.41}, {**run, "improvement": 0}]
    claims = claims_of(downstream.TOKENS, downstream.token_cases(runs))
    worse, middle = claims["share_worse"], claims["from_middle"]
    assert worse.cases["share"].over == "3 seeds" and worse.verdict == "agrees"
    assert middle.verdict == "no interval" and "no improvement" in middle.ours


def test_distances_at_every_block_and_after_the_sae():
    change = {"change": [0, 0.3], "ci90": [0, 0.1], "change_after": 0.2, "ci90_after": 0.05}
    run = {where: dict.fromkeys(distances.MEASURES, change) for where in distances.POSITIONS}
    run |= {"layers": [2, 3], "documents": 31}
    claims = claims_of(downstream.DISTANCES, downstream.distance_cases([run]))
    assert [claim.verdict for claim in claims.values()] == ["agrees", "differs"]


@pytest.mark.parametrize("model", ["tiny-gemma-2", "gemma-2-2b"])
def test_a_part_of_evaluations_takes_what_each_found(study, model):
    study = replace(study, model=model)
    seen = downstream.part("saebench", downstream.saebench_jobs, cases=len, draw=None, tables=len)
    jobs = seen.jobs(study)
    for job in jobs:
        assert job.needs[0].folder == job.folder
        write_json(job.command.done, job.suite)
    numbers = seen.measure(study)
    assert numbers == {"found": list(downstream.SUITES), "cases": 4}
    assert seen.own_tables(numbers) == 4
