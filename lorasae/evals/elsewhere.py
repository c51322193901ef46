"""Fidelity on text of another kind than the run's: does what was won hold where nothing trained?

    python eval.py RUN_DIR --suite elsewhere --data FOLDER      the held-out part of that text

Of a run that trained an SAE from scratch, every tenth is measured. RUN_DIR/elsewhere/sequences.json
has CE and KL of every sequence, to compare runs in pairs.
"""
from lorasae.evals import fidelity, tenths
from lorasae.evals.common import batches
from lorasae.io.console import count
from lorasae.io.shards import Text
from lorasae.io.text import SOURCES


def add_options(add):
    add("--data", help=f"{SOURCES}, a file or a folder")
    add("--eval-tokens", type=count, help="of that text (default: as many as the run holds out)")


def evaluate(setting, data, eval_tokens):
    """Every setting of a run on other text -> the numbers of fidelity.summary, and the text's name.

    An SAE that the run trained is measured as it is now.
    """
    own, config = setting.text, setting.config
    with Text(data, own.tokenizer, own.bos, own.eos, context=config.context,
              eval_tokens=eval_tokens or own.held_out.numel()) as text:
        setting = setting._replace(text=text)
        settings = fidelity.settings_of(config)
        found = fidelity.measure(setting.model, setting.saes, batches(setting), settings)
        if config.method not in ("lora", "finetune"):
            found |= tenths.measured(setting)
    fidelity.write_sequences(setting.folder / "elsewhere", found, text.documents)
    return fidelity.summary(found, text.documents)


tables = fidelity.tables
