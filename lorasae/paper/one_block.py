"""Which block's adapters matter (paper §6.3, Figure 9): adapters on one block after the SAE, against on all of them.

    python eval.py RUN_DIR --suite layers

trains them, each with the run's own configuration, into RUN_DIR/layers/block-N (run folders, which eval.py opens too).
Interrupted, the same command continues. The paper: block 13 alone does 88 % of what blocks 13 to 25 do.
"""
from contextlib import closing
from dataclasses import replace

import torch

from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.common import interval, percent, plus_minus, print_table, ratio
from lorasae.io.adapters import load_adapter
from lorasae.io.disk import read_json
from lorasae.lora import blocks_with_adapters
from lorasae.model import Transformer
from lorasae.runs import adaptation
from lorasae.runs.folder import Run


def evaluate(setting, options):
    """The improvement CE_sae - CE_adapted (nats) of every set of blocks."""
    model, saes, config, folder = setting.model, setting.saes, setting.config, setting.folder
    after = list(range(min(saes) + 1, len(model.layers)))
    if not after:
        raise InputError(f"the SAE at layer {min(saes)} has no block after it whose adapters --suite layers could compare")
    own = blocks_with_adapters(model)
    single = [[block] for block in after] if len(after) > 1 else []
    wanted = [after, *single] + [own] * (own not in [after, *single])
    folders = {label(blocks): folder / "layers" / label(blocks).replace(" ", "-") for blocks in wanted if blocks != own}
    announce(folder, folders)

    before = losses(setting, model, "base", "sae")
    found = {}
    for blocks in wanted:
        student = model if blocks == own else adapted(setting, blocks, folders[label(blocks)])
        found[label(blocks)] = losses(setting, student, "adapted")["adapted"]

    rows = []
    spliced = before["sae"]
    gap = spliced["ce"] - before["base"]["ce"]
    of_all_after = spliced["ce"] - found[label(after)]["ce"]
    for name, now in found.items():
        gain = spliced["ce"] - now["ce"]
        improvement, half = interval(gain)
        share, share_half = ratio(gain, of_all_after)
        rows.append({"blocks": name, "improvement": improvement, "share_of_all_after": share,
                     "gap_closed": ratio(gain, gap)[0] if fidelity.costs(*interval(gap)) else None,
                     "kl_gap_closed": ratio(spliced["kl"] - now["kl"], spliced["kl"])[0],
                     "ci90": {"improvement": half, "share_of_all_after": share_half}})
    return {"sae_layer": min(saes), "rows": rows, "train_tokens": config.tokens}


def announce(folder, folders):
    """Says what is still to be trained, and how long that takes."""
    missing = [name for name, each in folders.items() if not (each / "results.json").exists()]
    if missing:
        minutes = len(missing) * read_json(folder / "results.json")["seconds"] / 60
        print(f"training adapters on {'; '.join(missing)}: about {minutes:.0f} minutes, by the run's own time", flush=True)


def losses(setting, model, *settings):
    """{setting: {"ce": [n], "kl": [n]}} over the held-out sequences."""
    batches = setting.corpus.validation.split(setting.config.eval_batch)
    return fidelity.measure(model, setting.saes, batches, settings)


def label(blocks):
    if len(blocks) == 1:
        return f"block {blocks[0]}"
    whole = blocks[-1] - blocks[0] == len(blocks) - 1
    return f"blocks {blocks[0]} to {blocks[-1]}" if whole else "blocks " + " ".join(map(str, blocks))


def adapted(setting, blocks, folder):
    """The model with adapters on `blocks` alone: loaded from `folder`, or trained into it, or what is missing of that."""
    model = bare(setting.model)
    if (folder / "results.json").exists():
        return load_adapter(model, folder / "adapter")
    config = replace(setting.config, adapt=tuple(map(str, blocks)), shard=False)
    run = Run.resume(folder) if (folder / "config.json").exists() else Run.create(folder, config)
    with closing(run):
        run.begin()
        students = adaptation.new_students(model, blocks, config)
        adaptation.train(setting._replace(model=model, config=config), run, students)
        adaptation.save(model, run, students)
        run.finish({"seconds": run.seconds})
    return model


def bare(model):
    """The same model without adapters, sharing its weights."""
    with torch.device("meta"):
        fresh = Transformer(model.config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" not in name}
    fresh.load_state_dict(weights, assign=True)
    return fresh.requires_grad_(False).eval()


def show(numbers):
    rows = []
    for row in numbers["rows"]:
        half = row["ci90"]
        rows.append([row["blocks"], row["improvement"], plus_minus(half["improvement"]), percent(row["share_of_all_after"]),
                     plus_minus(half["share_of_all_after"], ".1%"), percent(row["gap_closed"]), percent(row["kl_gap_closed"])])
    print_table(rows, ["adapters on", "improvement (nats)", "90 % CI", "of all after", "90 % CI", "gap closed", "KL gap closed"])


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
