"""Fidelity on another kind of text: does the gain carry over to text that was not trained on?

    python eval.py RUN_DIR --suite elsewhere --data FOLDER      the held-out part of that text

If a run trained an SAE from scratch, the SAE after each tenth of its training is measured too.
RUN_DIR/elsewhere/sequences.json has CE and KL of every sequence, to compare runs in pairs.
"""
from lorasae.errors import InputError
from lorasae.evals import fidelity, tenths
from lorasae.evals.common import batches
from lorasae.io.console import count
from lorasae.io.shards import Text
from lorasae.io.text import SOURCES


def add_options(add):
    add("--data", help=f"{SOURCES}, a file or a folder")
    add("--eval-tokens", type=count, help="held-out tokens (default: as many as in the run)")
    add("--field", help="JSON field with the text (default: text, or raw_content)")


def evaluate(setting, data, eval_tokens, field=None):
    """Measures a run on other text -> fidelity.summary's numbers; the gap is its trained SAE's."""
    if data is None:
        raise InputError(f"--suite elsewhere needs --data: {SOURCES}, a file or a folder")
    own, config = setting.text, setting.config
    with Text(data, own.tokenizer, own.bos, own.eos, context=config.context,
              eval_tokens=eval_tokens or own.held_out.numel(), field=field) as text:
        setting = setting._replace(text=text)
        others = tenths.kept_saes(setting)
        settings = (*fidelity.settings_of(config), *others)
        found = fidelity.measure(setting.model, setting.saes, batches(setting), settings,
                                 others=others)
    fidelity.write_sequences(setting.folder / "elsewhere", found, text.documents)
    return fidelity.summary(found, text.documents)


tables = fidelity.tables
