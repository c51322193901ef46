"""A finished run, opened again from its files."""
from dataclasses import replace
from os.path import isdir, isfile

from lorasae.errors import InputError
from lorasae.io.files import read_json
from lorasae.io.presets import preset
from lorasae.runs.adapting import student_names
from lorasae.runs.config import read_config
from lorasae.runs.setting import load_setting


def runs_in(folder):
    """The runs in a folder: of each rank and rate where several were trained in one pass, else the folder itself."""
    if not isfile(folder / "config.json"):
        return [folder]
    config = read_config(folder)
    if len(config.variants) == 1:
        return [folder]
    return [folder / name for name in student_names(config)]


def open_run(folder, device=None):
    """The Setting of a run: its adapter attached, or its own SAE spliced in where it trained one."""
    if not isdir(folder):
        raise InputError(f"there is no folder {folder}: pass one that train.py wrote")
    config = read_config(folder)
    device = device or config.device
    config = replace(config, device=device, compile=config.compile and device.startswith("cuda"), shard=False)
    product = folder / ("adapter/adapter_config.json" if config.method == "lora" else "sae")
    if config.method != "lora" or config.train_sae:
        config = replace(config, sae=(str(folder),), width=None, l0=None)               # the SAE that the run has made
    if not product.exists():
        raise InputError(f"{folder} has no {product.relative_to(folder).parts[0]} yet: finish the run with "
                         f"python train.py --resume {folder}")
    if config.method != "lora":
        return load_setting(config, folder, trains=False)

    made_for = read_json(product).get("base_model_name_or_path")
    if made_for and (preset(made_for) or made_for) != (preset(config.model) or config.model):
        raise InputError(f"{product.parent} is an adapter of {made_for}, but {folder} is a run of {config.model}")
    return load_setting(config, folder, adapter=product.parent, trains=False)
