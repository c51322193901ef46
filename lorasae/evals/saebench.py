"""What the suites of SAEBench share (Karvonen et al. 2024; paper §5.1, Tables 3 and 6): texts read, models compared, a table.

The SAE only reads the residual stream x at the output of its block, nothing is spliced in. A text is represented by means
over its tokens: of x, and of the latents z. Padding, BOS and EOS never count. Base and adapted model see the same texts,
draws and batches, seed by seed, so differences are paired; intervals are 90 %, over seeds.

Shapes: N texts, T tokens, D d_model, M latents.
"""
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from lorasae.errors import InputError
from lorasae.evals.common import evaluating, interval, plus_minus, print_table, progress
from lorasae.evals.probes import Task
from lorasae.io import labelled_saebench, labelled_stdlib
from lorasae.io.labelled import DataSet, file_classes, file_pair
from lorasae.lora import adapters, base

LENGTH = 128                                            # tokens of a text, BOS included
FIRST_SEED = 42                                         # SAEBench's only one
MODELS = ("base", "lora")


def add_options(add):
    add("--labelled", default="stdlib", metavar="WHAT", help="texts of probing, scr and tpp: stdlib, saebench (or some of its sets by name, "
        "comma-separated), or a file of JSON lines with text, label and, for scr, attribute (default: %(default)s)")
    add("--seeds", type=int, default=5, metavar="N", help="how often each number of these and of absorption is measured anew; the paper measured once "
        "(default: %(default)s)")


def class_sets(source, suite):
    """The data sets of classes that --labelled names, for "probing" or "tpp"."""
    if source == "stdlib":
        return labelled_stdlib.class_sets(suite)
    if source.endswith((".jsonl", ".json")):
        return [DataSet(Path(source).name, partial(file_classes, source))]
    return labelled_saebench.chosen(source, suite)


def pair_sets(source):
    """The data sets of two classes and two attributes that --labelled names, for SCR."""
    if source == "stdlib":
        return labelled_stdlib.pair_sets()
    if source.endswith((".jsonl", ".json")):
        return [DataSet(Path(source).name, partial(file_pair, source))]
    return labelled_saebench.chosen(source, "scr")


# ---- What the SAE reads ---------------------------------------------------------------------------------------------

def reading(setting, suite):
    """(layer, SAE) that a suite reads. InputError where no adapter lies before it: adapting would change nothing there."""
    layer, sae = next(iter(setting.saes.items()))
    blocks = {int(name.split("layers.")[1].split(".")[0]) for name in adapters(setting.model)}
    if min(blocks) > layer:
        raise InputError(f"every adapter lies after block {layer}, whose output is all that --suite {suite} reads: its numbers "
                         "would be exactly those of the base model. Evaluate a run with adapters on all blocks: python "
                         f"train.py --model {setting.config.model} --layer {layer} --sae {setting.config.sae[0]} --adapt all")
    return layer, sae


class Texts(NamedTuple):
    """Texts as tokens, padded on the right, where a causal model cannot see it."""
    tokens: torch.Tensor                                # [N, T]
    counted: torch.Tensor                               # [N, T] bool: neither padding nor BOS nor EOS


def tokenise(corpus, model, texts, length=LENGTH):
    """[N] strings -> Texts, each BOS and at most length - 1 tokens, as long as the longest of them."""
    encodings = corpus.tokenizer.encode_batch(texts, add_special_tokens=False)
    rows = [torch.tensor([corpus.bos, *encoding.ids[:length - 1]]) for encoding in encodings]
    lengths = torch.tensor([len(row) for row in rows])
    tokens = pad_sequence(rows, batch_first=True, padding_value=corpus.eos)
    real = torch.arange(tokens.shape[1]) < lengths[:, None]
    return Texts(tokens, real & ~model.special(tokens))


class Means(NamedTuple):
    """Each text's means over its counted tokens, fp32."""
    residual: torch.Tensor                              # [N, D]
    latents: torch.Tensor                               # [N, M]
    counted: torch.Tensor                               # [N]: how many tokens these are means of


@torch.no_grad()
def read_means(model, sae, layer, texts, batch=64):
    """Texts -> Means, by batches of texts of about the same length, as many as fit a gigabyte of latents."""
    tokens, counted = texts
    latents = len(sae.W_dec)
    batch = max(1, min(batch, 2 ** 28 // (tokens.shape[1] * latents)))
    count = counted.sum(1)
    residual = torch.empty(len(tokens), sae.W_dec.shape[1], device=model.device)
    z = torch.empty(len(tokens), latents, device=model.device)

    ends = (counted * torch.arange(1, tokens.shape[1] + 1)).amax(1)
    for chosen in ends.argsort().split(batch):
        end = max(int(ends[chosen].max()), 1)
        weights = counted[chosen, :end].float() / count[chosen, None].clamp(min=1)
        weights = weights[:, None].to(model.device)                             # [B, 1, T]
        x = model.run(model.embed(tokens[chosen, :end].to(model.device)), 0, layer + 1)
        residual[chosen] = (weights @ x.float()).squeeze(1)
        z[chosen] = (weights @ sae.encode(x).float()).squeeze(1)
    return Means(residual, z, count.to(model.device))


# ---- Tasks ----------------------------------------------------------------------------------------------------------

def one_against_rest(sizes, seed, device="cpu"):
    """The task of each class: all its texts against as many of the others, drawn evenly from them.

    sizes: texts of each class, in the order of the table. As in SAEBench ceil(n / (m - 1)) of each other class are drawn,
    then n of these; here once a seed, and not anew each time an accuracy is asked for.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    rows = []
    for label, size in enumerate(sizes):
        positive = starts[label] + torch.arange(size)
        each = -(-size // (len(sizes) - 1))
        others = [starts[i] + torch.randperm(sizes[i], generator=generator)[:each] for i in range(len(sizes)) if i != label]
        others = torch.cat(others)
        negative = others[torch.randperm(len(others), generator=generator)[:size]]
        rows.append(torch.cat([positive, negative]))
    rows = torch.stack(rows)
    labels = (torch.arange(rows.shape[1]) < rows.shape[1] // 2).long().expand_as(rows)
    return Task(rows.to(device), labels.to(device))


# ---- Base against adapted -------------------------------------------------------------------------------------------

def compare(setting, options, suite, sets, measure):
    """{data set: {"base" and "lora": [scores of each seed]}}; measure(layer, SAE, train Means, test Means, cut, seed) -> scores.

    Texts are those of the data set's Cut in the order of its dicts.
    """
    layer, sae = reading(setting, suite)
    model, corpus = setting.model, setting.corpus
    if options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: expected 1 or more")
    jobs = [(data, seed) for data in sets for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)]
    found = {data.name: {name: [] for name in MODELS} for data in sets}

    with evaluating(model):
        for data, seed in progress(jobs, suite):
            cut = data.cut(seed)
            sides = [tokenise(corpus, model, sum(side.values(), [])) for side in cut]
            for name in MODELS:
                with base(model) if name == "base" else nullcontext():
                    train, test = (read_means(model, sae, layer, texts) for texts in sides)
                found[data.name][name].append(measure(sae, train, test, cut, seed))
    return found


def over_sets(found):
    """{"base" and "lora": [scores a seed]}: the mean over data sets, as SAEBench takes it."""
    out = {}
    for name in MODELS:
        by_seed = zip(*(models[name] for models in found.values()))
        out[name] = [mean_scores(scores) for scores in by_seed]
    return out


def mean_scores(scores):
    """[{metric: value}] -> {metric: mean}."""
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


def rows(by_seed):
    """[scores a seed] of each model -> {metric: means, their difference, and 90 % intervals over seeds}."""
    out = {}
    for metric in by_seed["base"][0]:
        values = {name: torch.tensor([scores[metric] for scores in by_seed[name]]).double() for name in MODELS}
        row = out[metric] = {}
        for name in MODELS:
            row[name], row[f"{name}_ci90"] = interval(values[name])
        row["difference"], row["ci90"] = interval(values["lora"] - values["base"])
    return out


def show_rows(numbers, labels, paper, tolerance):
    """Prints {metric: row} as Table 6 does: labels {metric: its name there}, paper {metric: (LoRA, base)}."""
    table = []
    for metric, label in labels.items():
        row = numbers["rows"].get(metric)
        if row is None:
            continue
        published = [f"{value:.3f}" for value in reversed(paper[metric])] if metric in paper else ["", ""]
        table.append([label, f"{row['base']:.3f}", f"{row['lora']:.3f}", f"{row['difference']:+.3f}",
                      plus_minus(row["ci90"], ".3f"), *published])
    print_table(table, ["", "base", "LoRA", "difference", "90 % CI", "paper: base", "paper: LoRA"])
    print(f"\nlayer {numbers['layer']}, {numbers['seeds']} seeds, {', '.join(numbers['sets'])}. The paper has one seed, and its "
          f"differences lie within {tolerance}, by which\nSAEBench's own reruns differ; other models and texts than the "
          "paper's have other levels.")
