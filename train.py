"""Adapt a language model to its sparse autoencoders, or train the autoencoder itself.

    python train.py                                             the included tiny Gemma-2
    python train.py --model gemma-2-2b --layer 12 --rank 64     the paper's headline run
    python train.py --model gemma-2-2b --dry-run                what that would fetch and need
    python train.py --model llama-3.2-1b --method topk          train an SAE; also jumprelu, e2e
    python train.py --method finetune --sae SOURCE              train an existing SAE
    python train.py --train-sae                                 adapters and SAE together
    python train.py --resume runs/tiny-gemma-2-lora             continue an interrupted run
    python train.py --merge runs/tiny-gemma-2-lora              write a Hugging Face checkpoint
    python train.py --publish RUN_DIR OWNER/NAME                upload a run to the Hub, with a card

An option that is not given takes its value from the first of these that has one: the run that
made the SAE (--sae RUN_DIR), the recipe, the model's preset, the paper. Defaults below are the
paper's; --dry-run shows what a run would use.
"""
import argparse
import shutil
import sys
from shlex import quote

import torch

from lorasae import adapt
from lorasae.beyond.finetuning import finetune_sae
from lorasae.beyond.muon import muon
from lorasae.beyond.recipe import tuned_recipe
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.report import as_text
from lorasae.io.adapters import load_adapter
from lorasae.io.console import Parser, one_line_errors, progress_line
from lorasae.io.files import local
from lorasae.io.hub import model_files
from lorasae.io.models import copy_beside_weights, load_model, save_model, text_config
from lorasae.lora import merge_lora
from lorasae.runs import distributed
from lorasae.runs.adapting import adapt_model
from lorasae.runs.config import (
    RETRAINED, Config, add_options, as_fields, configure, option, read_config)
from lorasae.runs.dry_run import dry_run, show_presets
from lorasae.runs.folder import Run, check_free
from lorasae.runs.machine import settled
from lorasae.runs.publish import card, publish
from lorasae.runs.sae_training import train_sae
from lorasae.runs.setting import load_setting, runs_in
from lorasae.runs.tracking import tracked

RECIPES = {"tuned": tuned_recipe}
OPTIMIZERS = {"adamw": adapt.adamw, "muon": muon}
ACTIONS = {                                             # actions on a run: what they combine with
    "resume": ("device",), "merge": (), "publish": ("model", "sae"), "card": ("model", "sae")}


def arguments(argv):
    """The parsed arguments, without those that were not given."""
    parser = Parser(description=__doc__, argument_default=argparse.SUPPRESS)
    add_options(parser)
    add = parser.add_argument_group("runs").add_argument
    add("--out", type=local, help="folder of the run (default: runs/MODEL-METHOD, numbered if "
        "that is taken)")
    add("--resume", metavar="RUN_DIR", type=local, help="continue that run from its last "
        "checkpoint, with its own arguments; only --device may be changed")
    add("--merge", metavar="RUN_DIR", type=local, help="fold that run's adapters into its model, "
        "write RUN_DIR/merged/, and stop")
    add("--publish", metavar=("RUN_DIR", "OWNER/NAME"), nargs=2, help="upload that run's adapters "
        "or SAE to the Hub, with a model card; --model and --sae give the Hub names of the base "
        "model and its SAE, if the run used local ones")
    add("--card", metavar="RUN_DIR", type=local, help="print the model card of --publish, and stop")
    add("--list", action="store_true", help="print the presets with their SAEs, sizes and "
        "licences, and stop")
    add("--dry-run", action="store_true", help="print what would be fetched and trained, and the "
        "memory needed, and stop")

    args = parser.parse_args(argv)
    for action, besides in ACTIONS.items():
        extra = vars(args).keys() - {action, *besides}
        if action in args and extra:
            parser.error(f"--{action} takes the run's settings: leave out {option(min(extra))}")
    return args


def config_of(args):
    """The arguments -> Config. With --resume, the run's own."""
    if "resume" in args:
        return read_config(args.resume, getattr(args, "device", None))
    device = "cuda" if torch.cuda.is_available() else Config.device
    return configure({"device": device, **as_fields(vars(args))}, RECIPES)


def take_run(run):
    """Trains adapters or an SAE, by the run's method -> {folder: contents of its results.json}."""
    config = run.config
    setting = load_setting(config, run.folder)
    progress_line(f"writing to {run.folder}/")
    with setting.text:
        if config.mode == "lora":
            return adapt_model(setting, run, OPTIMIZERS[config.optimizer])
        if config.mode in RETRAINED:
            return {run.folder: finetune_sae(setting, run, OPTIMIZERS[config.optimizer])}
        return {run.folder: train_sae(setting, run)}


def merge(folder):
    """Writes folder/merged/, the adapted model without its SAE: in fp32, as bf16 loses updates."""
    config, target = read_config(folder), folder / "merged"
    if config.method != "lora":
        raise InputError(f"{folder} did not train adapters: there is nothing to merge")
    first, *others = runs_in(folder)
    if others:
        raise InputError(f"{folder} holds several runs: merge one of them, such as {first}")
    if target.exists():
        raise InputError(f"{target} already exists: remove it to merge again")

    model = load_adapter(load_model(config.model, dtype="float32"), folder)
    unfinished = folder / "merged.part"
    try:
        save_model(merge_lora(model), unfinished, config=text_config(model_files(config.model)))
        copy_beside_weights(config.model, unfinished)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"{target}/ is the adapted model, without its SAE, for "
          "transformers.AutoModelForCausalLM to load")
    if config.train_sae:
        print(f"only the adapters were folded in: the SAE trained with them is {folder}/sae/")


# ---- What a run prints at the end ----------------------------------------------------------------

def report(results, folder, config):
    """Prints the tables, how much of the gap was closed, and where the files are."""
    print(as_text(fidelity.tables(results)))
    facts = [f"{results['tokens_per_second']:,.0f} tokens/s", f"{results['seconds']:.0f} s"]
    if results["peak_memory_bytes"]:
        facts.append(f"peak memory {results['peak_memory_bytes'] / 1e9:.2f} GB")
    if "dead_latents" in results:
        facts.append(f"dead latents {results['dead_latents']:.1%}")
    print("   ".join(facts))

    where, model = quote(str(folder)), quote(config.model)
    print(f"{folder}/ holds everything; python eval.py {where} recomputes the table")
    if config.method != "lora":
        print(f"python train.py --model {model} --sae {where} adapts the model to the SAE")


def main(argv=None):
    args = arguments(argv)
    with one_line_errors():
        if "merge" in args:
            return merge(args.merge)
        if "publish" in args:
            return publish(*args.publish, as_fields(vars(args)))
        if "card" in args:
            return print(card(args.card, "OWNER/NAME", as_fields(vars(args))))
        if "list" in args:
            return show_presets()
        config = config_of(args)
        if "out" in args:
            check_free(args.out)
        if "dry_run" in args:
            return dry_run(config)

        distributed.start(config)
        config = settled(config)
        if "resume" in args:
            run = Run.resume(args.resume, config)
        else:
            run = Run.create(getattr(args, "out", None), config)
        try:
            with tracked(run):
                for folder, results in take_run(run).items():
                    report(results, folder, run.config)
        except KeyboardInterrupt:
            sys.exit(run.after_interrupt())
        finally:
            run.close()
        distributed.stop()


if __name__ == "__main__":
    main()
