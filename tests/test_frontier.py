"""The frontier of §4.2: the arithmetic of its tables, and the whole command on a toy."""
import pytest

from helpers import command, misuse, read, refusal
from lorasae.io import presets
from lorasae.paper import frontier
from lorasae.paper.frontier import levels, reached

FRONTIER = "lorasae.paper.frontier"


def curve(*points):
    return [{"seconds": seconds, "ce": ce} for seconds, ce in points]


def test_the_time_to_a_loss_is_on_the_line_between_points_or_at_the_first_point_that_is_there():
    points = curve((10, 3.0), (20, 2.0), (30, 2.5), (40, 1.0))
    assert reached(points, 2.5) == 15 and reached(points, 2.5, between=False) == 20
    assert reached(points, 2.0) == 20 and reached(points, 1.75) == 35 and reached(points, 1.75, between=False) == 40
    assert reached(points, 3.5) == 10 and reached(points, 0.9) is None


def test_the_table_of_times_goes_from_the_first_loss_of_lora_to_the_best_of_all():
    points = {"topk": curve((10, 4.0), (20, 3.0)), "e2e": curve((50, 3.0), (150, 2.0)), "topk_lora": curve((12, 2.8), (22, 2.2))}
    rows = levels(points)
    assert [row["ce"] for row in rows] == pytest.approx([2.8, 2.6, 2.4, 2.2, 2.0])
    assert [row["topk_lora"] for row in rows] == [12, 22, 22, 22, None] and all(row["topk"] is None for row in rows)
    assert [row["e2e"] for row in rows] == pytest.approx([70, 90, 110, 130, 150])
    assert [row["speedup"] for row in rows[:4]] == pytest.approx([70 / 12, 90 / 22, 5, 130 / 22]) and rows[4]["speedup"] is None


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_the_command_trains_evaluates_and_draws_the_frontier_and_continues_where_it_was(whole_model, text_folder, tmp_path,
                                                                                        monkeypatch, capsys):
    toy = presets.Preset(
        str(whole_model), layer=1, common={"data": str(text_folder), "dtype": "float32", "context": 32, "eval_tokens": 256, "batch_size": 2},
        lora={"adapt": ("all",), "tokens": 640, "rank": (2,), "lr": 1e-2})
    monkeypatch.setitem(presets.PRESETS, "toy", toy)
    words = ["--model", "toy", "--width", 96, "--k", 4, "--tokens", 640, "--device", "cpu", "--out", tmp_path / "out"]
    command(FRONTIER, *words)
    printed, numbers = capsys.readouterr().out, read(tmp_path / "out" / "frontier.json")
    for text in ("TopK + LoRA (s)", "faster than e2e", "original model", "backward passes"):
        assert text in printed
    for name in frontier.CURVES:
        points = numbers[name]
        assert [point["percent"] for point in points] == list(range(10, 101, 10))
        assert all(point["ce"] > 0 for point in points)
    for name in ("topk", "e2e"):
        seconds = [point["seconds"] for point in numbers[name]]
        assert seconds == sorted(seconds) and seconds[0] > 0
    for lora, sae in zip(numbers["topk_lora"], numbers["topk"]):
        assert lora["seconds"] == pytest.approx(sae["seconds"] + lora["lora_seconds"]) and lora["lora_seconds"] > 0
    assert numbers["topk"][-1]["ce"] == pytest.approx(read(tmp_path / "out" / "topk" / "results.json")["ce_sae"], rel=1e-5)
    assert numbers["sae_tokens"] == numbers["lora_tokens"] == 640 and numbers["ce_base"] > 0

    (tmp_path / "out" / "lora-50pct" / "results.json").unlink()
    monkeypatch.setattr("lorasae.dictionary.train", None)          # the SAEs are not trained again
    command(FRONTIER, *words)
    again = read(tmp_path / "out" / "frontier.json")
    assert again["topk"] == numbers["topk"] and again["e2e"] == numbers["e2e"]
    assert [p["seconds"] for p in again["topk_lora"][5:]] == [p["seconds"] for p in numbers["topk_lora"][5:]]

    for option, value in ("--tokens", "1280"), ("--k", "8"), ("--rank", "3"):
        assert "pass another --out" in refusal(FRONTIER, *words, option, value)
    assert read(tmp_path / "out" / "frontier.json") == again


def test_the_picture_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    points = {"topk": curve((10, 4.0), (20, 3.0)), "e2e": curve((50, 3.0), (150, 2.0)), "topk_lora": curve((12, 2.8), (22, 2.2))}
    numbers = {**points, "ce_base": 1.9, "model": "toy", "width": 96, "k": 4}
    frontier.save_figure(frontier.draw, numbers, tmp_path / "frontier.png", "again")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_line(tmp_path, capsys):
    for option, value, message in (("--width", "many", "number of latents"), ("--rank", 0, "positive"), ("--seed", -1, "negative"),
                                   ("--tokens", 2048, "ten steps")):
        assert message in refusal(FRONTIER, "--model", "tiny-gemma-2", option, value, "--device", "cpu", "--out", tmp_path / "out")
    for option, value in (("--tokens", "²"), ("--model", "no-such-model"), ("--k", "many")):
        assert option in misuse(capsys, FRONTIER, option, value, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    line = refusal(FRONTIER, "--model", "tiny-gemma-2", "--data", "no-such-text", "--device", "cpu", "--out", tmp_path / "out")
    assert "no-such-text" in line and list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])
