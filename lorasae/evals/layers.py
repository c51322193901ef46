"""Which block's adapters matter (paper §6.3, Figure 9): adapters on one block after the SAE at a time, against on all of them.

    python eval.py RUN_DIR --suite layers

trains them, each with the run's own configuration, into RUN_DIR/layers/block-N (whole run folders, which eval.py opens
too). Interrupted, the same command continues. The paper: block 13 alone does 88 % of what blocks 13 to 25 do.
"""
import torch

from lorasae.adapt import train
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.common import interval, plus_minus, ratio
from lorasae.lora import add_lora, adapters, load_adapter, save_adapter
from lorasae.model import Transformer
from lorasae.run import Run, print_table


def evaluate(config, setting, folder):
    """config and setting of the run in `folder` -> the improvement CE_sae - CE_adapted (nats) for every set of blocks."""
    model, saes, corpus, keep_special = setting
    after = list(range(min(saes) + 1, len(model.layers)))
    if not after:
        raise InputError(f"there is no block after the SAE at layer {min(saes)}, so nothing for --suite layers to compare")
    own = sorted({int(name.split(".")[2]) for name in adapters(model)})
    wanted = [after] + [[block] for block in after if len(after) > 1]
    missing = [blocks for blocks in wanted if blocks != own and not (place(folder, blocks) / "results.json").exists()]
    if missing:
        print(f"training adapters on {', '.join(label(blocks) for blocks in missing)}, each as long as the run itself or less",
              flush=True)
    held_out = corpus.validation.split(config["micro_batch"])
    ce = fidelity.evaluate(model, saes, held_out, ("base", "sae"), keep_special)
    ce = {name: values["ce"] for name, values in ce.items()}

    def improvement(model):
        return ce["sae"] - fidelity.evaluate(model, saes, held_out, ("adapted",), keep_special)["adapted"]["ce"]

    gains = {}
    for blocks in wanted + [own] * (own not in wanted):
        gains[label(blocks)] = improvement(
            model if blocks == own else adapted(config, setting, blocks, place(folder, blocks)))
    rows = []
    for name, gain in gains.items():
        mean, half = interval(gain)
        share, share_half = ratio(gain, gains[label(after)])
        rows.append({"blocks": name, "improvement": mean, "share_of_all_after": share, "gap_closed":
                     ratio(gain, ce["sae"] - ce["base"])[0], "ci90": {"improvement": half, "share_of_all_after": share_half}})
    return {"sae_layer": min(saes), "rows": rows, "train_tokens": config["tokens"]}


def label(blocks):
    gaps = any(b - a > 1 for a, b in zip(blocks, blocks[1:]))
    return (f"block {blocks[0]}" if len(blocks) == 1 else "blocks " + ", ".join(map(str, blocks)) if gaps else
            f"blocks {blocks[0]} to {blocks[-1]}")


def place(folder, blocks):
    return folder / "layers" / label(blocks).replace(", ", "-").replace(" ", "-")


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
    train(fresh, saes, lambda skip: corpus.batches(config["batch_size"], skip), run, steps=config["steps"], lr=config["lr"],
          weight_decay=config["weight_decay"], clip=config["clip"], micro_batch=config["micro_batch"], keep_special=keep_special)
    save_adapter(fresh, folder / "adapter", base_model=config["model"])
    run.finish({"seconds": run.seconds})
    return fresh


def bare(model):
    """The same model without adapters, sharing its weights."""
    with torch.device("meta"):
        fresh = Transformer(model.config)
    fresh.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}, assign=True)
    return fresh.requires_grad_(False).eval()


def show(numbers):
    print_table([[row["blocks"], row["improvement"], plus_minus(row["ci90"]["improvement"]),
                  f"{row['share_of_all_after']:.1%}", plus_minus(row["ci90"]["share_of_all_after"], ".1%"),
                  f"{row['gap_closed']:.1%}"] for row in numbers["rows"]],
                ["adapters on", "improvement (nats)", "90 % CI", "of all after", "90 % CI", "gap closed"])


def draw(numbers, figure):
    """Figure 9: the improvement by a single block's adapters, against all blocks after the SAE."""
    figure.set_size_inches(6, 3.6)
    axes, (whole, *rest) = figure.subplots(), numbers["rows"]
    single = [row for row in rest if row["blocks"].startswith("block ")] or [whole]
    distance = [int(row["blocks"].split()[1]) - numbers["sae_layer"] for row in single]
    axes.errorbar(distance, [row["improvement"] for row in single], capsize=4, marker="o",
                  yerr=[row["ci90"]["improvement"] or 0 for row in single], label="one block")
    axes.axhline(whole["improvement"], color="C1", linestyle="--", label=f"all after the SAE ({whole['blocks']})")
    axes.set(xlabel="blocks after the SAE", ylabel="CE improvement (nats/token)", ylim=(0, None),
             title="Adapters on a single block (the paper's Figure 9)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    percent = axes.secondary_yaxis("right", functions=(lambda y: 100 * y / whole["improvement"],
                                                       lambda p: p * whole["improvement"] / 100))
    percent.set_ylabel("% of all blocks after")
    axes.legend()
