"""Figures 1, 3, 4, 5, 6 and 9, and experiments beyond the paper, from finished runs' files."""
from dataclasses import replace

import pytest
import torch

from helpers import command, read
from lorasae.evals.common import ratio
from lorasae.io.files import write_json
from lorasae.paper import __main__ as paper
from lorasae.paper import beyond, control, frontier, gap
from lorasae.paper.study import budget
from lorasae.runs.config import read_config


def in_this_process(commands, processes, logs):
    """run_all without processes: starting them would take most of a test's time."""
    for each in commands:
        if not each.done.exists():
            command(each.script.removesuffix(".py"), *each.to_run())
    return {}


def run_of(documents, base, sae, adapted):
    closed = gap.part_of(sae - adapted, sae - base, documents)
    return gap.Run({}, documents, sae, adapted, sae - base, closed)


def test_a_difference_of_shares_on_the_same_text_is_paired():
    documents = torch.arange(12).repeat_interleave(4)
    zeros = torch.zeros(48, dtype=torch.float64)
    whole, noise = 1 + torch.rand(2, 48, dtype=torch.float64)
    first, second = (run_of(documents, zeros, whole, left * whole + noise) for left in (0.6, 0.7))
    difference = gap.paired(first.gap_closed - second.gap_closed, first, second)
    assert difference == (pytest.approx(0.1), pytest.approx(0, abs=1e-9), "12 documents")
    own = gap.paired(first.gap_closed, first)                       # the noise was in both
    share = ratio(first.sae - first.adapted, first.gap, documents)
    assert own == (*(pytest.approx(value) for value in share), "12 documents") and own.half > 0.01

    moved = second._replace(documents=documents.roll(1))
    with pytest.raises(ValueError, match="did not see the same held-out text"):
        gap.paired(first.gap_closed - moved.gap_closed, first, moved)


def test_a_share_of_nothing_is_undefined():
    documents = torch.arange(10)
    ones = torch.ones(10, dtype=torch.float64)
    noise = torch.linspace(-1, 1.2, 10).double()
    for whole in (-ones, ones * 0, noise):              # noise: above 0 by less than its interval
        found = gap.part_of(ones, whole, documents)
        estimate = gap.paired(found, run_of(documents, ones, ones, ones))
        assert estimate == (None, None, "nothing to divide by")
    few = torch.zeros(10, dtype=torch.int64)            # one document: no interval to be within
    assert gap.part_of(ones, ones * 2, few).mean() == 0.5


def finish(folder, seconds=10.0, **ce):
    """Writes the files of a finished run that has this mean CE in each setting."""
    wave = torch.linspace(-0.5, 0.5, 20).double()       # sequences differ, alike in each setting
    losses = {}
    for name, mean in ce.items():                       # a trace of spread, even in differences
        own = mean + wave * (1 + 1e-9 * mean)
        losses[name] = {"ce": own.tolist(), "kl": [0.0] * 20}
        if name != "base":
            l0 = 9.0 if name == "adapted" else 8.0
            losses[name] |= {"l0": {"2": l0}, "ev": {"2": 0.9}, "left_out": {"2": 0.0}}
    write_json(folder / "sequences.json", {"documents": list(range(20)), **losses})
    write_json(folder / "results.json", {"train_tokens": 1000, "seconds": seconds})


def shown(study, part):
    """Draws a part -> (numbers as read from its file, {claim: Claim}, the text of its tables)"""
    write_json(study.folder / "numbers.json", part.measure(study))
    numbers = read(study.folder / "numbers.json")
    figures = pytest.importorskip("matplotlib.figure", reason="matplotlib draws the pictures")
    part.draw(numbers, figures.Figure())
    text = " ".join(str(table) for table in part.tables(numbers))
    names = [name for name in part.words["claims"] if name in numbers["cases"]]
    return numbers, dict(zip(names, part.claims(numbers), strict=True)), text


def test_scaling_compares_layers_l0s_and_ranks(study):
    for point in gap.points(study):
        share = 0.4 + 0.1 * (point.L0 == "4") + 0.05 * (point.layer == "2")
        folder = gap.adapters_at(study, point).folder
        for rank in (1, 4, 16, 64, 256):
            adapted = 3.0 - share + 0.1 / rank
            finish(folder / f"rank-{rank}", base=2.0, sae=3.0, adapted=adapted)
    numbers, claims, text = shown(study, gap.SCALING)

    assert len(numbers["rows"]) == 16 * 5 and numbers["rows"][0]["x"] == "4"
    assert claims["L0"].cases == {"L0": (pytest.approx(0.1), pytest.approx(0, abs=1e-9),
                                         "20 documents")}
    assert claims["layer"].cases["layer"].mean == pytest.approx(0.05)
    closed, ranks = claims["closed"], claims["ranks"]
    assert len(closed.cases) == len(ranks.cases) == 13 and closed.verdict == "agrees"
    assert all(case.mean == pytest.approx(0.1 - 0.1 / 256) for case in ranks.cases.values())
    assert "gap closed, rank 256" in text and "± 90 % over 20 documents" in text


def test_scaling_on_a_laptop_compares_ranks_around_one_sae(study):
    """Ranks are compared around one SAE, and there are no claims about widths or models."""
    study = replace(study, model="/x/smollm2-135m-instruct")
    for point in gap.points(study):
        ranks, folder = point.ranks, gap.adapters_at(study, point).folder
        for rank in ranks:
            adapted = 2.6 + 0.1 * (point.L0 == "64") + 0.1 / rank
            where = folder / f"rank-{rank}" if len(ranks) > 1 else folder
            finish(where, base=2.0, sae=3.0, adapted=adapted)
    numbers, claims, text = shown(study, gap.SCALING)
    assert claims.keys() == {"closed", "ranks", "L0", "layer"} and "/x/" not in str(numbers)
    assert len(numbers["rows"]) == 8 + 3 * 2 and len(claims["closed"].cases) == 6
    assert list(claims["ranks"].cases.values())[0].mean == pytest.approx(0.1 / 4 - 0.1 / 64)
    assert len(claims["ranks"].cases) == 1 and claims["L0"].cases["L0"].mean == pytest.approx(0.1)
    assert "gap closed, rank 4" in text and "jumprelu" in str(numbers["rows"])


def test_control_compares_lora_with_more_training_and_finetuning(study):
    study = replace(study, model="smollm2-135m-instruct", other_data="other")
    rng = torch.Generator().manual_seed(0)
    documents, noise = list(range(20)), 0.1 * torch.randn(20, generator=rng).double()
    noise -= noise.mean()

    def losses(ce, more=0.0):
        found = {"ce": (ce + noise * (1 + more)).tolist(), "kl": [ce - 2] * 20}
        return {**found, **dict.fromkeys(("l0", "ev", "left_out"), {"2": 8.0})}

    # The SAE costs 1 nat after a tenth, 0.1 less after each further tenth, 0.5 more on other text
    tenths = [{"percent": 10 * i, "seconds": 10.0 * i, "tokens": 1000 * i} for i in range(1, 11)]
    sae = control.long_sae(study)
    write_json(sae.folder / "eval-tenths.json", {"rows": tenths})
    for suites, more in zip(control.texts(study).values(), (0, 0.5)):
        of_adapters, of_sae = suites
        cost = {f"sae-{row['percent']}pct": 3.1 + more - row["percent"] / 100 for row in tenths}
        cost["sae"] = cost.pop("sae-100pct")
        write_json(sae.folder / of_sae / "sequences.json", {
            "documents": documents, **{name: losses(ce) for name, ce in cost.items()}})
        for percent in study.plan.percents:
            for name, job in control.arms(study, percent).items():
                before = cost["sae" if percent == 100 else f"sae-{percent}pct"]
                gap_now = before - 2
                end = before - gap_now * (0.5 if "LoRA" in name else 0.2) * (1 - percent / 200)
                kinds = {"base": losses(2.0), "sae": losses(before, more=0.1)}
                if "LoRA" in name:
                    kinds |= {"adapted": losses(end), "lora": losses(2.01)}
                else:
                    kinds |= {"before": kinds["sae"], "sae": losses(end)}
                write_json(job.folder / of_adapters / "sequences.json",
                           {"documents": documents, **kinds})
                write_json(job.folder / "results.json", {"train_tokens": 500, "seconds": 19.0})
    numbers, claims, text = shown(study, control.CONTROL)

    rows = {(row["axis"], row["x"]): row for row in numbers["rows"]}
    assert len(rows) == 2 * (3 + 3 + 4)                 # after 100 % there is no more training
    more = rows["method, on held-out text", "10 %: more SAE training"]
    assert more["gap_closed"][0] == pytest.approx(0.2)              # 19 s are nearest two tenths
    assert (more["train_tokens"][0], more["seconds"][0]) == (2000, 20)
    lora = rows["method, on other text", "100 %: LoRA on later blocks, seed 1"]
    assert lora["ce_sae"][0] == pytest.approx(2.6) and lora["kl_lora"][0] == pytest.approx(0.01)
    assert lora["gap_closed"][0] == pytest.approx(0.25)
    tuned = rows["method, on held-out text", "10 %: finetuned for KL"]
    assert tuned["gap_closed"][0] == pytest.approx(0.2 * 0.95) and tuned["kl_lora"][0] is None
    beside = {(text, what): difference for text, what, difference in numbers["beside"]}
    less, half, _ = beside["method, on held-out text", "10 %: finetuned for KL"]
    assert less == pytest.approx((0.5 - 0.2) * 0.95) and half > 0 and len(beside) == len(rows) - 6
    falls = claims["falls"].cases["first - last"]
    assert falls.mean == pytest.approx(0.5 * 0.95 - 0.25) and falls.over == "20 documents"
    assert "KL without SAE" in text and "30 to 55 %" in text


def test_several_compares_many_saes_with_single_ones(study):
    for count, blocks in gap.sets(study).items():
        for seed in study.seeds:
            folder = gap.adapters_on(study, blocks, seed).folder
            finish(folder, base=2.0, sae=2.0 + count ** 2, adapted=2.0 + count + seed / 10)
    for block in range(5):
        finish(gap.single(study, block).folder, base=2.0, sae=2.5 + block)
    _, claims, text = shown(study, gap.SEVERAL)

    excess, three = claims["excess"], claims["three"]
    assert excess.cases["5 SAEs"].mean == pytest.approx(25 - (5 * 0.5 + 10))
    assert excess.verdict == "agrees"
    of_three = claims["improvement"].cases["SAEs: 3"]
    assert of_three.mean == pytest.approx(9 - 3.05) and of_three.over == "2 seeds"
    assert three.cases["one - three"].mean == pytest.approx(3 - 5.05)
    assert "8.0', '0.900', '9.0', '7.0" in text


def test_one_block_measures_the_first_blocks_share_of_the_gain(study):
    gains = {"all": 0.2, 1: 0.16, 2: 0.1, 3: 0.02}
    for seed in study.seeds:
        for x, job in gap.adapters_by_block(study, seed).items():
            finish(job.folder, base=2, sae=3, adapted=3 - gains[x] * (1 + seed))
    _, claims, _ = shown(study, gap.ONE_BLOCK)
    share, falls = claims["share"], claims["falls"].cases["first - last"]
    assert share.cases["first block"].mean == pytest.approx(0.8) and share.verdict == "agrees"
    assert falls.mean == pytest.approx(0.14 * 1.5) and falls.over == "2 seeds"
    for job in gap.adapters_by_block(study, 0).values():            # no gain to have a share of
        finish(job.folder, base=2.0, sae=3.0, adapted=3.01)
    assert shown(study, gap.ONE_BLOCK)[1]["share"].verdict == "no interval"


def test_frontier_compares_the_seconds_to_reach_each_loss(study):
    curves = {"topk": lambda i: (10.0 * i, 4 - 0.1 * i), "e2e": lambda i: (50.0 * i, 3.5 - 0.1 * i)}
    for model in frontier.models(study).values():
        for name, job in frontier.tenths(study, model).items():
            points = [curves[name](i) for i in range(1, 11)]
            rows = [{"percent": 10 * i, "seconds": seconds, "ce": ce}
                    for i, (seconds, ce) in enumerate(points, start=1)]
            write_json(job.folder / "eval-tenths.json", {"layer": 2, "rows": rows})
            finish(job.folder, base=2.0, sae=points[-1][1])
        for i, job in enumerate(frontier.adapters_of(study, model).values(), start=1):
            finish(job.folder, base=2.0, sae=3.0, adapted=2.9 - 0.05 * i)
    numbers, claims, text = shown(study, frontier.FRONTIER)

    found = numbers["figures"]["fig1"]
    assert found["curves"]["topk_lora"][4]["seconds"] == 60         # the SAE's 50, the adapters' 10
    assert frontier.reached(found["curves"]["topk_lora"], 2.65) == 60
    assert frontier.reached(found["curves"]["topk_lora"], 2.3) is None
    last = frontier.table_of(found).rows[-1]
    assert last == ["2.5000", "90.0", "-", "500.0", "5.56x"]
    # 500 s / 3.05 is enough for all of TopK + LoRA, which then ends at 2.4 nats, and e2e at 2.5
    sooner = claims["sooner_fig1"]
    assert sooner.cases["tiny-gemma-2"].mean == pytest.approx(0.1) and sooner.verdict == "agrees"
    assert claims["lower_fig1"].verdict == "agrees" and claims["lower_fig5"].verdict == "differs"
    assert "20.01x" in text and "156-213" in text

    for job in frontier.adapters_of(study, "tiny-gemma-2").values():
        finish(job.folder, seconds=400, base=2.0, sae=3.0, adapted=2.4)
    sooner = shown(study, frontier.FRONTIER)[1]["sooner_fig1"]
    assert sooner.verdict == "no interval" and sooner.ours.startswith("no TopK + LoRA")
    assert job.options["tokens"] == 20_000


def test_arms_are_compared_in_pairs_and_the_gap_is_the_original_saes(study):
    closed = {"adapters": 0.3, "SAE": 0.2, "both": 0.4}
    for job in beyond.MODEL_OR_SAE.jobs(study):
        arm = next(arm for arm in closed if f"-{arm}-" in job.folder.name)
        seen = {"base": 2.0, "sae": 3.0, "adapted": 3.0 - closed[arm]}
        if arm != "adapters":                           # the SAE trains too
            seen |= {"before": 3.0, "sae": 3.0 - 0.2}
        if arm == "SAE":
            del seen["adapted"]
        finish(job.folder, **seen)
    numbers, claims, text = shown(study, beyond.MODEL_OR_SAE)

    assert len(numbers["rows"]) == 4 * 3 * 2
    assert claims["adapters"].verdict == claims["both"].verdict == "agrees"
    for name in beyond.cases(study):
        assert claims["adapters"].cases[name].mean == pytest.approx(0.1)
        assert f"Gap closed, by arm: {name}" in text
    assert all(row["ce_sae"][0] == pytest.approx(3) for row in numbers["rows"])
    assert "tiny-llama-3, topk" in text and "30.0%" in text


def test_experiments_beyond_the_paper_run_only_if_they_are_named(
        study, monkeypatch, tmp_path, capsys):
    assert not {"recipe", "model_or_sae"} & {part.name for part in paper.chosen(study, None)}
    one, = paper.chosen(study, "recipe")
    tokens = {job.options["recipe"]: job.options["tokens"] for job in one.jobs(study)}
    assert tokens == {"paper": 300_000, "tuned": 25_000}
    laptop = replace(study, model="/x/smollm2-135m-instruct")
    assert beyond.cases(laptop) == {"smollm2-135m-instruct": (laptop.model, None)}
    assert budget(laptop, beyond.MODEL_OR_SAE) == {
        "sae_tokens": [], "adapter_tokens": [60_000], "seeds": [100, 101], "optimizer": "muon",
        "recipe": "tuned"}

    monkeypatch.setattr(beyond, "cases", lambda study: {"one": ("tiny-gemma-2", None)})
    monkeypatch.setattr(paper, "run_all", in_this_process)
    command("lorasae.paper.__main__", "--only", "model_or_sae", "--quick", "--lora-tokens", "1k",
            "--eval-tokens", "1k", "--device", "cpu", "--out", tmp_path)
    assert "Gap closed, by arm: one" in capsys.readouterr().out
    assert "Adapters train with" not in (tmp_path / "index.html").read_text()
    arms = tmp_path / "arms"
    assert read_config(arms / "model_or_sae-one-both-seed-100").train_sae
    assert read_config(arms / "model_or_sae-one-SAE-seed-100").method == "finetune"
