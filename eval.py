"""Evaluate a finished run from its saved files alone, on held-out text.

    python eval.py runs/tiny-gemma-2-lora                       the table that training ended with, recomputed
    python eval.py RUN_DIR --suite fidelity,tokens,distances    any of the evaluations
    python eval.py RUN_DIR --suite layers                       trains: adapters on one block at a time (Figure 9)
    python eval.py RUN_DIR --suite steering --latents 17 204    examples are found in the held-out text
    python eval.py RUN_DIR --suite lm --limit 100               MMLU, HellaSwag, TruthfulQA, by the lm-eval package

Each writes RUN_DIR/eval-NAME.json and, with matplotlib, RUN_DIR/eval-NAME.png. lorasae/evals/ has a file for each.
"""
import argparse
import sys
from functools import partial
from pathlib import Path

from lorasae.errors import InputError
from lorasae.evals import distances, fidelity, steering, tokens
from lorasae.paper import one_block as layers
from lorasae.evals.chat import chat
from lorasae.evals.figures import save_figure
from lorasae.io.disk import read_json, write_json
from lorasae.io.presets import preset
from lorasae.runs.folder import load_setting, training_curve

SUITES = ("fidelity", "tokens", "distances", "layers", "steering", "lm")


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", metavar="RUN_DIR", type=Path, help="folder that train.py wrote")
    add("--suite", default="fidelity", help=f"comma-separated, of {', '.join(SUITES)} (default: %(default)s)")
    add("--device", choices=["cuda", "cpu"], help="(default: the run's)")
    add("--draw", action="store_true", help="only draw the pictures, from the eval-NAME.json files that are there")
    add = parser.add_argument_group("steering").add_argument
    add("--latents", type=int, nargs="+", metavar="ID", help="latents of the first SAE (default: four that fire in few "
        "of the held-out texts, but hard)")
    add("--examples", type=int, default=100, metavar="N", help="texts with a latent's feature, and as many without, half "
        "of them to tune alpha on (default: %(default)s; paper: 500)")
    add("--positives", metavar="WHERE", help="texts with the feature: a file, a folder of latent_ID.json, or the http(s) "
        "address of an OpenAI-compatible endpoint (…/v1) to write them (default: held-out text where it fires most)")
    add("--negatives", nargs="+", metavar="FILE", help="texts without it: two files or more, the first to tune alpha on "
        "(default: held-out text where the latent is silent)")
    add("--chat-model", default="gpt-4o-mini", help="model to ask at that endpoint (default: the paper's, %(default)s)")
    add = parser.add_argument_group("lm").add_argument
    add("--tasks", help="tasks of lm-eval, or YAML files of one's own, comma-separated (default: the paper's Table 5)")
    add("--limit", type=int, metavar="N", help="only the first N questions of each task (default: all)")
    return parser.parse_args(argv)


def suite_module(name):
    if name == "lm":
        from lorasae.evals import benchmarks as harness               # only here: it needs the optional lm-eval
        return harness
    return {"fidelity": fidelity, "tokens": tokens, "distances": distances, "layers": layers, "steering": steering}[name]


def by_rank(folder):
    """The runs in a folder: one of each rank where several were trained in one pass, else the folder itself."""
    ranks = {path.name.removeprefix("rank-"): path for path in folder.glob("rank-*")}
    return [ranks[rank] for rank in sorted(filter(str.isdecimal, ranks), key=int)] or [folder]


def open_run(folder, device=None):
    """(configuration, Setting) of a run, its adapter attached, or its own SAE spliced in where it trained one."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}: pass one that train.py wrote")
    config = read_json(folder / "config.json")
    needed = {"model", "method", "layer", "sae", "data", "device", "micro_batch"}
    if not isinstance(config, dict) or not needed <= config.keys():
        raise InputError(f"{folder}/config.json was not written by train.py, or not by this version: it lacks one of "
                         f"{', '.join(sorted(needed))}")
    config["device"] = device or config["device"]
    config["compile"] = config.get("compile", False) and config["device"] == "cuda"
    product = folder / ("adapter/adapter_config.json" if config["method"] == "lora" else "sae")
    if not product.exists():
        raise InputError(f"{folder} has no {product.relative_to(folder).parts[0]} yet: finish the run with "
                         f"python train.py --resume {folder}")
    if config["method"] != "lora":
        return config, load_setting({**config, "sae": [str(folder)], "width": None, "l0": None})
    made_for = read_json(product).get("base_model_name_or_path")
    if made_for and (preset(made_for) or made_for) != (preset(config["model"]) or config["model"]):
        raise InputError(f"{product.parent} is an adapter of {made_for}, but {folder} is a run of {config['model']}")
    return config, load_setting(config, product.parent)


def evaluate(suite, config, setting, args):
    """The numbers of one evaluation: a plain dict, what eval-NAME.json holds."""
    model, saes, corpus, keep_special = setting
    held_out = corpus.validation.split(config["micro_batch"])
    if suite == "fidelity":
        settings = ("base", "sae", "adapted", "lora", "zero") if config["method"] == "lora" else ("base", "sae", "zero")
        results = fidelity.evaluate(model, saes, held_out, settings, keep_special)
        return {**fidelity.summary(results), "eval_tokens": corpus.validation.numel(), "training": training_curve(args.run)}
    if config["method"] != "lora":
        raise InputError(f"{args.run} trained an SAE and has no adapter, without which --suite {suite} has nothing to "
                         "compare: use --suite fidelity")
    if suite == "tokens":
        return tokens.evaluate(model, saes, held_out, keep_special)
    if suite == "distances":
        return distances.evaluate(model, saes, held_out, keep_special)
    if suite == "layers":
        return layers.evaluate(config, setting, args.run)
    if suite == "lm":
        harness = suite_module("lm")
        tasks = harness.load_tasks((args.tasks or harness.TASKS).split(","))
        return harness.evaluate(model, saes, corpus.tokenizer, tasks, keep_special, limit=args.limit)
    if suite == "steering":
        asked = (args.positives or "").startswith(("http://", "https://"))
        source = {"ask": partial(chat, args.positives, args.chat_model)} if asked else {"positives": args.positives}
        return steering.evaluate(setting, args.run, args.latents, args.examples, negatives=args.negatives, **source)


def main(argv=None):
    args = arguments(argv)
    try:
        suites = args.suite.split(",")
        unknown = [name for name in suites if name not in SUITES]
        if unknown:
            raise InputError(f"--suite {unknown[0]!r} is unknown: choose from {', '.join(SUITES)}")
        for args.run in by_rank(args.run):
            if not args.draw:
                config, setting = open_run(args.run, args.device)
            for name, module in [(name, suite_module(name)) for name in suites]:
                path = args.run / f"eval-{name}.json"
                if not args.draw:
                    numbers = evaluate(name, config, setting, args)
                    write_json(path, numbers)
                    print(f"---- {name} ----")
                    module.show(numbers)
                    print(path, flush=True)
                if name != "lm":                        # Table 5 has no figure
                    save_figure(module.draw, read_json(path), path.with_suffix(".png"))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
