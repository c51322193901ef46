"""What the suites of SAEBench share (Karvonen et al. 2024; paper §5.1, Tables 3 and 6): texts read, models compared.

The SAE only reads the residual stream x at the output of its block; nothing is spliced in. A text stands for the means
over its tokens, of x and of the latents z. Padding, BOS and EOS never count. Base and adapted model see the same texts,
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
from lorasae.evals import firing
from lorasae.evals.common import evaluating, interval, plus_minus, print_table, progress
from lorasae.evals.probes import Task
from lorasae.evals import labelled_saebench, labelled_stdlib
from lorasae.evals.labelled import DataSet, file_classes, file_pair
from lorasae.lora import base

LENGTH = 128                                            # tokens of a text, BOS included
FIRST_SEED = 42                                         # SAEBench's only one
MODELS = ("base", "lora")
CELLS = 2 ** 28                                         # latents held at a time: a gigabyte of fp32


def add_options(add):
    add("--labelled", default="stdlib", metavar="WHAT", help="texts of probing, scr, tpp: stdlib, saebench (or some of its "
        "sets by name, comma-separated), or a file of JSON lines with text, label, for scr attribute (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="how often each number, of absorption too, is measured anew; "
        "the paper measured once (default: %(default)s)")


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


# ---- What the SAE reads --------------------------------------------------------------------------

def reading(setting, suite):
    """(layer, SAE) that a suite reads. InputError where no adapter lies before it: adapting changes nothing there."""
    layer, sae = next(iter(setting.saes.items()))
    firing.refuse_nothing_new(setting, suite)
    return layer, sae


class Texts(NamedTuple):
    """Texts as tokens, padded on the right, where a causal model cannot see it."""
    tokens: torch.Tensor                                # [N, T]
    counted: torch.Tensor                             # [N, T] bool: neither padding nor BOS nor EOS


def tokenise(corpus, model, texts, length=LENGTH):
    """[N] strings -> Texts, each BOS and at most length - 1 tokens, as long as the longest of them."""
    rows = []
    for encoding in corpus.tokenizer.encode_batch(texts, add_special_tokens=False):
        rows.append(torch.tensor([corpus.bos, *encoding.ids[:length - 1]]))

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
    """Texts -> Means on the model's device, by batches of texts of about the same length."""
    tokens, counted = texts
    count = counted.sum(1)
    residual = torch.empty(len(tokens), sae.W_dec.shape[1], device=model.device)
    latents = torch.empty(len(tokens), len(sae.W_dec), device=model.device)

    places = torch.arange(1, tokens.shape[1] + 1)
    ends = (counted * places).amax(1).clamp(min=1)      # what follows a text's last counted token is not even read
    batch = max(1, min(batch, CELLS // (tokens.shape[1] * len(sae.W_dec))))

    for chosen in ends.argsort().split(batch):
        end = int(ends[chosen].max())
        weights = counted[chosen, :end] / count[chosen, None].clamp(min=1)
        weights = weights[:, None].to(model.device)                             # [B, 1, T]
        x = model.run(model.embed(tokens[chosen, :end].to(model.device)), 0, layer + 1)
        residual[chosen] = (weights @ x.float()).squeeze(1)
        latents[chosen] = (weights @ sae.encode(x).float()).squeeze(1)
    return Means(residual, latents, count.to(model.device))


# ---- Tasks ---------------------------------------------------------------------------------------

def one_against_rest(sizes, seed, device="cpu"):
    """The task of each class: all its texts against as many of the others, drawn evenly from them.

    sizes: texts of each class, equal, in the order of the table. As in SAEBench ceil(n / (m - 1)) of each other class
    are drawn, then n of these; but once a seed, where SAEBench draws test texts anew for each accuracy.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.arange(sum(sizes)).split(list(sizes))
    rows = []
    for label, positive in enumerate(table):
        each = -(-len(positive) // (len(table) - 1))
        others = []
        for other, texts in enumerate(table):
            if other != label:
                others.append(texts[torch.randperm(len(texts), generator=generator)[:each]])
        others = torch.cat(others)
        negative = others[torch.randperm(len(others), generator=generator)[:len(positive)]]
        rows.append(torch.cat([positive, negative]))
    return halves(rows, device)


def halves(rows, device="cpu"):
    """Rows of texts, of which the first half is positive -> Task."""
    rows = torch.stack(rows).to(device)
    positive = torch.arange(rows.shape[1], device=device) < rows.shape[1] // 2
    return Task(rows, positive.long().expand_as(rows))


# ---- Base against adapted ------------------------------------------------------------------------

def compare(setting, options, suite, sets, measure):
    """{data set: {"base" and "lora": [scores of each seed]}}.

    measure(SAE, Means of training texts, of test texts, Cut, seed) -> {metric: value}; the texts are the Cut's, in the
    order of its dicts.
    """
    layer, sae = reading(setting, suite)
    model, corpus = setting.model, setting.text
    if options.seeds < 1:
        raise InputError(f"--seeds {options.seeds}: expected 1 or more")
    jobs = [(data, seed) for data in sets for seed in range(FIRST_SEED, FIRST_SEED + options.seeds)]
    found = {data.name: {name: [] for name in MODELS} for data in sets}

    with evaluating(model):
        for data, seed in progress(jobs, suite):
            cut = data.cut(seed)
            sides = []
            for side in cut:
                texts = [text for of_class in side.values() for text in of_class]
                sides.append(tokenise(corpus, model, texts))

            for name in MODELS:
                with base(model) if name == "base" else nullcontext():
                    train, test = [read_means(model, sae, layer, texts) for texts in sides]
                found[data.name][name].append(measure(sae, train, test, cut, seed))
    return found


def over_sets(found):
    """{"base" and "lora": [scores a seed]}: the mean over data sets, as SAEBench takes it."""
    out = {}
    for name in MODELS:
        of_sets = [models[name] for models in found.values()]
        out[name] = [mean_scores(of_seed) for of_seed in zip(*of_sets)]
    return out


def mean_scores(scores):
    """[{metric: value}] -> {metric: mean}."""
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


def rows(by_seed):
    """[scores a seed] of each model -> {metric: means, their difference, and 90 % intervals over seeds}."""
    out = {}
    for metric in by_seed["base"][0]:
        row, values = {}, {}
        for name in MODELS:
            values[name] = torch.tensor([scores[metric] for scores in by_seed[name]]).double()
            row[name], row[f"{name}_ci90"] = interval(values[name])
        row["difference"], row["ci90"] = interval(values["lora"] - values["base"])
        out[metric] = row
    return out


def show_rows(numbers, labels, paper, tolerance):
    """Prints the rows as Table 6 does: labels {metric: its name there}, paper {metric: (LoRA, base)}."""
    table = []
    for metric, label in labels.items():
        if metric not in numbers["rows"]:
            continue
        row = numbers["rows"][metric]
        cells = [label, f"{row['base']:.3f}", f"{row['lora']:.3f}", f"{row['difference']:+.3f}",
                 plus_minus(row["ci90"], ".3f")]
        if metric in paper:
            lora, without = paper[metric]
            cells += [f"{without:.3f}", f"{lora:.3f}", f"{lora - without:+.3f}"]
        else:
            cells += ["", "", ""]
        table.append(cells)

    print_table(table, ["", "base", "LoRA", "difference", "90 % CI", "paper: base", "LoRA", "difference"])
    print(f"\nlayer {numbers['layer']}, {numbers['seeds']} seeds, {', '.join(numbers['sets'])}")
    print(f"Table 3's differences come from one seed; none exceeds the {tolerance} by which SAEBench's reruns differ.")
    print("The paper's levels are those of another model, other texts and a wider SAE.")
