"""Cross-entropy against training time (paper §4.2; Figures 1 and 5, Tables 1 and 2): TopK, e2e, and TopK + LoRA.

    python -m lorasae.paper.frontier                              in miniature, on the embedded Gemma-2
    python -m lorasae.paper.frontier --model llama-3.2-1b         the paper's own experiment

trains a TopK and an e2e SAE with the same latents, k and tokens, adapts all blocks of the model to the TopK SAE as it
was after each tenth of its training, and evaluates all of them on the same held-out text. OUT/ gets a run's folder for
each training, frontier.json and, with matplotlib, frontier.png. Interrupted, the same command continues.

Times are of training alone, on one machine: no loading and no evaluation. Each method does the work that it needs and
no more: TopK stops the model at the SAE's block, e2e shares the frozen prefix with its teacher. The time of a TopK +
LoRA point is that of its SAE so far plus that of its adapters.
"""
import argparse
import sys
from pathlib import Path

import torch

from lorasae.dictionary import fill, make
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.paper.one_block import adapted
from lorasae.evals.figures import save_figure
from lorasae.io.disk import read_json, write_json
from lorasae.io.presets import PRESETS, preset
from lorasae.runs.folder import Run, Setting, count, load_setting, print_table
from lorasae.io.sae_formats import load_sae

TENTHS = range(10, 101, 10)
CURVES = {"topk": "TopK", "e2e": "e2e", "topk_lora": "TopK + LoRA"}
LEVELS = 5                                              # rows of the table of times
MINIATURE = 200_000                                     # tokens of the embedded models' adapters: a tenth of their SAEs'


def trained(config, folder):
    """Makes the SAE of a configuration, or what is missing of it, and returns [(percent, seconds, its folder)] by tenths."""
    check_same(config, folder)
    if not (folder / "results.json").exists():
        make(config, folder, Run.resume(folder) if (folder / "config.json").exists() else None)
    places = [folder / ("sae" if percent == 100 else f"sae-{percent}pct") for percent in TENTHS]
    return [(percent, read_json(place / "training.json")["seconds"], place) for percent, place in zip(TENTHS, places)]


def check_same(config, folder):
    """Refuses to continue in a folder whose training was another than the one that is asked for."""
    if (folder / "config.json").exists():
        before = read_json(folder / "config.json")
        other = [key for key, value in config.items() if value is not None and before.get(key) != value]
        if other:
            raise InputError(f"{folder} was trained with {other[0]} {before.get(other[0])}, not {config[other[0]]}: pass another "
                             "--out, or the same arguments to continue")


def measure(configs, lora, folder):
    """configs: {method: of its SAE (dictionary.fill)}; lora: of the adapters, on top of TopK's -> what frontier.json holds."""
    places = {method: trained(config, folder / method) for method, config in configs.items()}
    config = configs["topk"]
    layer = config["layer"][0]
    model, _, corpus, _ = load_setting({**config, "sae": None, "layer": []})
    held_out = corpus.validation.split(config["micro_batch"])

    def loss(model, saes, setting):
        return fidelity.evaluate(model, saes, held_out, (setting,))[setting]["ce"].mean().item()

    points = {name: [] for name in CURVES}
    for method in places:
        for percent, seconds, place in places[method]:
            ce = loss(model, {layer: load_sae(place, device=model.device)}, "sae")
            points[method].append({"percent": percent, "seconds": seconds, "ce": ce})
    for percent, seconds, place in places["topk"]:
        setting = Setting(model, {layer: load_sae(place, device=model.device)}, corpus, False)
        run = folder / f"lora-{percent}pct"
        print(f"adapting the model to the TopK SAE at {percent} %", flush=True)
        wanted = {**config, **lora, "sae": [str(place)]}
        check_same({key: wanted[key] for key in lora if key != "adapt"}, run)
        student = adapted(wanted, setting, list(range(len(model.layers))), run)
        adapting = read_json(run / "results.json")["seconds"]
        points["topk_lora"].append({"percent": percent, "seconds": seconds + adapting, "lora_seconds": adapting,
                                    "ce": loss(student, setting.saes, "adapted")})
    tokens = [part["steps"] * part["batch_size"] * config["context"] for part in (config, lora)]
    return {"model": config["model"], "layer": layer, "width": config["width"] or 8 * model.config.hidden_size, "k": config["k"],
            "sae_tokens": tokens[0], "lora_tokens": tokens[1], "rank": lora["rank"],
            "eval_tokens": corpus.validation.numel(), "ce_base": loss(model, {}, "base"), **points, "levels": levels(points)}


def reached(points, ce, between=True):
    """Seconds until the loss is down to ce, None if it never is; linear between points, or else the first one there.

    Before the first point nothing is known, so its time is an upper bound.
    """
    for i, point in enumerate(points):
        if point["ce"] <= ce:
            if i == 0 or not between:
                return point["seconds"]
            last = points[i - 1]
            return last["seconds"] + (point["seconds"] - last["seconds"]) * (last["ce"] - ce) / (last["ce"] - point["ce"])
    return None


def levels(points):
    """The rows of Tables 1 and 2: losses from the first of TopK + LoRA down to the best of all, and the time to each.

    Of a TopK + LoRA only the trained points count; between those of TopK and e2e the line does, which favours them.
    """
    first, best = points["topk_lora"][0]["ce"], min(point["ce"] for name in CURVES for point in points[name])
    rows = []
    for i in range(LEVELS):
        ce = first + (best - first) * i / (LEVELS - 1)
        seconds = {name: reached(points[name], ce, between=name != "topk_lora") for name in CURVES}
        known = seconds["e2e"] is not None and seconds["topk_lora"] is not None
        rows.append({"ce": ce, **seconds, "speedup": seconds["e2e"] / seconds["topk_lora"] if known else None})
    return rows


def show(numbers):
    def text(value, form, unit=""):
        return "-" if value is None else f"{value:{form}}{unit}"

    rows = [[f"{points[0]['percent']} %"] + [cell for point in points for cell in (text(point["seconds"], ",.1f"), point["ce"])]
            for points in zip(*(numbers[name] for name in CURVES))]
    print_table(rows, ["training"] + [cell for label in CURVES.values() for cell in (f"{label} (s)", "CE (nats)")])
    print(f"\noriginal model: CE {numbers['ce_base']:.4f} nats, the best achievable\n")
    print_table([[f"{row['ce']:.4f}", *(text(row[name], ",.1f") for name in reversed(CURVES)), text(row["speedup"], ".2f", "x")]
                 for row in numbers["levels"]],
                ["CE (nats)", *(f"{CURVES[name]} (s)" for name in reversed(CURVES)), "faster than e2e"])
    print(f"\nbackward passes through the model: e2e {numbers['sae_tokens']:,} tokens, LoRA {numbers['lora_tokens']:,} "
          f"({numbers['sae_tokens'] / numbers['lora_tokens']:.0f} times fewer)")


def draw(numbers, figure):
    """Figures 1 and 5: cross-entropy against training time."""
    figure.set_size_inches(6, 4)
    axes = figure.subplots()
    for name, label in CURVES.items():
        axes.plot([point["seconds"] for point in numbers[name]], [point["ce"] for point in numbers[name]], marker="o", label=label)
    axes.axhline(numbers["ce_base"], color="grey", linestyle="--", label=f"original model ({numbers['ce_base']:.3f})")
    axes.set(xlabel="training time (s)", ylabel="cross-entropy (nats/token)",
             title=f"{numbers['model']}: {numbers['width']:,} latents, k {numbers['k']} (the paper's Figures 1 and 5)")
    axes.legend()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="tiny-gemma-2", choices=PRESETS, help="(default: %(default)s)")
    add("--layer", type=int, nargs=1, help="block whose output the SAEs replace, from 0 (default: the preset's; paper: 12)")
    add("--width", help="latents of the SAEs (default: the preset's; paper: 8 d_model)")
    add("--k", type=int, help="active latents (default: the preset's; paper: 64)")
    add("--tokens", type=count, help="training tokens of each SAE (default: the preset's; paper: 2B on Gemma-2-2B, 4B on "
        "Llama-3.2-1B)")
    add("--lora-tokens", type=count, help="training tokens of the adapters at each checkpoint (default: of the embedded "
        f"models {MINIATURE:,}, else the preset's; paper: 15M on Gemma-2-2B, 100M on Llama-3.2-1B)")
    add("--rank", type=int, help="rank of the adapters (default: the preset's; paper: 64)")
    add("--data", help="text of all trainings (default: the preset's)")
    add("--eval-tokens", type=count, help="held-out tokens (default: the preset's; paper: 1M)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"], help="(default: %(default)s)")
    add("--seed", type=int, default=42, help="(default: %(default)s)")
    add("--out", type=Path, help="folder (default: runs/MODEL-frontier)")
    args = parser.parse_args(argv)
    known, folder = preset(args.model), args.out or Path("runs") / f"{args.model}-frontier"
    try:
        config = {key: getattr(args, key) for key in ("model", "layer", "width", "k", "data", "eval_tokens", "device", "seed")}
        config |= dict.fromkeys(("sae", "l0", "lr", "batch_size", "micro_batch", "context", "field", "dtype", "sae_dtype"))
        config |= {"tokens": args.tokens, "ahead": 8 if args.device == "cuda" else 1,
                   "compile": args.device == "cuda", "clip": 1.0, "auxk": False, "dead_after": 10 ** 7, "checkpoint_every": 1000}
        configs = {method: fill({**config, "method": method}, known) for method in ("topk", "e2e")}
        lora = {"method": "lora", "adapt": ["all"], "rank": known.rank if args.rank is None else args.rank, "alpha": 32,
                "dropout": known.dropout, "lr": known.lr, "lr_decay": known.lr_decay, "weight_decay": 0.01, "width": None, "l0": None,
                "batch_size": known.batch_size, "micro_batch": known.batch_size,
                "tokens": args.lora_tokens or (MINIATURE if args.model.startswith("tiny-") else known.tokens)}
        for part in (*configs.values(), lora):
            part["steps"] = -(-part["tokens"] // (part["batch_size"] * configs["topk"]["context"]))
        if lora["rank"] < 1:
            raise InputError(f"--rank is {lora['rank']}, but it must be positive")
        if args.seed < 0:
            raise InputError(f"--seed is {args.seed}, but it must not be negative")
        if min(part["steps"] for part in configs.values()) < len(TENTHS):
            raise InputError("--tokens gives fewer than ten steps, and an SAE is kept after each tenth of them: pass more")
        numbers = measure(configs, lora, folder)
        show(numbers)
        write_json(folder / "frontier.json", numbers)
        save_figure(draw, numbers, folder / "frontier.png", f"python -m lorasae.paper.frontier --model {args.model} --out {folder}")
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues")


if __name__ == "__main__":
    main()
