"""Several adapters in one pass: each ends as if trained alone, and every command accepts it."""
import pytest

from helpers import command, metrics, read, without_costs, words

RANKS = (1, 4, 16)
RATES = (1e-3, 2e-3)


@pytest.mark.parametrize("model, several, alone, more", [
    ("llama", ["--rank", *RANKS], {f"rank-{R}": ["--rank", R] for R in RANKS},
     ["--adapt", "after", "--micro-batch", 1, "--lr-decay"]),
    ("gemma2", ["--lr", *RATES], {f"lr-{lr}": ["--lr", lr] for lr in RATES}, ["--ahead", 8]),
    ("gemma2", ["--rank", 4, 1, "--lr", *RATES],
     {f"rank-{R}-lr-{lr}": ["--rank", R, "--lr", lr] for R in (4, 1) for lr in RATES},
     ["--optimizer", "muon"])],
    ids=["ranks, parts of a batch", "rates", "both"])
def test_each_adapter_equals_the_one_of_a_separate_run(site, tmp_path, model, several, alone, more):
    arguments = words(site, "lora", "--tokens", 256, *more, model=model)
    command("train", *arguments, *several, "--out", tmp_path / "sweep")
    shared, together = read(tmp_path / "sweep/results.json"), metrics(tmp_path / "sweep")
    for name, how in alone.items():
        own, of_sweep = tmp_path / name, tmp_path / "sweep" / name
        command("train", *arguments, *how, "--out", own)
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            found, expected = (folder / "adapter" / file for folder in (of_sweep, own))
            assert found.read_bytes() == expected.read_bytes()
        assert read(of_sweep / "config.json") == read(own / "config.json")
        results = read(of_sweep / "results.json")
        assert without_costs(results) == without_costs(read(own / "results.json"))
        kind, = (key for key in shared if key in ("ranks", "rates", "ranks and rates"))
        assert shared[kind][name.replace("rank-", "").replace("lr-", "")] == results

        short = name.replace("rank-", "r").replace("lr-", "lr")
        for line, of_all in zip(metrics(own), together, strict=True):
            for value in ("step", "tokens"):
                assert line[value] == of_all[value]
            for value in ("kl", "grad_norm"):
                assert line[value] == of_all[f"{value}_{short}"]


