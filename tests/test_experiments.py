"""The experiments beyond the paper: their commands, and what they make of finished runs."""
import pytest

from helpers import read
from lorasae.beyond import experiments
from lorasae.evals.report import save_figure
from lorasae.io.files import write_json
from lorasae.runs.config import read_config


def finish(made, closed_by):
    """Writes the results of every run; closed_by(case, arm, seed): its part of the KL gap."""
    for (case, arm, seed), command in made.items():
        write_json(command.done, {
            "train_tokens": 100, "seconds": 2.0, "l0": {"2": 8.0},
            "kl_gap_closed": closed_by(case, arm, seed)})


def test_arms_are_paired_by_seed_within_a_case(tmp_path):
    """Seeds differ by far more than arms: only pairs show it. A single seed has no interval."""
    arms = experiments.recipe(1200)
    gain = {"published": 0.0, "tuned": 0.01, "tuned, AdamW": -0.02}

    def closed_by(case, arm, seed):
        return 0.1 * (seed % 5) + gain[arm] + 1e-4 * (seed % 2)

    made = experiments.commands(arms, tmp_path, range(100, 106), 2000)
    assert len(made) == 4 * 3 * 6
    finish(made, closed_by)
    numbers = experiments.measure(made)
    for case in experiments.cases():
        mean, half, over = numbers[case]["tuned"]["more"]
        assert (mean, over) == (pytest.approx(0.01), "6 seeds") and half < 1e-9
        assert numbers[case]["tuned"]["kl_gap_closed"].half > 0.05

    save_figure(experiments.draw, numbers, tmp_path / "picture.png", "again")
    shown = "".join(map(str, experiments.tables(numbers)))
    assert "+1.0%" in shown and "-2.0%" in shown
    alone = experiments.commands(arms, tmp_path, [100], 2000)
    assert experiments.measure(alone)[case]["tuned"]["more"].half is None


def test_the_command_trains_by_train_py_and_refuses_another_plan(tmp_path, monkeypatch, capsys):
    case, words = next(iter(experiments.cases().items()))
    monkeypatch.setattr(experiments, "cases", lambda: {case: words})
    options = ["model-or-sae", "--seeds", "1", "--eval-tokens", "1500", "--out", str(tmp_path)]
    experiments.main([*options, "--tokens", "1000"])
    err = capsys.readouterr().err
    assert not err or err.startswith("no picture: pip install matplotlib")
    assert read(tmp_path / "numbers.json")[case].keys() == {"adapters", "SAE", "both"}
    assert read_config(tmp_path / case / "both-seed-100").train_sae
    assert read_config(tmp_path / case / "SAE-seed-100").method == "finetune"
    with pytest.raises(SystemExit, match="was begun with"):
        experiments.main([*options, "--tokens", "2000"])
