"""The presets as one table, made without a network: train.py --list."""
from lorasae.evals.report import table_text
from lorasae.io.files import DTYPES
from lorasae.io.presets import PRESETS
from lorasae.runs.config import Config
from lorasae.runs.dry_run import in_words

WIDE = 47                                               # of the one column of text
HEADINGS = [
    "model", "block", "SAE", "L0", "SAEs there are".ljust(WIDE), "download", "memory", "licence"]
NOTES = """
block, SAE and L0 are what a run takes by default. SAEs there are: blocks, widths, and L0s of the
default width. download: with the SAE. memory: the model's weights; --dry-run estimates the run.
The embedded models, tiny-*, are here already."""


def show_presets():
    """Prints the models with their SAEs, sizes and licences."""
    rows = []
    for name, known in PRESETS.items():
        _, of_sae = known.sae_size() if known.sae and known.config else (0, 0)
        dtype = DTYPES[known.common.get("dtype", Config.dtype)]
        rows.append([
            name, str(known.layer), known.width or "", str(known.l0 or ""), known.saes.ljust(WIDE),
            in_words(known.weights + of_sae),
            in_words(dtype.itemsize * known.parameters), known.licence])
    print(table_text(rows, HEADINGS))
    print(NOTES)
