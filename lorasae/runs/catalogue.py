"""The table of presets, which needs no network: train.py --list."""
from pathlib import Path

from lorasae.evals.report import table_text
from lorasae.io.files import DTYPES
from lorasae.io.presets import PRESETS
from lorasae.runs.config import Config
from lorasae.runs.dry_run import in_words

WIDE = 47                                               # of the only text column
HEADINGS = [
    "model", "block", "SAE", "L0", "available SAEs".ljust(WIDE), "download", "memory", "licence"]
NOTES = """
block, SAE and L0 are a run's defaults. available SAEs: their blocks, widths, and the L0s of the
default width. download: with the SAE. memory: the model's weights; --dry-run estimates the run's.
The embedded models, tiny-*, need no download."""


def show_presets():
    """Prints the models with their SAEs, sizes and licences."""
    rows = []
    for name, known in PRESETS.items():
        is_on_hub = known.sae and not Path(known.sae).is_dir()
        _, of_sae = known.sae_size() if is_on_hub else (0, 0)
        dtype = DTYPES[known.common.get("dtype", Config.dtype)]
        rows.append([
            name, str(known.layer), known.width or "", str(known.l0 or ""), known.saes.ljust(WIDE),
            in_words(known.weights + of_sae),
            in_words(dtype.itemsize * known.parameters), known.licence])
    print(table_text(rows, HEADINGS))
    print(NOTES)
