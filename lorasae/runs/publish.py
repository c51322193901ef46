"""Publishes a finished run on the Hugging Face Hub, with a model card.

    python train.py --publish RUN_DIR OWNER/NAME        uploads it, in one commit
    python train.py --card RUN_DIR                      prints the card

The repository gets what others need to use the run, and a record of its results:

    README.md                   the card, made from card.md
    adapter_config.json         the adapters in PEFT's format, with adapter_model.safetensors; in
                                rank-R/, lr-X/ or rank-R-lr-X/ if there are several
    sae/                        the SAE in SAELens's format, if the run trained it
    run/                        config.json and results.json

All files use public names for the base model, its SAEs and the text, never local paths.
"""
import json
import math
import os
import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HTTPError
from jinja2 import StrictUndefined, Template

from lorasae.errors import InputError
from lorasae.evals.report import percent, with_interval
from lorasae.io.files import damage, first_line, local, read_object
from lorasae.io.hub import explained
from lorasae.io.presets import PRESETS, preset
from lorasae.io.saes import describe
from lorasae.runs.adapting import adapter_names
from lorasae.runs.config import check_effect, read_config
from lorasae.runs.setting import runs_in, sae_sources


def publish(folder, repo, names):
    """Uploads a finished run to a repository on the Hub, which is created if it does not exist.

    names: see `public`. Raises InputError if the Hub refuses.
    """
    found = files(local(folder), repo, names)
    operations = [CommitOperationAdd(path, content) for path, content in found.items()]
    try:
        url = HfApi().create_repo(repo, exist_ok=True)
        HfApi().create_commit(repo, operations, commit_message="Upload a run of lorasae")
    except (HTTPError, ValueError) as error:
        raise InputError(f"could not publish {repo} ({first_line(error)}): log in with `hf auth "
                         "login`, with a token that may write there") from error
    print(f"{url} now contains {', '.join(found)}")


def files(folder, repo, names):
    """{path in the repository: bytes, or a local file} for a finished run."""
    readme = str(card(folder, repo, names)).encode()
    config = public(read_config(folder), names)
    found = {
        "README.md": readme,
        "run/config.json": changed(folder / "config.json", config.to_json()),
        "run/results.json": folder / "results.json",
    }
    for path in (*folder.rglob("adapter/*"), *folder.glob("sae/*")):
        place = path.relative_to(folder).as_posix().replace("adapter/", "")
        found[place] = path
        if path.name == "adapter_config.json":
            found[place] = changed(path, {"base_model_name_or_path": config.model})
        if path.name == "cfg.json":
            about = read_object(path).take("metadata", dict)
            found[place] = changed(path, {"metadata": {**about, "model_name": config.model}})
    return found


def changed(path, values):
    """The bytes of a JSON file with some values replaced."""
    return json.dumps({**read_object(path), **values}, indent=2).encode()


def public(config, names):
    """A run's Config with public names for the model, its SAEs and the text.

    names: {"model": OWNER/NAME, "sae": (OWNER/NAME[/FOLDER], ...)}; the run gives missing ones.
    """
    known, text = preset(config.model), config.data
    names = {
        "model": known.repo if known else config.model,
        "sae": tuple(PRESETS[sae].sae if sae in PRESETS else sae for sae in config.sae),
        "data": Path(text).name if os.path.isabs(text) else text,
        **names,
    }
    return replace(config, **names)


def card(folder, repo, names):
    """The ModelCard of a finished run, to be published as `repo`. names: see `public`.

    Raises InputError if the model or an SAE is known only as a local folder.
    """
    runs_in(folder)                                     # InputError if it is not finished
    own = read_config(folder)
    check_effect(names, own.mode)
    config = public(own, names)
    for name in (repo, config.model, *config.sae):
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)+", name):
            raise InputError(f"{name} is not OWNER/NAME on the Hub, where the repository needs a "
                             "name, and so do the model (--model) and its SAE (--sae)")
    results = {name: read_object(folder / name / "results.json") for name in adapter_names(own)}

    # The kinds and sizes of the SAEs.
    sources = sae_sources(own, math.inf)
    if own.trains_sae:
        sources = [(own.layer[0], folder / "sae")]
    saes = {layer: describe(source, **own.which(layer)) for layer, source in sources}

    template = Template(Path(__file__).with_name("card.md").read_text(encoding="utf-8"),
                        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    adapters = [read_object(path) for path in folder.rglob("adapter_config.json")]
    with damage(f"the results of {folder}"):
        return ModelCard(template.render(
            repo=repo, config=config, licence=licence_of(own.model, config.model), saes=saes,
            sources=dict(sae_sources(config, math.inf)), results=results, adapters=adapters,
            percent=percent, with_interval=with_interval))


def licence_of(model, name):
    """A base model's licence, from its preset or from the Hub's page of `name`."""
    known = preset(model) or preset(name)
    if known is not None:
        return known.licence
    with explained(name):
        return (HfApi().model_info(name).card_data or {}).get("license")
