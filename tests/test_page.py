"""The page of `python -m lorasae.paper`, and the parts that eval.py's suites measure."""
import re
from dataclasses import replace
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from lorasae.evals import distances, saebench
from lorasae.evals.common import Estimate
from lorasae.evals.report import Table
from lorasae.io.files import write_json
from lorasae.paper import downstream, page
from lorasae.paper.results import PAPER, Claim, Part


def claim(*means, half=0.1, **more):
    cases = {f"case {i}": Estimate(mean, half, "9 documents") for i, mean in enumerate(means)}
    return Claim("Fig. 3", "<b>bold</b>", "30 & 55 %", cases, **more)


@pytest.fixture
def render(study, monkeypatch):
    """(HTML, its text) of a page on which only part fig3 is done, with these claims."""
    def make(*claims, study=study, png=None):
        sections, table = [], Table("A table", ["", "x"], [["<script>", 0.12345]], ["a note"])
        found = {"numbers": {}, "trainings": 7, "trained_tokens": 42_000, "seconds": 183.2,
                 "budget": {"sae_tokens": [], "adapter_tokens": [60_000], "seeds": [0, 1],
                            "optimizer": "adamw", "recipe": "tuned"}}
        for name in "fig3", "fig8", "fig9":
            monkeypatch.setitem(PAPER, name, {
                "title": "Gap", "figures": ["fig3", "fig4"], "about": "a < b",
                "caption": "Bars: over seeds."})
            part = Part(name, jobs=None, measure=None, draw=print, own_tables=None)
            sections.append((part, None, [], None))
        first = sections[0][0]
        sections[0] = first, found, [table], png
        reasons = {"fig8": "pip install lm-eval"}
        html = page.page(study, sections, [(first, claim) for claim in claims], reasons,
                         "python -m lorasae.paper")
        tree = ElementTree.fromstring(re.sub("<(meta|img|br)[^>]*>", " ", html))
        return html, " ".join(" ".join(tree.itertext()).split())
    return make


def test_page_shows_claims_then_parts(study, render):
    html, text = render(claim(0.2), claim(-0.3, -0.2, 0.05), png=b"\x89PNG\r\n")

    assert "<script" not in html and "<b>" not in html
    assert re.findall('src="(.*?)"', html) == ["data:image/png;base64,iVBORw0K"]
    assert set(re.findall('href="(.*?)"', html)) == {"#fig3"}
    assert 'id="fig3"' in html
    for words in ["2 claims: agrees (1), differs (1). They have 4 cases", "<b>bold</b> Fig. 3",
                  "agrees ours: +0.200 ± 0.100 nats (9 documents) paper: 30 & 55 %",
                  "A table x <script> 0.1235 a note 7 training runs on 42,000 tokens",
                  "Left out: pip install lm-eval", "Left out: not run yet"]:
        assert words in text


def test_page_says_what_is_missing(study, render):
    real = replace(study, model="gemma-2-2b", seeds=(0,))
    html, text = render(claim(None, half=None), study=real)
    assert "No picture: pip install matplotlib" in text and "<img" not in html
    assert "Models and token counts are the paper's" in text and "0.4M" not in text
    assert "<circle" not in html.split('class="claim"')[1]


def test_a_claims_marks_are_where_its_values_are(render):
    """Case 0 with its interval, the threshold, case 1 and the paper's two values, in this order."""
    html, _ = render(claim(0.2, 0.6, threshold=0.3, paper_values=(0.55, 0.9), form=".0%"))
    svg = html.split('class="claim"')[1]
    (low, high), (next_low, _) = [map(float, ends) for ends in
                                  re.findall(r'"M(\S+) \d+ H(\S+)"', svg)]
    x, next_x = map(float, re.findall('cx="(.*?)"', svg))
    threshold, = map(float, re.findall('class="threshold" d="M([0-9.]+) ', svg))
    papers = [float(place) for place in re.findall('class="paper" d="M([0-9.]+) ', svg)]
    places = [low, x, threshold, next_low, papers[0], next_x, papers[1]]
    assert places == sorted(places) and (low, places[-1]) == (page.LEFT, page.RIGHT)
    assert high - x == pytest.approx(x - low, abs=0.2) and 'fill="none"' not in svg
    assert "<title>case 1: 60% ± 10% nats (9 documents)</title>" in svg and ">30%</text>" in svg


# ---- What the suites found -----------------------------------------------------------------------

def claims_of(part, cases):
    """{claim: Claim} of a part that found these cases."""
    return dict(zip(part.words["claims"], part.claims({"cases": cases})))


def test_saebench_claims_come_from_table_3():
    row = {"difference": 0.02, "ci90": 0.01}
    papers = {name: saebench.table_6(name) for name in downstream.TABLE_3}
    found = [{"seeds": 3, "rows": dict.fromkeys(paper, row)} for _, paper, _ in papers.values()]
    claims = claims_of(downstream.SAEBENCH, downstream.saebench_cases(found))
    for name, claim in zip(papers, claims.values(), strict=True):
        assert name in claim.says.lower() and claim.verdict == "agrees"
        assert claim.cases == {name: (0.02, 0.01, "3 seeds of the evaluation")}


def test_steering_claims_have_a_case_per_latent():
    rows = []
    for latent, positive, negative, alpha in (3, 0.9, -0.2, 1), (4, 0.4, -2, 2), (5, 0, 0, 0):
        row = {"latent": latent, "alpha_base": 0, "alpha_lora": alpha}
        for side, delta in ("positive", positive), ("negative", negative):
            half = 0.3 if alpha else None               # never steered: all differences are 0
            row[side] = {"d": {"base": [0.0] * 50}, "delta": delta, "ci90": half}
        rows.append(row)
    claims = claims_of(downstream.STEERING, downstream.steering_cases([{"rows": rows}]))
    more, alike = claims["positive"], claims["negative"]
    assert more.counts == {"agrees": 2, "no interval": 1}
    assert alike.counts == {"agrees": 1, "differs": 1, "no interval": 1}
    assert alike.cases["latent 4"] == (2, 0.3, "50 texts")


def test_benchmark_claims_are_paired_by_question():
    pairs = {"with_sae": [0.02, 0.01, 1200], "without_sae": [-0.02, 0.03, 1200]}
    cases = downstream.benchmark_cases([{"paired": {"MMLU": pairs, "MC1": pairs}}])
    claims = claims_of(downstream.BENCHMARKS, cases)
    assert [claim.verdict for claim in claims.values()] == ["agrees", "within noise"]
    assert claims["with_sae"].cases["MC1"].over == "1,200 questions"


def test_token_loss_intervals_are_over_seeds_or_else_over_documents():
    run = {"documents": 31, "improvement": 0.2, "share_worse": 0.4, "from_middle": 0.7,
           "ci90": {"improvement": 0.01, "share_worse": 0.02, "from_middle": 0.1}}
    worse = claims_of(downstream.TOKENS, downstream.token_cases([run]))["share_worse"]
    assert worse.cases["share"] == (0.4, 0.02, "31 documents, one seed")
    runs = [run, {**run, "share_worse": 0.41}, {**run, "improvement": 0}]
    claims = claims_of(downstream.TOKENS, downstream.token_cases(runs))
    worse, middle = claims["share_worse"], claims["from_middle"]
    assert worse.cases["share"].over == "3 seeds" and worse.verdict == "agrees"
    assert middle.verdict == "no interval" and "no improvement" in middle.ours


def test_distance_claims_use_the_mean_over_the_blocks_after_the_sae():
    change = {"change": [0, 0.3], "ci90": [0, 0.1], "change_after": 0.2, "ci90_after": 0.05}
    run = {where: dict.fromkeys(distances.MEASURES, change) for where in distances.POSITIONS}
    run |= {"layers": [2, 3], "documents": 31}
    claims = claims_of(downstream.DISTANCES, downstream.distance_cases([run]))
    assert [claim.verdict for claim in claims.values()] == ["agrees", "differs"]


@pytest.mark.parametrize("model", ["tiny-gemma-2", "gemma-2-2b"])
def test_an_evaluation_part_collects_what_each_job_found(study, model):
    study = replace(study, model=model)
    suite = SimpleNamespace(tables=lambda found: [found])
    seen = downstream.part("saebench", 4 * [suite], downstream.saebench_jobs, cases=len)
    jobs = seen.jobs(study)
    for job in jobs:
        assert job.needs[0].folder == job.folder
        write_json(job.command.done, job.suite)
    numbers = seen.measure(study)
    assert numbers == {"found": ["scr", "tpp", "probing", "absorption"], "cases": 4}
    assert seen.own_tables(numbers) == numbers["found"] and seen.draw is None
