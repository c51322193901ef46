"""Names -> files: presets, local folders, and repositories on the Hugging Face Hub (paper §4).

huggingface_hub fetches the files, with its cache, login and progress bar, and respects HF_HOME and
HF_HUB_OFFLINE. Only files that are needed are fetched: `train.py --model gemma-2-2b --dry-run`
lists them with their sizes. If the Hub is out of reach, cached files are used.
"""
import os
import re
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError)
from huggingface_hub.utils import filter_repo_objects

from lorasae.errors import InputError
from lorasae.io.console import note
from lorasae.io.files import local
from lorasae.io.presets import PRESETS, latents, preset
from lorasae.io.sae_readers import FORMATS

PAPER_L0 = 70       # among several L0s, the paper uses the one nearest to this
BESIDE_WEIGHTS = (                                              # what a tokenizer may need
    "tokenizer.*", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.*", "merges.txt", "*.jinja", "chat_template.json", "generation_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors")
MODEL_FILES = ("config.json", *BESIDE_WEIGHTS, *WEIGHTS)        # no .bin: opening one can run code

NAMELESS = ("gemma_scope", "sparsify")                          # their files state no site or layer
MAY_LACK = {"gemma_scope_2": ("config.json",)}                  # files that only some folders have
FACTS = {                                                       # patterns for a folder's name
    "layer": re.compile(r".*(?:layers?[._]|blocks\.|-L)(\d+)"),
    "width": re.compile(r".*width_(\d+[km])"),
    "l0": re.compile(r".*_l0_(\d+|small$|medium$|big$)"),
}
LEVELS = {"small": 20, "medium": 60, "big": 150}                # roughly Gemma Scope 2's targets
# Which activations an SAE reads, by the name of its repository or folder. Other SAEs state it in
# their files, or read a block's output.
SITE_NAMES = {
    "resid": re.compile(r"/resid_post(_all)?/"),
    "mlp": re.compile(
        r"/layers\.\d+\.mlp/|/gemma-scope-\w+-\w+-mlp/|/mlp_out(_all)?/"
        r"|/Llama3_1-8B-Base-L(X|\d+)M-"),
    "other": re.compile(
        r"/layers\.\d+\.(self_)?att\w*/|/gemma-scope-\w+-\w+-(att|transcoders)/"
        r"|/(attn_out|transcoder|crosscoder|clt)(_all)?/|/embedding/|/embed_tokens/"
        r"|/Llama3_1-8B-Base-L(X|\d+)(A|TC)-"),
}


class OutOfReach(InputError):
    """The Hub cannot be reached, or is down, and the cache does not have the files."""


class Fetch(NamedTuple):
    """A file to read from the Hub. Its size is approximate if the Hub is out of reach."""
    repo: str
    path: str
    bytes: int
    cached: bool


def local_or_hub(name, what):
    """-> a local Path, or the string OWNER/NAME[/FOLDER] for the Hub"""
    path = local(name)
    if os.path.exists(path):
        return path
    on_hub = str(name).rstrip("/")
    if re.match(r"\w[\w.-]*/\w", on_hub):
        return on_hub
    raise InputError(
        f"there is no {what} {name}: expected a preset ({', '.join(PRESETS)}), a local folder, or "
        "OWNER/NAME on the Hub")


# ---- Models --------------------------------------------------------------------------------------

def model_place(name):
    """-> a local Path, or the name of a Hub repository"""
    known = PRESETS.get(str(name))
    return local_or_hub(known.repo if known else name, "model")


def model_files(name_or_dir, patterns=MODEL_FILES):
    """A local folder with config.json, *.safetensors and tokenizer.json, fetched if need be.

    name_or_dir: a preset, a local folder, or OWNER/NAME on the Hub, tried in this order.
    """
    place = model_place(name_or_dir)
    if isinstance(place, Path):
        return place
    folder = fetch(place, patterns)
    if patterns is MODEL_FILES and not any(folder.glob("*.safetensors")):
        raise OutOfReach(f"{place} has no *.safetensors in the cache {constants.HF_HUB_CACHE}, nor "
                         "on the Hub if it could be reached: fetch it once while online (pickled "
                         "weights are never opened)")
    return folder


def model_plan(name_or_dir):
    """A Fetch for each file that model_files reads from the Hub; [] for a local folder.

    If the Hub is out of reach, the preset gives the size of weights that are not cached.
    """
    place = model_place(name_or_dir)
    if isinstance(place, Path):
        return []
    known = preset(name_or_dir)
    try:
        sizes = listing(place)
    except OutOfReach:
        if known is None:
            raise
        sizes = {}

    read = {path: sizes[path] for path in filter_repo_objects(sizes, allow_patterns=MODEL_FILES)}
    if known is not None and not any(path.endswith(".safetensors") for path in read):
        read["*.safetensors"] = known.weights
    return plan(place, read)


# ---- SAEs ----------------------------------------------------------------------------------------

class SAEFiles(NamedTuple):
    """The files of one SAE, in a local folder or a Hub repository."""
    kind: str                                           # a key of FORMATS
    place: Path | str                                   # a local folder, or a Hub repository
    folder: str                                         # the SAE's own, inside `place`
    files: dict                                         # {path: bytes}

    def fetch(self):
        """The local folder of these files, fetched if need be."""
        return fetch(self.place, list(self.files)) / self.folder


def sae_choice(model, *, layer=None, width=None, l0=None):
    """-> (source, {layer, width, l0}): a preset's public SAE. Arguments override its choice.

    The width comes back as a number of latents. The preset's L0 holds only for its layer and width.
    """
    known = preset(model)
    if known is None:
        raise InputError(f"{model} is not a preset, so it has no default SAE: pass one with --sae")
    if known.sae is None:
        raise InputError(
            f"{model} has no default SAE: pass --sae, or train one with `python train.py --model "
            f"{model} --method topk --out RUN_DIR`, then pass --sae RUN_DIR")

    layer = known.layer if layer is None else layer
    own, width = (each and latents(each) for each in (known.width, width or known.width))
    if l0 is None and (layer, width) == (known.layer, own):
        l0 = known.l0
    return known.sae, {"layer": layer, "width": width, "l0": l0}


def find_sae(source, *, layer=None, width=None, l0=None, site="resid"):
    """The SAEFiles of one SAE that reads this site.

    source: a preset, a local folder or a file in it, a run's folder, or OWNER/NAME[/FOLDER] on the
    Hub. If it has several SAEs, layer, width ("16k" or 16384) and l0 (a number, or small, medium,
    big) choose among them. Without l0, the one nearest to PAPER_L0 is used, with a note.
    """
    wanted = {"layer": layer, "width": width, "l0": l0}
    if str(source) in PRESETS:
        source, wanted = sae_choice(source, **wanted)
    place, inside = local_or_hub(source, "SAE"), ""

    # List all files.
    if isinstance(place, str):
        owner, name, *folders = place.split("/")
        place, inside = f"{owner}/{name}", "".join(f"{folder}/" for folder in folders)
        sizes = listing(place)
    else:
        place = place.parent if place.is_file() else place
        if (place / "sae").is_dir():
            place = place / "sae"                       # a run keeps its SAE there
        elif (place / "metrics.jsonl").exists():
            raise InputError(f"{source} is a run without an SAE in sae/: finish it with python "
                             f"train.py --resume {quote(str(place))} if it trains one, or name "
                             f"one such as {place}/sae-50pct")
        sizes = sizes_in(place)

    # Find the SAEs among them and choose the one that is wanted.
    found = saes_among(place, sizes, inside)
    if not found:
        formats = (f"{' + '.join(files)} ({name})" for name, (_, files) in FORMATS.items())
        raise InputError(
            f"{source} contains no SAE in a known format: expected {'; '.join(formats)}")
    return choose(found, source, {"site": site, **wanted})


def path_of(sae):
    """The part of an SAE's path that describes it: "/OWNER/NAME/FOLDER/", or a local path's end."""
    place = sae.place.absolute() if isinstance(sae.place, Path) else sae.place
    names = PurePosixPath(place, sae.folder).parts[-5:]
    return f"/{'/'.join(names)}/"


def sae_plan(source, **which):
    """A Fetch for each file of one SAE that is read from the Hub; [] for a local source.

    If the Hub is out of reach, a single Fetch with the size from the preset stands in for them.
    """
    try:
        sae = find_sae(source, **which)
    except OutOfReach:
        for name, known in PRESETS.items():
            if source in (name, known.sae):
                M, size = known.sae_size(which.get("width"))
                return plan(known.sae, {f"an SAE of {M:,} latents": size})
        raise
    return plan(sae.place, sae.files) if isinstance(sae.place, str) else []


def saes_among(place, sizes, inside):
    """The SAEFiles of every complete SAE, in any format, whose path begins with `inside`."""
    found = []
    for kind, (_, names) in FORMATS.items():
        for path in sizes:
            if path.startswith(inside) and PurePosixPath(path).match(names[0]):
                folder = path.removesuffix(names[0])    # "" or "some/folder/"
                parts = [folder + name for name in (*names, *MAY_LACK.get(kind, ()))]
                files = {part: sizes[part] for part in parts if part in sizes}
                if all(folder + name in files for name in names):
                    found.append(SAEFiles(kind, place, folder.rstrip("/"), files))
    return found


def choose(found, source, wanted):
    """The SAEFiles that match wanted {site, layer, width, l0}, as far as their paths state them."""
    for fact, value in wanted.items():
        said = [said_by(sae, fact, wanted) for sae in found]
        offered = {each for each in said if each}
        if offered:
            name = pick(fact, value, offered, source)
            found = [sae for sae, its in zip(found, said) if its == name]
        elif fact == "l0" and value is not None:
            of_run = Path(found[0].place, found[0].folder, "training.json")     # which had a target
            if not of_run.exists():
                raise InputError(f"{source} does not state its L0: leave out --l0")

    # Gemma Scope 2 has many SAEs at four layers and, in ..._all folders, a few at every layer.
    found = [sae for sae in found if "_all/" not in sae.folder] or found
    if len(found) > 1:
        some = ", ".join(f"{sae.folder or '.'} ({sae.kind})" for sae in found[:8])
        raise InputError(
            f"{source} offers several SAEs that fit: {some}; name a folder that contains "
            "only one of them")
    return found[0]


def said_by(sae, fact, wanted):
    """The value of a fact (a key of `wanted`) that an SAE's path states, or None.

    If the path does not state the site, the reader checks the file against the wanted one. Files of
    NAMELESS formats do not state it either: such an SAE reads a block's output.
    """
    if fact == "site":
        # SAELens's cfg.json states it too, so only folders inside the source decide.
        path = f"/{sae.folder}/" if sae.kind == "sae_lens" else path_of(sae)
        for site, pattern in SITE_NAMES.items():
            if pattern.search(path):
                return site
        return "resid" if sae.kind in NAMELESS else wanted["site"]
    match = FACTS[fact].match(path_of(sae) if sae.kind in NAMELESS else sae.folder)
    return match and match[1]


def pick(fact, value, offered, source):
    """The offered name that is wanted, or else the only one; for an L0, the nearest one."""
    offered = sorted(offered, key=lambda value: (len(value), value))
    offer = f"{source} offers {fact} {', '.join(offered)}"
    if fact == "l0":
        near = PAPER_L0 if value is None else LEVELS.get(value, value)
        about = {name: LEVELS.get(name) or int(name) for name in offered}
        name = min(offered, key=lambda name: abs(about[name] - near))
        if value is not None and about[name] != near and name not in LEVELS:
            raise InputError(f"{offer}, but not {near:g}: choose another --l0, or another SAE")
        if about[name] != near and len(offered) > 1:
            note(f"{offer}: taking {name}, the nearest to {near:g}")
        return name
    number = str if fact == "site" else latents         # "16k" is 16384
    names = [name for name in offered if value is None or number(name) == number(value)]
    if not names:
        kept = "; keep the folder's name on the Hub, such as layers.12.mlp" * (fact == "site")
        raise InputError(f"{offer}, but not {value}: choose another --{fact}, or another SAE{kept}")
    if len(names) > 1:
        raise InputError(f"{offer}: choose with --{fact}")
    return names[0]


# ---- The Hub -------------------------------------------------------------------------------------

def fetch(place, patterns):
    """A local folder itself, or a repository's snapshot with the files that match the patterns."""
    if isinstance(place, Path):
        return place
    with explained(place):
        return Path(snapshot_download(place, allow_patterns=patterns))


def listing(repo):
    """{path: bytes} of a Hub repository, or of its cached files if the Hub is out of reach."""
    try:
        with explained(repo):
            files = HfApi().model_info(repo, files_metadata=True).siblings
        return {file.rfilename: file.size for file in files}
    except OutOfReach as error:
        try:
            root = snapshot_download(repo, allow_patterns=[], local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
        note(f"cannot reach the Hub: choosing among the cached files of {repo}")
        return sizes_in(Path(root))


def sizes_in(folder):
    """{path: bytes} of the files in a local folder and its subfolders."""
    return {path.relative_to(folder).as_posix(): path.stat().st_size
            for path in folder.rglob("*") if path.is_file()}


def plan(repo, sizes):
    """A Fetch for each file in {path: bytes}."""
    return [Fetch(repo, path, size, cached=isinstance(try_to_load_from_cache(repo, path), str))
            for path, size in sizes.items()]


@contextmanager
def explained(repo):
    """Turns huggingface_hub's errors into one line that says what to do."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, ConnectionError, FileNotFoundError,
            ValueError, TypeError, LookupError) as error:       # or the reply is not the Hub's
        reached = isinstance(error.__cause__, HfHubHTTPError)           # the Hub refused
        raise explanation(error.__cause__ if reached else error, repo) from error


def explanation(error, repo):
    """The InputError for an error raised by huggingface_hub."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    mirror = next((known.mirror for known in PRESETS.values() if known.repo == repo), None)

    if isinstance(error, GatedRepoError) or (mirror and status in (401, 403)):
        instead = f"; or use an ungated copy: --model {mirror}" if mirror else ""
        return InputError(
            f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and log in with "
            f"`hf auth login`, with a token that may read gated repositories{instead}")
    if type(error) in (FileNotFoundError, HFValidationError) or status in (401, 403, 404):
        return InputError(
            f"there is no local folder {repo}, and no repository of that name on the Hub that you "
            "may read (a private one needs `hf auth login`)")

    why = f"the Hub is down (status {status})" if status else "the Hub is out of reach"
    if constants.is_offline_mode():
        why = "HF_HUB_OFFLINE is set"
    if repo.startswith("datasets/"):
        return OutOfReach(f"{why}, and {repo} is streamed from it: pass a local folder with --data")
    return OutOfReach(
        f"{why}, and {repo} is neither a local folder nor completely in the cache "
        f"{constants.HF_HUB_CACHE}: fetch it once while online, or pass a local folder")
