"""Names -> files: presets of the paper's models, Hugging Face repositories, local folders (§4).

Whatever is fetched goes through huggingface_hub: its cache, login and progress bar, HF_HOME, HF_HUB_OFFLINE. Only what
is read is fetched: `python train.py --model gemma-2-2b --dry-run` lists the files with their sizes.
"""
import math
import os
import re
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (GatedRepoError, HfHubHTTPError, HFValidationError, HTTPError,
                                    LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError)

from lorasae.errors import InputError
from lorasae.io.files import check_name, shown
from lorasae.io.presets import PRESETS, preset

PAPER_L0 = 70       # of several L0s the paper takes the nearest to this; SAELens' "canonical" is the nearest to 100
BESIDE_WEIGHTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
MODEL_FILES = ("config.json", *BESIDE_WEIGHTS, "model.safetensors", "model.safetensors.index.json",
               "model-*-of-*.safetensors")                      # never .bin or .pth: opening those can run code
SAE_FILES = {                                                   # what an SAE consists of, format by format
    "gemma_scope": ("params.npz",),
    "llama_scope": ("checkpoints/final.safetensors", "hyperparams.json"),
    "sae_lens": ("sae_weights.safetensors", "cfg.json"),
    "sparsify": ("sae.safetensors", "cfg.json"),
    "dictionary_learning": ("ae.pt", "config.json"),
}
FACTS = {                                                       # what the path of an SAE in a repository says of it
    "layer": re.compile(r"(?:layers?[._]|blocks\.|-L)(\d+)"),
    "width": re.compile(r"width_(\w+)"),
    "l0": re.compile(r"average_l0_(\d+)"),
}
REPOSITORY = r"\w[\w.-]*/\w[\w.-]*"


class Fetch(NamedTuple):
    """A file that would be read from the Hub."""
    repo: str
    path: str
    bytes: int
    cached: bool


def sae_choice(model, sae=None, *, layer=None, width=None, l0=None):
    """-> (source, {layer, width, l0}) for load_sae, sae_files and sae_plan: what is given, filled up from the preset.

    The preset's width belongs to its own SAEs, its L0 to its own layer and width. Raises InputError without any SAE.
    """
    known = preset(model)
    if sae is None and known is None:
        raise InputError(f"{model} is not a preset, so nothing says which SAE to use: pass one with --sae")
    if sae is None and known.sae is None:
        raise InputError(f"{model} has no public SAE (the paper trained its own): make one with `python train.py "
                         f"--model {model} --method topk --out RUN_DIR`, then pass --sae RUN_DIR")
    if known is not None:
        layer = known.layer if layer is None else layer
        if sae in (None, known.sae):
            width = width or known.width
            if l0 is None and (layer, str(width)) == (known.layer, str(known.width)):
                l0 = known.l0
    return sae or known.sae, {"layer": layer, "width": width, "l0": l0}


def model_files(name_or_dir):
    """A local folder with config.json, *.safetensors and tokenizer.json, fetched if need be.

    name_or_dir: a preset, a local folder, or a Hub repository OWNER/NAME, tried in this order. Raises InputError.
    """
    folder, repo = _model_place(name_or_dir)
    if repo is None:
        return folder
    folder = _fetch(repo, MODEL_FILES)
    if not (folder / "config.json").exists():
        raise InputError(f"{repo} on the Hub has no config.json: it is not a model in the transformers layout")
    if not any(folder.glob("model*.safetensors")):
        raise InputError(f"{repo} on the Hub has no model.safetensors, and pickled weights are not opened")
    return folder


def config_file(name_or_dir):
    """The path of a model's config.json alone, fetched if need be."""
    folder, repo = _model_place(name_or_dir)
    return (folder if repo is None else _fetch(repo, ("config.json",))) / "config.json"


def model_plan(name_or_dir):
    """A Fetch for each file that model_files(name_or_dir) reads from the Hub; [] for a local folder."""
    _, repo = _model_place(name_or_dir)
    sizes = _listing(repo) if repo else {}

    read = {}
    for path, size in sizes.items():
        if any(fnmatch(path, pattern) for pattern in MODEL_FILES):
            read[path] = size
    return _plan(repo, read)


def sae_files(source, *, layer=None, width=None, l0=None):
    """The local folder that holds one SAE, in a format of SAE_FILES (or an .npz file itself), fetched if need be.

    source: a local file or folder, the folder of a run, or OWNER/NAME[/FOLDER] on the Hub. Where it holds several SAEs,
    layer, width ("16k" or 16384) and l0 choose; without l0 the nearest to PAPER_L0, said on stderr. Raises InputError.
    """
    place, folder, files = _sae_place(source, layer, width, l0)
    return place / folder if isinstance(place, Path) else _fetch(place, list(files)) / folder


def sae_plan(source, *, layer=None, width=None, l0=None):
    """A Fetch for each file that sae_files(source, ...) reads from the Hub; [] for a local source."""
    place, _, files = _sae_place(source, layer, width, l0)
    return [] if isinstance(place, Path) else _plan(place, files)


def _model_place(name):
    """-> (local folder, None) or (None, Hub repository)."""
    check_name(name)
    target = PRESETS[name].repo if name in PRESETS else str(name)
    if os.path.isdir(target):
        return Path(target), None
    if re.fullmatch(REPOSITORY, target):
        return None, target
    raise InputError(f"there is no model {name}: expected a preset ({', '.join(PRESETS)}), a local folder, or "
                     "OWNER/NAME on the Hub")


def _sae_place(source, layer, width, l0):
    """-> (local folder or Hub repository, the SAE's folder in it, {its files: bytes})."""
    wanted = {"layer": layer, "width": _width_name(width), "l0": _l0_name(l0)}
    check_name(source)
    local = Path(os.path.expanduser(source))
    on_hub = re.fullmatch(rf"({REPOSITORY})/?(.*?)/*", str(source))

    # a file stands for the SAE that it belongs to
    if os.path.isfile(local):
        if local.suffix == ".npz":
            return local.parent, local.name, {}
        local = _folder_of(local)

    # all files there are, with their sizes
    if os.path.isdir(local):
        place = local / "sae" if os.path.isdir(local / "sae") else local    # the folder of a run keeps its SAE in sae/
        inside, sizes = "", _sizes(place)
    elif on_hub:
        place, inside = on_hub.groups()
        sizes = _listing(place)
    else:
        raise InputError(f"there is no SAE {source}: expected a file, a folder, or OWNER/NAME[/FOLDER] of the Hub")

    # those that make an SAE
    found = _saes_among(sizes, inside)
    if not found:
        formats = "; ".join(f"{' + '.join(files)} ({name})" for name, files in SAE_FILES.items())
        raise InputError(f"{source} holds no SAE of a known format: expected {formats}")
    folder = _choose(list(found), source, **wanted)
    return place, folder, found[folder]


def _folder_of(file):
    """The folder of the SAE that a file is a part of."""
    for names in SAE_FILES.values():
        for name in names:
            if f"/{file.as_posix()}".endswith(f"/{name}"):
                return file.parents[name.count("/")]
    parts = ", ".join(sorted({name for names in SAE_FILES.values() for name in names}))
    raise InputError(f"{file} is no file of an SAE: expected an .npz file, {parts}, or a folder")


def _sizes(place):
    """{path: bytes} of the files in a folder, down to four levels."""
    sizes = {}
    for depth in range(1, 5):
        for path in place.glob("/".join("*" * depth)):
            if os.path.isfile(path):
                sizes[path.relative_to(place).as_posix()] = os.path.getsize(path)
    return sizes


def _saes_among(sizes, inside):
    """{folder: {its files: bytes}} of the whole SAEs, of any format, below the folder `inside` ("" for all)."""
    found = {}
    for path in sizes:
        if inside and not f"{path}/".startswith(f"{inside}/"):
            continue
        for names in SAE_FILES.values():
            folder = path.removesuffix(names[0]).rstrip("/")
            files = [f"{folder}/{name}".lstrip("/") for name in names]
            if path == files[0] and all(file in sizes for file in files):
                found[folder] = {file: sizes[file] for file in files}
    return found


def _width_name(width):
    """16384 -> "16k", 1048576 -> "1m"; names stay."""
    if width is None or not str(width).isdecimal():
        return width
    return f"{int(width) // 10**6}m" if int(width) >= 10**6 else f"{int(width) // 1000}k"


def _l0_name(l0):
    """82, 82.0 and "82" -> "82", as the folders spell it: their L0s are rounded to whole numbers."""
    if l0 is None:
        return None
    try:
        number = float(l0)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(l0, bool) or not number.is_integer() or number < 0:
        raise InputError(f"--l0 {shown(l0)} chooses no SAE: their L0s are given in whole numbers, such as 82")
    return str(int(number))


def _choose(folders, source, **wanted):
    """The one folder whose path agrees with wanted {layer, width, l0}. What no path states is not checked."""
    for fact, pattern in FACTS.items():

        # what the paths say
        said = {}
        for folder in folders:
            if found := pattern.findall(folder):
                said[folder] = found[-1]
        if not said:
            continue
        have = sorted(set(said.values()), key=lambda value: (value.endswith("m"), len(value), value))
        value, offer = wanted[fact], f"{source} offers {fact} {', '.join(have)}"

        # what is taken
        if value is not None and str(value) not in have:
            inside = f" (in {folders[0].rpartition('/')[0]})" if fact == "l0" else ""
            raise InputError(f"{offer}, but not {str(value)[:40]}{inside}")
        if value is None and fact == "l0":
            value = min(have, key=lambda number: (abs(int(number) - PAPER_L0), int(number)))
            if len(have) > 1:
                print(f"{offer}: taking {value}, the nearest to {PAPER_L0}", file=sys.stderr)
        elif value is None and len(have) > 1:
            raise InputError(f"{offer}: choose with --{fact}")
        elif value is None:
            value = have[0]

        folders = [folder for folder in folders if said.get(folder) == str(value)]

    if len(folders) > 1:
        raise InputError(f"{source} offers several SAEs that fit ({', '.join(folders[:8])}): name one of these folders")
    return folders[0]


def _listing(repo):
    """{path: bytes} of a Hub repository; without a network, of what the cache holds of it (said on stderr)."""
    try:
        commit = HfApi().model_info(repo).sha                       # at once, also without a network; the tree retries
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=commit)
        return {file.path: file.size for file in tree if hasattr(file, "size")}
    except (HfHubHTTPError, HFValidationError) as error:
        raise _explain(error, repo) from error
    except (HTTPError, OfflineModeIsEnabled):
        root = _fetch(repo, [], local_files_only=True)
        print(f"the Hub is out of reach: choosing among the files of {repo} in the cache", file=sys.stderr)
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def _fetch(repo, patterns, **how):
    """The local snapshot of a repository with its files of these names, downloaded where the cache lacks them."""
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, **how))
    except (HTTPError, OSError, HFValidationError) as error:
        raise _explain(error, repo) from error


def _plan(repo, sizes):
    return [Fetch(repo, path, size, cached=isinstance(try_to_load_from_cache(repo, path), str))
            for path, size in sizes.items()]


def _explain(error, repo):
    """What huggingface_hub raised -> an InputError of one line that says what to do."""
    mirror = next((p.mirror for p in PRESETS.values() if p.repo == repo), None)
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__                                     # the Hub was reached and refused
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError) or status == 403 or (status == 401 and mirror):
        instead = f"; or take the same weights from an ungated copy: train.py --model {mirror}" if mirror else ""
        return InputError(f"{repo} is gated: accept its licence at https://huggingface.co/{repo} and log in with "
                          f"`hf auth login`, with a token that may read gated repositories{instead}")
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)) or status == 401:
        return InputError(f"there is no local folder {repo}, and no repository of that name on the Hub that you may "
                          "read (a private one needs `hf auth login`)")
    if isinstance(error, LocalEntryNotFoundError):
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the Hub is out of reach"
        return InputError(f"{why} and {repo} is not wholly in the cache {constants.HF_HUB_CACHE}: fetch it once with a "
                          "network, or pass a local folder")
    return InputError(f"cannot fetch {repo}: {str(error).strip().partition(chr(10))[0] or type(error).__name__}")
