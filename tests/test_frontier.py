"""The frontier of §4.2: the arithmetic of its tables, and the whole command on a toy."""
import pytest

from lorasae.paper import frontier
from lorasae.io import presets
from lorasae.io.disk import read_json
from lorasae.paper.frontier import levels, reached


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
    monkeypatch.setitem(presets.PRESETS, "toy", presets.Preset(str(whole_model), layer=1, adapt="all", data=str(text_folder), dtype="float32",
                                                       context=32, tokens=640, eval_tokens=256, batch_size=2, rank=2, lr=1e-2))
    words = ["--model", "toy", "--width", "96", "--k", "4", "--tokens", "640", "--device", "cpu", "--out", str(tmp_path / "out")]
    frontier.main(words)
    printed, numbers = capsys.readouterr().out, read_json(tmp_path / "out" / "frontier.json")
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
    assert numbers["topk"][-1]["ce"] == pytest.approx(read_json(tmp_path / "out" / "topk" / "results.json")["ce_sae"], rel=1e-5)
    assert numbers["sae_tokens"] == numbers["lora_tokens"] == 640 and numbers["ce_base"] > 0

    (tmp_path / "out" / "lora-50pct" / "results.json").unlink()
    monkeypatch.setattr("lorasae.dictionary.train", None)          # the SAEs are not trained again
    frontier.main(words)
    again = read_json(tmp_path / "out" / "frontier.json")
    assert again["topk"] == numbers["topk"] and again["e2e"] == numbers["e2e"]
    assert [p["seconds"] for p in again["topk_lora"][5:]] == [p["seconds"] for p in numbers["topk_lora"][5:]]

    for option, value in ("--tokens", "1280"), ("--k", "8"), ("--rank", "3"):
        with pytest.raises(SystemExit, match="pass another --out"):
            frontier.main(words + [option, value])
    assert read_json(tmp_path / "out" / "frontier.json") == again


def test_the_picture_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib", reason="the picture needs matplotlib")
    points = {"topk": curve((10, 4.0), (20, 3.0)), "e2e": curve((50, 3.0), (150, 2.0)), "topk_lora": curve((12, 2.8), (22, 2.2))}
    numbers = {**points, "ce_base": 1.9, "model": "toy", "width": 96, "k": 4}
    frontier.save_figure(frontier.draw, numbers, tmp_path / "frontier.png", "again")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        frontier.main(["--model", "tiny-gemma-2", "--width", "many", "--out", str(tmp_path / "out")])
    assert "number of latents" in str(stop.value) and not (tmp_path / "out").exists()
    for option, value, message in ("--rank", "0", "positive"), ("--seed", "-1", "negative"), ("--tokens", "2048", "ten steps"):
        with pytest.raises(SystemExit, match=message):
            frontier.main(["--model", "tiny-gemma-2", option, value, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
