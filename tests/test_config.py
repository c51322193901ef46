"""The configuration: one place for its defaults, one check of every field, presets, and the files of runs."""
import json
import math
from dataclasses import FrozenInstanceError, asdict, fields, replace

import pytest

import train
from conftest import write_model
from lorasae.errors import InputError
from lorasae.io.files import write_json
from lorasae.io.presets import PRESETS
from lorasae.runs.config import CHOICES, SWITCHES, Config, option, read_config
from lorasae.runs.defaults import configure, recipe_of, latents

NAMES = [known.name for known in fields(Config)]
EMBEDDED = {"model": "tiny-gemma-2"}


# ---- Defaults --------------------------------------------------------------------------------------------------------

def test_the_defaults_are_the_papers():
    """§4 and the released code: AdamW at 5e-5, rank 64, α 32, 15M tokens of 1024 one at a time, clipped at 1."""
    paper = dict(layer=(12,), rank=(64,), alpha=32, dropout=0.1, data="pile", tokens=15_000_000, eval_tokens=1_000_000, context=1024,
                 batch_size=1, lr=5e-5, lr_decay=False, weight_decay=0.01, clip=1.0, k=64, auxk=False, seed=42, dtype="bfloat16",
                 sae_dtype="float32")
    found = asdict(Config())
    assert {name: found[name] for name in paper} == paper
    headline = asdict(configure({"model": "gemma-2-2b", "device": "cpu"}))
    assert {name: headline[name] for name in paper} == paper
    assert (headline["width"], headline["l0"], headline["sae"], headline["adapt"]) == (
        "16k", 82, ("google/gemma-scope-2b-pt-res",), ("after",))


def test_what_is_left_open_follows_from_the_rest():
    config = Config(batch_size=4, context=256, tokens=900_000)
    assert (config.micro_batch, config.compile, config.ahead, config.dead_after) == (4, False, 1, 90_000)
    assert (config.steps, config.tokens_per_step, config.trained_tokens) == (879, 1024, 879 * 1024)
    on_gpu = Config(device="cuda:1")
    assert (on_gpu.compile, on_gpu.ahead, on_gpu.dead_after) == (True, 8, 1_500_000)
    assert Config(tokens=2_000_000_000).dead_after == 10_000_000 and Config(tokens=5).dead_after == 1
    assert Config(device="cuda", compile=False, ahead=3, micro_batch=1, dead_after=7).to_json() | {"steps": 0} == {
        **asdict(Config()), "device": "cuda", "ahead": 3, "micro_batch": 1, "dead_after": 7, "layer": (12,), "steps": 0}


def test_a_configuration_is_frozen_and_its_changes_are_checked():
    with pytest.raises(FrozenInstanceError):
        Config().lr = 1
    with pytest.raises(InputError, match="--lr is 0"):
        replace(Config(), lr=0)


# ---- Checks ----------------------------------------------------------------------------------------------------------

WRONG = {
    "text": ["", " ", None, 3, ("a",)],
    "whole": [0, -1, 1.5, True, "3", None, math.nan, math.inf, (1,)],
    "positive": [0, -1, -0.5, math.nan, math.inf, -math.inf, True, "3", (1.0,), 10 ** 400],
    "not negative": [-1, -1e-9, math.nan, math.inf, True, "3", None],
    "switch": [0, 1, "yes", (True,)],
    "choice": ["magic", "", None, 3],
    "numbers": [(-1,), (1.5,), (True,), ("3",), (1, 1), [1], 1, None],
    "texts": [("",), (3,), ["a"], "a", None],
    "rates": [0, -1, math.nan, math.inf, True, "3", (1e-3, -1), (1e-3, None), (1e-3, 1e-3), ()],
}
KINDS = {
    **dict.fromkeys(("model", "data", "device"), "text"),
    **dict.fromkeys(("k", "tokens", "eval_tokens", "context", "batch_size", "checkpoint_every", "micro_batch", "ahead", "dead_after"), "whole"),
    **dict.fromkeys(("alpha", "clip", "l0", "sae_lr"), "positive"), **dict.fromkeys(("dropout", "weight_decay", "seed"), "not negative"),
    **dict.fromkeys(SWITCHES, "switch"), **dict.fromkeys(CHOICES, "choice"), "layer": "numbers", "rank": "numbers", "sae": "texts",
    "adapt": "texts", "lr": "rates",
}
OPEN = ("lr", "l0", "micro_batch", "ahead", "dead_after", "compile", "width", "field", "sae_lr", "objective", "checkpoint_every")          # None: not given, or not known yet
MORE_WRONG = {"dropout": [1, 1.5], "seed": [2 ** 63, 10 ** 40, 0.5], "context": [1], "rank": [(0,), ()]}


def test_every_field_has_a_kind():
    assert set(KINDS) | {"width", "field"} == set(NAMES)


@pytest.mark.parametrize("name, value", [(name, value) for name, kind in KINDS.items() for value in WRONG[kind] + MORE_WRONG.get(name, [])],
                         ids=lambda value: str(value)[:20])
def test_a_value_that_no_run_could_use_is_refused_by_the_name_of_its_option(name, value):
    if value is None and name in OPEN:
        return
    with pytest.raises(InputError) as refused:
        Config(**{name: value})
    assert option(name) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name, values", [
    ("seed", [0, 2 ** 63 - 1]), ("dropout", [0, 0.0, 0.999]), ("weight_decay", [0]), ("lr", [1e-30, 1]), ("alpha", [1, 0.5, 10 ** 9]),
    ("layer", [(0,), (3, 1, 2)]), ("rank", [(1,), (256, 1)]), ("context", [2]), ("width", [None, "16k", 16384]), ("l0", [None, 0.5, 70])])
def test_values_at_the_edge_are_taken(name, values):
    for value in values:
        assert getattr(Config(**{name: value}), name) == value


def test_only_a_new_sae_has_a_rate_that_follows_from_its_width():
    assert Config(method="topk", lr=None).lr is None
    for how in {"lr": None}, {"method": "finetune", "lr": None}, {"train_sae": True, "sae_lr": None}:
        with pytest.raises(InputError, match="-lr"):
            Config(**how)


def test_sharding_is_for_adapters_of_one_rank():
    assert Config(shard=True).shard
    for how in ({"rank": (1, 2)}, {"method": "topk"}):
        with pytest.raises(InputError, match="--shard"):
            Config(shard=True, **how)


# ---- Filling in ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("method", ["lora", "topk", "jumprelu", "e2e"])
def test_every_preset_gives_a_configuration_of_every_method(name, method):
    known = PRESETS[name]
    if method == "lora" and known.sae is None:
        with pytest.raises(InputError, match="--method topk"):
            configure({"model": name})
        return
    config = configure({"model": name, "method": method, "device": "cpu"})
    own = known.common | (known.lora if method == "lora" else known.sae_training) | (known.e2e if method == "e2e" else {})
    own.pop("l0", None)
    if "recipe" in own:
        decided = recipe_of(own.pop("recipe"), name, "muon", train_sae=False)
        own = {**decided, **own}
    assert (config.model, config.method, config.layer) == (name, method, (known.layer,))
    assert {field: getattr(config, field) for field in own} == own
    if method == "lora":
        assert (config.sae, config.width, config.l0) == ((known.sae,), known.width, known.l0)
    else:
        assert config.sae == () and (config.l0 is None) == (method != "jumprelu")
        assert config.tokens == own.get("tokens", 2_000_000_000) and config.lr == own.get("lr")


def test_what_is_given_goes_before_the_preset_and_the_preset_before_the_default():
    config = configure({**EMBEDDED, "lr": 0.5, "rank": (3,), "layer": (1,), "adapt": None, "device": "cpu"})
    assert (config.lr, config.rank, config.layer, config.adapt) == (0.5, (3,), (1,), ("after",))
    assert (config.tokens, config.weight_decay) == (700_000, 0.01)


def test_an_sae_of_ones_own_decides_about_the_blocks_itself():
    assert configure({**EMBEDDED, "sae": ("somewhere",), "device": "cpu"}).adapt == ()
    assert configure({**EMBEDDED, "sae": ("somewhere",), "adapt": ("all",), "device": "cpu"}).adapt == ("all",)


@pytest.mark.parametrize("given, name", [
    ({"k": 3}, "--k"), ({"auxk": True}, "--auxk"), ({"dead_after": 5}, "--dead-after"), ({"method": "topk", "rank": (3,)}, "--rank"),
    ({"method": "topk", "l0": 3.0}, "--l0"), ({"method": "jumprelu", "k": 3}, "--k"), ({"method": "e2e", "lr_decay": True}, "--lr-decay"),
    ({"method": "e2e", "adapt": ("all",)}, "--adapt"), ({"method": "topk", "sae_dtype": "float32"}, "--sae-dtype")])
def test_what_changes_nothing_is_refused(given, name):
    with pytest.raises(InputError, match=f"{name} has no effect with --method {given.get('method', 'lora')}"):
        configure({**EMBEDDED, **given})


@pytest.mark.parametrize("width, count", [(100, 100), ("16384", 16384), ("16k", 2 ** 14), ("1M", 2 ** 20), ("131K", 131 * 1024)])
def test_a_width_to_train_is_a_number_of_latents(width, count):
    assert latents(width) == count


@pytest.mark.parametrize("width", ["", "k", "many", "-3", 0, "0k", "1.5k", "²", "²k", "1e4", "١٦"])
def test_a_width_that_is_none_is_refused(width):
    with pytest.raises(InputError, match="number of latents"):
        latents(width)


@pytest.mark.parametrize("raw_config", ["gemma2"], indirect=True)
def test_for_a_model_without_a_preset_it_is_said_what_is_chosen(model_folder, capsys):
    config = configure({"model": str(model_folder), "sae": ("sae",), "device": "cpu"})
    assert (config.data, config.context, config.tokens, config.layer) == ("stdlib", 1024, 15_000_000, (12,))
    said = capsys.readouterr().err
    assert "is no preset, so --data stdlib --tokens 15000000 --eval-tokens 1000000" in said
    configure({"model": str(model_folder), "sae": ("sae",), "data": "a", "tokens": 5, "eval_tokens": 5, "context": 8, "device": "cpu"})
    assert capsys.readouterr().err == ""


def test_the_context_is_at_most_what_an_unknown_model_holds(tmp_path, raw_config, capsys):
    small = str(write_model(tmp_path / "small", {**raw_config, "max_position_embeddings": 100}))
    assert configure({"model": small, "sae": ("sae",), "device": "cpu"}).context == 100
    assert "--context 100" in capsys.readouterr().err
    assert configure({"model": small, "sae": ("sae",), "context": 500, "device": "cpu"}).context == 500      # refused when it is loaded


# ---- Files -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", [
    Config(), Config(layer=(1, 3), rank=(4, 1), sae=("a", "b"), adapt=("next",), width="16k", l0=70, compile=True, field="text"),
    Config(method="jumprelu", width=512, l0=8.5, lr=None, auxk=True, dead_after=3)], ids=["defaults", "lora", "sae"])
def test_a_configuration_comes_back_from_its_file_as_it_was(config, tmp_path):
    write_json(tmp_path / "config.json", {**config.to_json(), "versions": {"torch": "2.13.0"}})
    assert read_config(tmp_path) == config
    found = json.loads((tmp_path / "config.json").read_text())
    assert set(found) == {*NAMES, "steps", "versions"} and found["steps"] == config.steps and found["rank"] == list(config.rank)


EARLIER = {                                             # a config.json that 1b16c44 wrote: rank a number, null where nothing was said
    "model": "tiny-gemma-2", "method": "lora", "layer": [2], "sae": ["lorasae/tiny/gemma-2-sae/jumprelu"], "width": None, "l0": None,
    "llama_scope": "openmoss", "k": None, "auxk": False, "dead_after": None, "rank": 64, "alpha": 32, "dropout": 0.0, "adapt": ["after"],
    "data": "stdlib", "field": None, "tokens": 900000, "eval_tokens": 50000, "context": 256, "batch_size": 4, "micro_batch": 4, "lr": 0.007,
    "lr_decay": True, "weight_decay": 0.01, "clip": 1.0, "seed": 42, "dtype": "float32", "sae_dtype": "float32", "device": "cpu",
    "compile": False, "ahead": 1, "shard": False, "checkpoint_every": 250, "steps": 879, "versions": {"torch": "2.13.0"}}


@pytest.mark.parametrize("change, field, value", [
    ({}, "rank", (64,)), ({"rank": [1, 4]}, "rank", (1, 4)), ({"adapt": None}, "adapt", ()), ({"sae": None}, "sae", ()),
    ({"shard": None}, "shard", False), ({"method": "topk", "lr": None}, "lr", None)])
def test_a_run_of_the_version_before_opens(tmp_path, change, field, value):
    write_json(tmp_path / "config.json", {**EARLIER, **change})
    config = read_config(tmp_path)
    assert getattr(config, field) == value and config.steps == 879 and (config.layer, config.dropout) == ((2,), 0.0)


@pytest.mark.parametrize("change, message", [
    ({"magic": 3}, "has magic, which this version does not know"), ({"lr": -1}, "--lr is -1"), ({"rank": "many"}, "--rank"),
    ({"dtype": "int8"}, "--dtype"), ({"layer": 2}, "--layer"), ({"tokens": "15M"}, "--tokens"), ({"adapt": "after"}, "--adapt")])
def test_a_configuration_that_was_tampered_with_is_one_line_with_its_path(tmp_path, change, message):
    write_json(tmp_path / "config.json", {**EARLIER, **change})
    with pytest.raises(InputError) as refused:
        read_config(tmp_path)
    assert str(tmp_path / "config.json") in str(refused.value) and message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text, message", [("{", "not JSON"), ("[]", "not a JSON object"), ("3", "not a JSON object"),
                                           ('{"model_type": "gemma2"}', "not written by train.py"), (None, "has no config.json")])
def test_what_is_no_configuration_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path)


# ---- The help --------------------------------------------------------------------------------------------------------

def helps(parser_of, monkeypatch, capsys):
    """{field: help text, on one line} of a command's options."""
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr("lorasae.io.console.Parser.parse_args", lambda self, argv: parsers.append(self) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            parser_of([])
    return {action.dest: action.help for action in parsers[0]._actions}


SAID = {                                                # field: how the help writes its default
    "model": Config.model, "method": Config.method, "layer": "paper: 12", "llama_scope": Config.llama_scope, "k": "64, the paper's",
    "rank": "64, the paper's", "alpha": "32 at every rank", "dropout": "0.1, the paper's", "tokens": "the paper's 15M, and 2B for an SAE",
    "eval_tokens": "the paper's 1M", "context": "the paper's 1024", "batch_size": "1, the paper's", "lr": "5e-5 for adapters",
    "lr_decay": "paper: --no-lr-decay", "weight_decay": "0.01", "clip": "1.0", "seed": "42", "dtype": "bfloat16",
    "sae_dtype": "paper: float32", "checkpoint_every": "a minute's", "dead_after": "10M, at most a tenth of the run",
    "ahead": "8 on a GPU, else 1", "compile": "on a GPU", "micro_batch": "the whole batch"}


def value_of(text):
    """The number in a stated default: 15M -> 15000000."""
    word = next(word for word in text.replace(",", " ").split() if word[0].isdigit())
    return float(word.rstrip("MB")) * {"M": 1e6, "B": 1e9}.get(word[-1], 1)


def test_every_default_that_the_help_states_is_the_configurations(monkeypatch, capsys):
    found, config = helps(train.arguments, monkeypatch, capsys), Config()
    for name, said in SAID.items():
        assert said in found[name], f"--help of {name}: {found[name]}"
        value = getattr(config, name)
        value = value[0] if isinstance(value, tuple) else value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("micro_batch", "ahead", "dead_after", "checkpoint_every"):
            assert value_of(said) == value, name
    assert Config(tokens=10 ** 12).dead_after == value_of("10M") and Config(device="cuda").ahead == 8 and config.ahead == 1
    assert configure({"model": "gemma-2-2b", "method": "topk", "device": "cpu"}).tokens == value_of("2B")


def test_every_field_is_an_option_and_every_option_of_a_run_is_a_field(monkeypatch, capsys):
    options = set(helps(train.arguments, monkeypatch, capsys)) - {"help", "out", "resume", "merge", "dry_run", "recipe"}
    assert options == set(NAMES)


def test_the_embedded_saes_are_made_as_a_users_would_be():
    from lorasae.tiny.saes import settings
    assert settings("gemma-2", "topk", 3) == replace(configure({**EMBEDDED, "method": "topk", "seed": 3}), checkpoint_every=10 ** 9)
