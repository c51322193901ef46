"""Which block's adapters matter (paper §6.3, Figure 9): adapters on one block after the SAE, against on all of them.

    python eval.py RUN_DIR --suite layers

trains them, each with the run's own configuration, into RUN_DIR/layers/block-N (run folders, which eval.py opens too).
Interrupted, the same command continues. The paper: block 13 alone does 88 % of what blocks 13 to 25 do.
"""
import torch

from lorasae.adapt import train
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.common import interval, percent, plus_minus, ratio
from lorasae.io.disk import read_json
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.lora import add_lora, adapters
from lorasae.model import Transformer
from lorasae.runs.folder import Run, print_table


def evaluate(config, setting, folder):
    """config and setting of the run in `folder` -> the improvement CE_sae - CE_adapted (nats) of every set of blocks."""
    model, saes, corpus, keep_special = setting
    after = list(range(min(saes) + 1, len(model.layers)))
    if not after:
        raise InputError(f"the SAE at layer {min(saes)} has no block after it whose adapters --suite layers could compare")
    own = sorted({int(name.split(".")[2]) for name in adapters(model)})
    wanted = [after, *([block] for block in after if len(after) > 1)]
    wanted += [own] if own not in wanted else []
    places = {name: folder / "layers" / name.replace(" ", "-") for name in map(label, wanted) if name != label(own)}
    missing = [name for name, place in places.items() if not (place / "results.json").exists()]
    if missing:
        minutes = len(missing) * read_json(folder / "results.json")["seconds"] / 60
        print(f"training adapters on {'; '.join(missing)}: about {minutes:.0f} minutes, by the run's own time", flush=True)

    def ce(model, *settings):
        batches = corpus.validation.split(config["micro_batch"])
        return [values["ce"] for values in fidelity.evaluate(model, saes, batches, settings, keep_special).values()]

    (without, spliced), gains = ce(model, "base", "sae"), {}
    for blocks in wanted:
        student = model if blocks == own else adapted(config, setting, blocks, places[label(blocks)])
        gains[label(blocks)] = spliced - ce(student, "adapted")[0]
    rows = []
    for name, gain in gains.items():
        improvement, half = interval(gain)
        share, share_half = ratio(gain, gains[label(after)])
        rows.append({"blocks": name, "improvement": improvement, "share_of_all_after": share,
                     "gap_closed": ratio(gain, spliced - without)[0],
                     "ci90": {"improvement": half, "share_of_all_after": share_half}})
    return {"sae_layer": min(saes), "rows": rows, "train_tokens": config["tokens"]}


def label(blocks):
    if len(blocks) == 1:
        return f"block {blocks[0]}"
    whole = blocks[-1] - blocks[0] == len(blocks) - 1
    return f"blocks {blocks[0]} to {blocks[-1]}" if whole else "blocks " + " ".join(map(str, blocks))


def adapted(config, setting, blocks, folder):
    """The run's model with adapters on `blocks` alone: loaded from `folder`, or trained into it."""
    model, saes, corpus, keep_special = setting
    fresh = bare(model)
    if (folder / "results.json").exists():
        return load_adapter(fresh, folder / "adapter")
    torch.manual_seed(config["seed"])
    add_lora(fresh, blocks, config["rank"], config["alpha"], config["dropout"])
    config = {**config, "adapt": [str(block) for block in blocks]}
    run = Run.resume(folder) if (folder / "config.json").exists() else Run.create(folder, config)
    train(fresh, saes, lambda skip: corpus.batches(config["batch_size"], skip), run, steps=config["steps"],
          lr=config["lr"], weight_decay=config["weight_decay"], clip=config["clip"], micro_batch=config["micro_batch"],
          keep_special=keep_special, decay=config["lr_decay"], ahead=config["ahead"], compiled=config["compile"])
    save_adapter(fresh, folder / "adapter", base_model=config["model"])
    run.finish({"seconds": run.seconds})
    return fresh


def bare(model):
    """The same model without adapters, sharing its weights."""
    with torch.device("meta"):
        fresh = Transformer(model.config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    fresh.load_state_dict(weights, assign=True)
    return fresh.requires_grad_(False).eval()


def show(numbers):
    print_table([[row["blocks"], row["improvement"], plus_minus(row["ci90"]["improvement"]),
                  percent(row["share_of_all_after"]), plus_minus(row["ci90"]["share_of_all_after"], ".1%"),
                  percent(row["gap_closed"])] for row in numbers["rows"]],
                ["adapters on", "improvement (nats)", "90 % CI", "of all after", "90 % CI", "gap closed"])


def draw(numbers, figure):
    """Figure 9: the improvement by a single block's adapters, against all blocks after the SAE."""
    figure.set_size_inches(6, 3.6)
    axes, (whole, *rest) = figure.subplots(), numbers["rows"]
    single = [row for row in rest if row["blocks"].startswith("block ")] or [whole]
    distance = [int(row["blocks"].split()[1]) - numbers["sae_layer"] for row in single]
    gains, halves = zip(*((row["improvement"], row["ci90"]["improvement"] or 0) for row in single))
    axes.errorbar(distance, gains, halves, capsize=4, marker="o", label="one block")
    for x, y, row in zip(distance, gains, single):
        axes.annotate(percent(row["share_of_all_after"]), (x, y), (8, 5), textcoords="offset points")
    axes.axhline(whole["improvement"], color="C1", linestyle="--", label=f"all after the SAE ({whole['blocks']})")
    axes.set(xlabel="blocks after the SAE", ylabel="CE improvement (nats/token)", ylim=(1.2 * min(0, *gains), None))
    axes.set_title("Adapters on one block, in % of all after the SAE (the paper's Figure 9)", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.15)
    axes.legend(loc="lower left")
