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
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.common import print_table
from lorasae.evals.figures import save_figure
from lorasae.io.console import Parser, answering, count
from lorasae.io.disk import read_json, write_json
from lorasae.io.presets import PRESETS
from lorasae.io.sae_formats import load_sae
from lorasae.paper.one_block import adapted
from lorasae.runs.config import read_config
from lorasae.runs.defaults import configure
from lorasae.runs.folder import Run
from lorasae.runs.sae_training import train_sae
from lorasae.runs.setting import load_setting

TENTHS = range(10, 101, 10)
CURVES = {"topk": "TopK", "e2e": "e2e", "topk_lora": "TopK + LoRA"}
LEVELS = 5                                              # rows of the table of times
MINIATURE = 200_000                                     # tokens of the embedded models' adapters: a tenth of their SAEs'


def trained(config, folder):
    """Makes the SAE of a configuration, or what is missing of it, and returns [(percent, seconds, its folder)] by tenths."""
    check_same(config, folder)
    if not (folder / "results.json").exists():
        run = Run.resume(folder) if (folder / "config.json").exists() else Run.create(folder, config)
        with closing(run):
            train_sae(load_setting(replace(config, sae=())), run)
    points = []
    for percent in TENTHS:
        sae = folder / ("sae" if percent == 100 else f"sae-{percent}pct")
        points.append((percent, read_json(sae / "training.json")["seconds"], sae))
    return points


def check_same(config, folder, names=None):
    """Refuses to continue in a folder whose training was another than the one that is asked for."""
    if not (folder / "config.json").exists():
        return
    before = read_config(folder)
    for name in names or vars(config):
        asked = getattr(config, name)
        if asked is not None and getattr(before, name) != asked:
            raise InputError(f"{folder} was trained with {name} {getattr(before, name)}, not {asked}: pass another --out, "
                             "or the same arguments to continue")


def measure(configs, lora, folder):
    """configs: {method: of its SAE}; lora: of the adapters, on top of TopK's -> what frontier.json holds."""
    tenths = {method: trained(config, folder / method) for method, config in configs.items()}
    config = configs["topk"]
    layer = config.layer[0]
    setting = load_setting(config)
    model, held_out = setting.model, setting.corpus.validation

    def loss(model, saes, name):
        results = fidelity.measure(model, saes, held_out.split(config.eval_batch), (name,))
        return results[name]["ce"].mean().item()

    points = {name: [] for name in CURVES}
    for method in tenths:
        for percent, seconds, sae in tenths[method]:
            ce = loss(model, {layer: load_sae(sae, device=model.device)}, "sae")
            points[method].append({"percent": percent, "seconds": seconds, "ce": ce})

    for percent, seconds, sae in tenths["topk"]:
        print(f"adapting the model to the TopK SAE at {percent} %", flush=True)
        saes = {layer: load_sae(sae, device=model.device)}
        wanted = replace(lora, sae=(str(sae),))
        run = folder / f"lora-{percent}pct"
        check_same(wanted, run, ADAPTING)
        student = adapted(setting._replace(saes=saes, config=wanted), list(range(len(model.layers))), run)
        adapting = read_json(run / "results.json")["seconds"]
        points["topk_lora"].append({"percent": percent, "seconds": seconds + adapting, "lora_seconds": adapting,
                                    "ce": loss(student, saes, "adapted")})

    return {"model": config.model, "layer": layer, "width": config.width or 8 * model.config.hidden_size, "k": config.k,
            "sae_tokens": config.trained_tokens, "lora_tokens": lora.trained_tokens, "rank": lora.rank[0],
            "eval_tokens": held_out.numel(), "ce_base": loss(model, {}, "base"), **points, "levels": levels(points)}


ADAPTING = ("rank", "alpha", "dropout", "optimizer", "lr", "lr_decay", "weight_decay", "batch_size", "micro_batch", "tokens")


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
        seconds = [point["seconds"] for point in numbers[name]]
        ce = [point["ce"] for point in numbers[name]]
        axes.plot(seconds, ce, marker="o", label=label)
    axes.axhline(numbers["ce_base"], color="grey", linestyle="--", label=f"original model ({numbers['ce_base']:.3f})")
    axes.set(xlabel="training time (s)", ylabel="cross-entropy (nats/token)",
             title=f"{numbers['model']}: {numbers['width']:,} latents, k {numbers['k']} (the paper's Figures 1 and 5)")
    axes.legend()


def arguments(argv):
    parser = Parser(description=__doc__)
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
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    add("--seed", type=int, help="(default: 42)")
    add("--out", type=Path, help="folder (default: runs/MODEL-frontier)")
    return parser.parse_args(argv)


def configurations(args):
    """({method: Config of its SAE}, Config of the adapters)"""
    shared = {name: getattr(args, name) for name in ("model", "data", "eval_tokens", "device", "seed")}
    shared["layer"] = args.layer and tuple(args.layer)
    of_sae = {"width": args.width, "k": args.k, "tokens": args.tokens}
    configs = {method: configure({**shared, **of_sae, "method": method}) for method in ("topk", "e2e")}

    tokens = args.lora_tokens or (MINIATURE if args.model.startswith("tiny-") else None)
    rank = None if args.rank is None else (args.rank,)
    topk = configs["topk"]
    lora = configure({**shared, "rank": rank, "tokens": tokens, "sae": ("the TopK SAE",), "adapt": ("all",), "data": topk.data})
    if min(config.steps for config in configs.values()) < len(TENTHS):
        raise InputError("--tokens gives fewer than ten steps, and an SAE is kept after each tenth of them: pass more")
    return configs, lora


def main(argv=None):
    args = arguments(argv)
    folder = args.out or Path("runs") / f"{args.model}-frontier"
    with answering("interrupted: the same command continues"):
        configs, lora = configurations(args)
        numbers = measure(configs, lora, folder)
        write_json(folder / "frontier.json", numbers)
        show(numbers)
        again = f"python -m lorasae.paper.frontier --model {args.model} --out {folder}"
        save_figure(draw, numbers, folder / "frontier.png", again)


if __name__ == "__main__":
    main()
