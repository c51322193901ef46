"""The configuration: its options, the check of every field, presets, and runs' config.json."""
import json
import math

import pytest

import train
from conftest import GEMMA, write_model
from helpers import misuse, one_line, refuses
from lorasae.beyond.recipe import tuned
from lorasae.errors import InputError
from lorasae.io.files import write_json
from lorasae.io.presets import PAPER, PRESETS
from lorasae.lora import TARGETS
from lorasae.runs.config import (
    BOTH, DEFAULTS, METHODS, OPTIONS, Config, configure, option, read_config, run_of,
    takes_several)


def configured(**given):
    """The Config that train.py makes from these options, by default for the included Gemma-2."""
    return configure({"model": "tiny-gemma-2", "device": "cpu", **given}, train.RECIPES)


def holds(config, fields):
    assert {name: getattr(config, name) for name in fields} == fields


# ---- Defaults ------------------------------------------------------------------------------------

def test_the_defaults_are_the_papers():
    """As in §4 and the released code."""
    paper = dict(
        layer=(12,), rank=(64,), alpha=32, dropout=0.1, data="pile", tokens=15_000_000,
        eval_tokens=1_000_000, context=1024, batch_size=1, lr=5e-5, lr_decay=False,
        weight_decay=0.01, clip=1.0, k=64, auxk=False, seed=42, dtype="bfloat16",
        sae_dtype="float32", optimizer="adamw", targets=TARGETS)
    headline = configured(model="gemma-2-2b")
    for name in ("gemma-2-2b", "gemma-2-9b", "gemma-2-27b", "llama-3.1-8b"):
        assert not PAPER.keys() & (PRESETS[name].lora.keys() | PRESETS[name].common.keys()), name
    holds(Config(), PAPER)
    for config in (Config(), headline):
        holds(config, paper)
    assert (headline.sae, headline.width, headline.l0, headline.adapt) == (
        ("google/gemma-scope-2b-pt-res",), 16384, 82, ())      # a JumpReLU's default: after


def test_options_left_open_follow_from_the_rest():
    config = Config(batch_size=4, context=256, tokens=900_000)
    assert (config.micro_batch, config.compile, config.ahead) == (4, False, 1)
    assert (config.dead_after, config.objective) == (90_000, "kl")
    assert (config.steps, config.tokens_per_step, config.trained_tokens) == (879, 1024, 900_096)
    on_gpu = Config(device="cuda:1", method="finetune")
    assert (on_gpu.compile, on_gpu.ahead, on_gpu.objective) == (True, 8, "balanced")
    assert not Config(device="cuda", method="finetune", site="mlp").compile     # SAE in a block
    assert Config(tokens=2_000_000_000).dead_after == 10_000_000
    assert Config(tokens=5).dead_after == 1
    given = dict(device="cuda", compile=False, ahead=3, micro_batch=1, batch_size=2)
    holds(Config(**given), given)


# ---- Checks --------------------------------------------------------------------------------------

WRONG = {                                               # by the type of an option's values
    str: [True, 3], bool: [0, "yes"], int: [-1, 1.5, math.nan, True, "3", 2 ** 62],
    float: [-1e-9, math.nan, math.inf, 10 ** 400, True, "3"]}
OWN = {                                                 # further wrong values of single options
    "method": ["magic", ""], "dtype": ["int8"], "width": [0], "k": [0],
    "device": ["gpu", "cuda:x", "meta"],
    **dict.fromkeys(["batch_size", "micro_batch", "ahead"], [0, 2 ** 16, 10 ** 9]), "context": [1],
    "tokens": [0], "dropout": [1, 1.5], "l0": [0], "alpha": [0], "layer": [[1], 1, (1, 1), ()],
    "rank": [4, (0,), (4, 4), (), (10 ** 9,)], "adapt": ["after"], "sae": ["a"],
    "targets": ["q_proj", ()], "lr": [0, (1e-3, -1), (1e-3, 1e-3), ()]}


def wrong_values():
    for name, facts in OPTIONS.items():
        own = WRONG[facts["kind"].type]
        if DEFAULTS[name] is not None and name != "lr":
            own = [*own, None]
        values = [(value,) for value in own] if takes_several(name) else own
        yield from ((name, value) for value in [*values, *OWN.get(name, [])])


@pytest.mark.parametrize("name, value", wrong_values(), ids=lambda value: str(value)[:20])
def test_a_value_that_no_run_could_use_is_refused_with_the_name_of_its_option(name, value):
    with one_line() as refused:
        Config(**{name: value})
    assert option(name) in str(refused.value)


@pytest.mark.parametrize("name, values", [
    ("seed", [0, 2 ** 53]), ("dropout", [0, 0.0, 0.999]), ("weight_decay", [0]),
    ("lr", [1e-30, 1, (1e-3, 2e-3)]), ("alpha", [1, 0.5, 10 ** 9]), ("layer", [(0,), (3, 1, 2)]),
    ("rank", [(1,), (256, 1)]), ("context", [2]), ("width", [None, 16384]),
    ("l0", [None, 0.5, 70]), ("targets", [("v_proj",)]), ("device", ["cuda:12"])])
def test_values_at_the_limits_are_accepted(name, values):
    for value in values:
        assert getattr(Config(**{name: value}), name) == value


@pytest.mark.parametrize("given, message", [
    ({"lr": None}, "--lr is None"),
    ({"method": "finetune", "lr": None}, "--lr is None"),
    ({"method": "jumprelu"}, "pass --l0, the active latents to aim for"),
    ({"method": "topk", "layer": (1, 2)}, "--layer 1 2: --method topk trains the SAE of one layer"),
    ({"shard": True, "rank": (1, 4)}, "--shard needs one --rank and one --lr"),
    ({"method": "finetune", "lr": (1, 4)}, "--method finetune needs one --rank and one --lr"),
    ({"train_sae": True, "rank": (1, 4)}, "--method lora --train-sae needs one --rank and")])
def test_options_that_do_not_go_together_are_refused(given, message):
    refuses(message, Config, **given)


# ---- Options left open ---------------------------------------------------------------------------


def test_given_options_override_the_preset_and_the_preset_overrides_the_paper():
    config = configured(lr=0.5, rank=(3,), layer=(1,))
    assert config.sae == ("tiny-gemma-2",)              # by name: the checkout may move
    assert (config.lr, config.rank, config.layer, config.adapt) == (0.5, (3,), (1,), ())
    assert (config.tokens, config.recipe, config.weight_decay) == (700_000, "tuned", 0.01)
    assert configured(sae=("somewhere",)).adapt == ()   # it depends on the SAE's kind
    refuses("--field has no effect with --data stdlib", configured, field="content")


@pytest.mark.parametrize("given, name", [
    ({}, "k"), ({}, "auxk"), ({}, "sae_lr"), ({}, "objective"), ({}, "thresholds"),
    ({"method": "jumprelu"}, "k"), ({"method": "jumprelu"}, "auxk"), ({"method": "topk"}, "l0"),
    ({"method": "topk"}, "rank"), ({"method": "topk"}, "sae"), ({"method": "topk"}, "optimizer"),
    ({"method": "finetune"}, "train_sae"), ({"method": "finetune"}, "recipe"),
    # An SAE's losses are means over a batch: splitting it would change the algorithm.
    *[({"method": method}, "micro_batch") for method in METHODS[1:]],
    *[({"train_sae": True}, name) for name in ("micro_batch", "shard", "objective")]])
def test_an_option_without_effect_is_refused(given, name):
    """tests/test_train.py checks that every other option is read."""
    method = BOTH if "train_sae" in given else given.get("method", "lora")
    with pytest.raises(InputError, match=f"^{option(name)} has no effect with --method {method}"):
        configured(**{**given, name: True})


def test_a_width_is_a_number_of_latents_or_the_name_of_a_power_of_two(capsys):
    known = {"100": 100, "16384": 16384, "16k": 2 ** 14, "65K": 2 ** 16, "131k": 2 ** 17,
             "1m": 2 ** 20}
    assert {width: train.arguments(["--width", width]).width for width in known} == known
    for width in ("", "k", "many", "0k", "1.5k", "²", "²k", "1e4", "1b"):
        line = misuse(capsys, "train", f"--width={width}")
        assert "expected a number of latents, such as 16k, not" in line


def test_the_defaults_for_a_model_without_a_preset_are_printed(tmp_path, capsys):
    model = write_model(tmp_path / "model", {**GEMMA, "max_position_embeddings": 100})
    given = {"model": str(model), "sae": ("sae",)}
    config = configured(**given)
    assert (config.data, config.context, config.tokens) == ("stdlib", 100, 15_000_000)
    said = f"{model} is not a preset; using --data stdlib --context 100"
    assert said in capsys.readouterr().err
    assert configured(**given, data="a", context=500).context == 500    # refused later
    assert capsys.readouterr().err == ""


# ---- Recipes -------------------------------------------------------------------------------------

def test_a_recipe_fills_in_what_is_not_given_and_the_preset_does_the_rest():
    sizes = ((2304, 26), (1024, 26), (1024, 6), (192, 6))               # width, blocks
    assert [tuned(*size)["lr"] for size in sizes] == [6.9e-4, 1e-3, 2.2e-3, 5e-3]
    own = PRESETS["tiny-gemma-2"]
    holds(configured(), tuned(192, 6))
    assert (configured().batch_size, configured().tokens) == (2, own.lora["tokens"])
    holds(configured(recipe="tuned"), tuned(192, 6))
    holds(configured(model="tiny-gemma-2-small", sae=("an SAE",)), tuned(64, 4))
    holds(configured(optimizer="adamw"), tuned(192, 6, "adamw"))
    holds(configured(recipe="paper"), PAPER)
    assert configured(recipe="paper", lr=1e-3).lr == 1e-3

    both = tuned(192, 6, train_sae=True)
    holds(configured(train_sae=True), both)
    assert (both["optimizer"], both["batch_size"]) == ("muon", 1)
    assert configured(recipe="paper", train_sae=True).sae_lr == own.finetune["lr"]
    assert configured(optimizer="adamw", train_sae=True).lr == tuned(192, 6, "adamw")["lr"]
    assert configured(method="finetune", sae=(own.sae,)).lr == own.finetune["lr"]


def test_an_sae_that_trains_is_float32_whatever_the_preset_says_for_frozen_ones():
    assert PRESETS["llama-3.1-8b"].lora["sae_dtype"] == "bfloat16"
    given = {"model": "llama-3.1-8b", "sae": ("an SAE",)}
    alone, both = configured(**given, method="finetune"), configured(**given, train_sae=True)
    assert alone.sae_dtype == both.sae_dtype == "float32"
    assert alone.lr == both.sae_lr == 5e-5 and alone.lr_decay


# ---- Paths, and the run that made an SAE ---------------------------------------------------------

def test_local_files_are_recorded_with_their_full_path(tmp_path, monkeypatch):
    write_model(tmp_path / "model", GEMMA)
    for name in ("sae", "text", "pile"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def config(*words):
        return train.config_of(train.arguments(words))

    found = config(*"--model model --data text --layer 0 1 2 --sae sae ~/sae/ owner/name".split())
    assert found.model == str(tmp_path / "model") and found.data == str(tmp_path / "text")
    assert found.sae == (str(tmp_path / "sae"), str(tmp_path / "sae"), "owner/name")
    assert config("--data", "pile").data == "pile"                      # the name of a known text
    monkeypatch.chdir(tmp_path / "model")               # `--model .` must still give runs a name
    assert config("--model", ".", "--sae", "sae").model == str(tmp_path / "model")
    for name in ("out", "merge", "resume"):
        args = train.arguments([f"--{name}=~/run"])
        assert vars(args) == {name: tmp_path / "run"}


@pytest.fixture
def sae_run(tmp_path):
    """A run folder like those of train.py --method topk."""
    folder = tmp_path / "run"
    config = Config(method="topk", model="tiny-llama-3", layer=(3,), data="pile", field="content",
                    context=64, eval_tokens=999, dtype="float32", lr=1e-3, width=64)
    write_json(folder / "config.json", config.to_json())
    (folder / "metrics.jsonl").write_text("")
    for name in ("sae", "sae-50pct"):
        (folder / name).mkdir()
    return folder


@pytest.mark.parametrize("place", ["", "/", "/sae", "/sae-50pct/", "/sae/sae_weights.safetensors"])
def test_settings_come_from_the_run_that_made_the_sae(sae_run, place, capsys):
    given = {"model": "tiny-llama-3", "sae": (f"{sae_run}{place}",)}
    config = configured(**given)
    assert (config.data, config.field, config.context) == ("pile", "content", 64)
    assert config.eval_tokens == 999 and configured(**given, data="stdlib").field is None
    assert (config.layer, config.dtype, config.tokens) == ((3,), "float32", 600_000)
    assert "from the run that made the SAE" in capsys.readouterr().err
    assert configured(**given, context=32, layer=(1,)).context == 32


def test_other_saes_are_not_mistaken_for_a_runs(sae_run, tmp_path, monkeypatch):
    model = write_model(tmp_path / "model", GEMMA)
    (model / "sae-layer2").mkdir()
    assert run_of(model / "sae-layer2") is None and run_of(model) is None
    assert run_of(sae_run / "sae") == sae_run
    given = {"model": "tiny-llama-3", "sae": (str(model / "sae-layer2"),)}
    assert configured(**given).context == 256           # the preset's
    some = configured(sae=(str(sae_run), "owner/name"), layer=(1, 2))
    assert (some.layer, some.context) == ((1, 2), 256)
    monkeypatch.chdir(sae_run)                          # a preset's or a Hub name is no path in it
    assert run_of("tiny-gemma-2") is None and run_of("owner/name") is None


# ---- config.json ---------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [
    Config(),
    Config(layer=(1, 3), rank=(4, 1), sae=("a", "b"), adapt=("next",), width=16384, l0=70,
           compile=True, field="text", targets=("q_proj", "v_proj")),
    Config(lr=(1e-3, 2e-3)),
    Config(method="jumprelu", width=512, l0=8.5, lr=2e-4)],
    ids=["defaults", "lora", "rates", "sae"])
def test_a_configuration_is_unchanged_when_read_back_from_its_file(config, tmp_path):
    write_json(tmp_path / "config.json", {**config.to_json(), "versions": {"torch": "2.13.0"}})
    assert read_config(tmp_path) == config
    found = json.loads((tmp_path / "config.json").read_text())
    assert found.keys() == {*OPTIONS, "steps", "versions"} and found["steps"] == config.steps


@pytest.mark.parametrize("name", [*OPTIONS, "magic"])
def test_a_file_edited_by_hand_is_refused_with_its_path_and_key(name, tmp_path):
    """A key is missing or new, or its value is null or nonsense."""
    good = Config(width=512, objective="mse").to_json()
    path = tmp_path / "config.json"
    values = [{"a": 1}, [[1]], -math.inf, 10 ** 400]
    values += [] if DEFAULTS.get(name) is None else [None]
    spoilt = [{**good, name: value} for value in values]
    if name in good:
        spoilt.append({key: value for key, value in good.items() if key != name})
    for found in spoilt:
        path.write_text(json.dumps(found))
        with pytest.raises(InputError) as refused:
            read_config(tmp_path)
        line = str(refused.value)
        assert f"{path}" in line and "\n" not in line
        assert option(name) in line or f"'{name}'" in line or f": {name} is" in line


def test_a_gpu_run_continues_on_a_cpu_without_the_compiler(tmp_path):
    write_json(tmp_path / "config.json", Config(device="cuda", compile=True).to_json())
    for device, compiles in ((None, True), ("cuda:1", True), ("cpu", False)):
        config = read_config(tmp_path, device)
        assert (config.device, config.compile) == (device or "cuda", compiles)
        assert config.ahead == 8                        # unchanged: the same groups of steps
    write_json(tmp_path / "config.json", Config(compile=True).to_json())
    assert read_config(tmp_path, "cpu").compile


# ---- The command's options -----------------------------------------------------------------------

def test_only_given_options_reach_the_configuration_and_with_the_right_types():
    assert vars(train.arguments([])) == {}
    given = ("--layer 1 2 --sae a b --width 16k --lr 1e-3 2e-3 --rank 4 --tokens 1.5M --auxk "
             "--no-compile --targets q_proj --dropout 0 --seed 7 --l0 medium").split()
    assert vars(train.arguments(given)) == {
        "layer": [1, 2], "sae": ["a", "b"], "width": 16384, "lr": [1e-3, 2e-3], "rank": [4],
        "tokens": 1_500_000, "auxk": True, "compile": False, "targets": ["q_proj"],
        "dropout": 0.0, "seed": 7, "l0": 60.0}


def test_the_help_states_the_defaults(capsys):
    with pytest.raises(SystemExit):
        train.arguments(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for said in ("tiny-gemma-2", "64", "15M", "1M", "5e-05", "1024", "bfloat16", "42", "0.1"):
        assert f"(default: {said})" in text, said
    assert "(default: None)" not in text and "(default: ())" not in text


def test_the_included_saes_are_made_with_the_settings_a_user_gets():
    from lorasae.tiny.saes import settings
    words = "--model tiny-gemma-2 --method topk --seed 0 --device cpu".split()
    assert settings("gemma-2", "topk") == train.config_of(train.arguments(words))
