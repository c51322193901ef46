"""Adapt a language model to its sparse autoencoders, or train the autoencoder itself.

    python train.py                                             the embedded tiny Gemma-2: no network, minutes on a CPU
    python train.py --model gemma-2-2b --layer 12 --rank 64     the paper's headline run
    python train.py --model llama-3.2-1b --method topk          train an SAE (also: jumprelu, e2e)
    python train.py --resume runs/tiny-gemma-2-lora             continue a run that was interrupted
    python train.py --merge runs/tiny-gemma-2-lora              write the adapted model as a plain Hugging Face checkpoint
    python train.py --model gemma-2-2b --dry-run                say what would be fetched and done, and stop
"""
import argparse
import sys
from pathlib import Path

import torch

from lorasae.runs import distributed
from lorasae.adapt import adapted_blocks, default_adapt, train
from lorasae.dictionary import fill, make
from lorasae.io.checkpoint import DTYPES, load_config, load_model, save_model
from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.io.disk import read_json, write_bytes, write_json
from lorasae.io.hub import model_files, model_plan, sae_choice, sae_plan
from lorasae.io.presets import PRESETS, Preset, preset
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.lora import add_lora, attach_lora, detach_lora, lora_parameters, merge_lora
from lorasae.model import Transformer
from lorasae.runs.folder import Run, check_free, count, load_saes, load_setting, peak_memory_bytes, print_table, sae_sources, versions

PAPER = Preset("any other model", layer=12, adapt="after", data="stdlib")       # its field defaults are the paper's


def arguments(argv):
    """The parsed arguments; those left at None take the preset's value in `configure`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group("what").add_argument
    add("--model", default="tiny-gemma-2", help=f"a preset ({', '.join(PRESETS)}), a Hub repository OWNER/NAME, or a local "
        "folder (default: %(default)s)")
    add("--method", default="lora", choices=["lora", "topk", "jumprelu", "e2e"],
        help="lora adapts the model to its SAE; the others train an SAE (default: %(default)s)")
    add("--layer", type=int, nargs="+", help="block(s) whose output an SAE replaces, from 0 (default: the preset's; paper: 12)")
    add("--sae", nargs="+", help="file, folder, Hub path or run folder; one for all layers or one a layer (default: the preset's)")
    add("--width", help="latents of the SAE to choose, such as 16k; of the SAE to train, such as 16384 (default: the preset's; "
        "paper: 8 d_model)")
    add("--llama-scope", choices=["openmoss", "sae_lens", "sae_lens_legacy"], default="openmoss", help="how to read Llama Scope "
        "files: their authors' arithmetic, or SAELens's; legacy is what the paper ran, with L0 far too high (default: %(default)s)")
    add("--l0", type=float, help="average active latents of the SAE to choose, or that jumprelu is to reach (default: the preset's)")
    add = parser.add_argument_group("training an SAE").add_argument
    add("--k", type=int, help="active latents of topk and e2e (default: the preset's; paper: 64)")
    add("--auxk", action="store_true", help="topk and e2e: revive dead latents by AuxK (the paper does without)")
    add("--dead-after", type=count, default="10M", help="tokens after which a latent that never fired is dead (default: %(default)s)")
    add = parser.add_argument_group("adapters").add_argument
    add("--rank", type=int, nargs="+", help="rank of every adapter; several, as in 1 4 16 64 256, train side by side in one pass and "
        "end as runs of their own would (default: the preset's; paper: 64)")
    add("--alpha", type=float, default=32, help="the adapters are scaled by alpha / rank (default: %(default)s at every rank)")
    add("--dropout", type=float, help="dropout probability on the adapters' input (default: the preset's; paper: 0.1)")
    add("--adapt", nargs="+", metavar="BLOCKS", help="after (the SAE), all, next, or block numbers "
        "(default: after for JumpReLU SAEs, whose L0 would move otherwise, all for TopK)")
    add = parser.add_argument_group("text").add_argument
    add("--data", help="stdlib, pile, a file, a folder, or hf://datasets/... (default: the preset's)")
    add("--field", help="JSON field that holds the text (default: text, or raw_content)")
    add("--tokens", type=count, help="training tokens, such as 15M (default: the preset's; paper: 15M)")
    add("--eval-tokens", type=count, help="held-out tokens (default: the preset's; paper: 1M)")
    add("--context", type=int, help="tokens a sequence, BOS included (default: the preset's; paper: 1024)")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, help="sequences a step (default: the preset's; paper: 1)")
    add("--micro-batch", type=int, help="sequences that pass through the model at once; less memory, same step "
        "(default: the whole batch)")
    add("--lr", type=float, help="AdamW's constant learning rate (default: the preset's; paper: 5e-5)")
    add("--lr-decay", action=argparse.BooleanOptionalAction, help="let it fall linearly to 0: better where steps are few "
        "(default: the preset's; paper: --no-lr-decay)")
    add("--weight-decay", type=float, default=0.01, help="AdamW's weight decay (default: %(default)s)")
    add("--clip", type=float, default=1.0, help="bound on the gradient norm of the KL summed over a sequence "
        "(default: %(default)s)")
    add("--seed", type=int, default=42, help="of adapters, dropout and the order of the text (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add("--dtype", choices=["float32", "bfloat16"], help="of the frozen model; adapters are float32 (default: the preset's)")
    add("--sae-dtype", choices=["float32", "bfloat16"], help="of the SAE's matrices (default: the preset's; paper: float32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"], help="(default: %(default)s)")
    add("--compile", action=argparse.BooleanOptionalAction, help="put blocks and loss through torch.compile (default: on a GPU)")
    add("--ahead", type=int, metavar="SEQUENCES", help="sequences whose frozen part, the prefix and the teacher, runs at once, "
        "before their steps (default: 8 on a GPU, else 1)")
    add("--shard", action="store_true", help="with torchrun: spread the frozen blocks over the processes, for models that do not fit")
    add("--out", help="folder of the run (default: runs/MODEL-METHOD, numbered where that is taken)")
    add("--resume", metavar="RUN_DIR", help="continue that run from its last checkpoint, with its own arguments")
    add("--checkpoint-every", type=int, default=250, metavar="STEPS", help="steps a killed run can lose (default: %(default)s)")
    add("--merge", metavar="RUN_DIR", help="fold that run's adapters into its model, write RUN_DIR/merged/, and stop")
    add("--dry-run", action="store_true", help="print files and sizes to fetch, parameters, memory and steps, and stop")
    args = parser.parse_args(argv)
    for option in ("--resume", "--merge"):
        if getattr(args, option[2:]) and [word for word in argv if word.startswith("--") and not word.startswith(option)]:
            parser.error(f"{option} takes every other argument from the run's config.json: pass it alone")
    return args


def configure(args):
    """Arguments -> the run's configuration: everything that is needed to repeat it, defaults filled in."""
    defaults = preset(args.model) or PAPER
    config = {key: value for key, value in vars(args).items() if key not in ("out", "resume", "merge", "dry_run")}
    for key in ("k",) if args.method == "lora" else ("rank", "dropout", "adapt", "lr_decay"):
        if config[key] is not None:
            raise InputError(f"--{key.replace('_', '-')} has no effect with --method {args.method}: leave it out")
    if args.method != "lora":
        if args.sae is not None:
            raise InputError(f"--method {args.method} trains an SAE from scratch: leave --sae out")
        config = fill(config, defaults)
    else:
        for key in ("rank", "dropout", "data", "tokens", "eval_tokens", "context", "batch_size", "lr", "lr_decay", "dtype",
                    "sae_dtype"):
            if config[key] is None:
                config[key] = getattr(defaults, key)
        config["layer"] = config["layer"] or [defaults.layer]
        if config["sae"] is None:                       # the preset's own SAEs, with their width, L0 and adapted blocks
            if defaults is PAPER:
                load_config(args.model)                 # that there is no such model is said first
            chosen = [sae_choice(args.model, layer=layer, width=args.width, l0=args.l0) for layer in config["layer"]]
            config["sae"], config["width"] = [chosen[0][0]], chosen[0][1]["width"]
            config["l0"] = chosen[0][1]["l0"] if len(chosen) == 1 else args.l0
            config["adapt"] = config["adapt"] or [defaults.adapt]
    config["micro_batch"] = config["batch_size"] if config["micro_batch"] is None else config["micro_batch"]
    if config["shard"] and (config["method"] != "lora" or isinstance(config["rank"], list) and len(config["rank"]) > 1):
        raise InputError("--shard is for adapters of one rank: leave it out")
    config["compile"] = config["device"] == "cuda" if config["compile"] is None else config["compile"]
    config["ahead"] = (8 if config["device"] == "cuda" else 1) if config["ahead"] is None else config["ahead"]
    for key in ("rank", "batch_size", "micro_batch", "context", "checkpoint_every", "lr", "clip", "alpha", "ahead"):
        values = config[key] if isinstance(config[key], list) else [config[key]]
        if any(value is not None and value <= 0 for value in values):
            raise InputError(f"--{key.replace('_', '-')} is {min(values)}, but it must be positive")
    for key in ("weight_decay", "seed"):
        if config[key] < 0:
            raise InputError(f"--{key.replace('_', '-')} is {config[key]}, but it must not be negative")
    if isinstance(config["rank"], list):
        if len(set(config["rank"])) < len(config["rank"]):
            raise InputError(f"--rank {' '.join(map(str, config['rank']))} names a rank twice")
        config["rank"] = config["rank"] if len(config["rank"]) > 1 else config["rank"][0]
    config["steps"] = -(-config["tokens"] // (config["batch_size"] * config["context"]))
    return config


def default_folder(config):
    """runs/MODEL-METHOD, or the first of -2, -3, ... that is free."""
    name = f"{Path(config['model']).name}-{config['method']}"
    taken = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in range(1, 10**6))
    return next(folder for folder in taken if not folder.exists())


def adapt(config, folder, run=None):
    """--method lora: evaluates, trains the adapters, saves them, evaluates again. run: the one to resume."""
    model, saes, corpus, keep_special = load_setting(config, shard=config["shard"])
    blocks = adapted_blocks(config["adapt"] or default_adapt(saes), saes, len(model.layers))
    if not blocks:
        raise InputError(f"no block comes after the SAE at layer {max(saes)}: pass --adapt all, or another --layer")
    ranks, students = config["rank"] if isinstance(config["rank"], list) else [config["rank"]], []
    for rank in ranks:
        torch.manual_seed(config["seed"])
        students.append(detach_lora(add_lora(model, blocks, rank, config["alpha"], config["dropout"])))
    attach_lora(model, *students)
    if config["shard"]:
        distributed.shard(model, distributed.local(config["device"]))
    print(f"adapting blocks {', '.join(map(str, blocks))} of {config['model']} around the SAE at layer "
          f"{', '.join(map(str, saes))}: {sum(p.numel() for p in lora_parameters(model)):,} trainable parameters, "
          f"{config['steps']:,} steps of {config['batch_size']} x {config['context']} tokens", flush=True)
    held_out = corpus.validation.split(config["micro_batch"])
    before = fidelity.evaluate(model, saes, held_out, ("base", "sae"), keep_special)
    run = run or Run.create(folder, config)             # nothing is written before everything has been read
    train(model, saes, lambda skip: corpus.batches(config["batch_size"], skip), run, steps=config["steps"], lr=config["lr"],
          weight_decay=config["weight_decay"], clip=config["clip"], micro_batch=config["micro_batch"], keep_special=keep_special,
          decay=config["lr_decay"], students=students, ahead=config["ahead"], compiled=config["compile"])
    places = [run.folder / f"rank-{rank}" if len(ranks) > 1 else run.folder for rank in ranks]
    for place, student in zip(places, students):
        attach_lora(model, student)
        if distributed.rank() == 0:
            save_adapter(model, place / "adapter", base_model=config["model"])
    train_tokens = config["steps"] * config["batch_size"] * config["context"]
    shared = {"eval_tokens": corpus.validation.numel(), "train_tokens": train_tokens,
              "tokens_per_second": train_tokens / run.seconds, "seconds": run.seconds}
    results = {}
    for rank, place, student in zip(ranks, places, students):
        after = fidelity.evaluate(attach_lora(model, student), saes, held_out, ("adapted",), keep_special)
        results[rank] = {**fidelity.summary({**before, **after}), **shared,
                         "trainable_parameters": sum(p.numel() for p in lora_parameters(student)),
                         "peak_memory_bytes": peak_memory_bytes(config["device"])}
        report(results[rank], place)
        if len(ranks) > 1 and distributed.rank() == 0:  # a folder that eval.py and --merge take for a run of this rank
            write_json(place / "config.json", {**config, "rank": rank, "versions": versions()})
            write_json(place / "results.json", results[rank])
    run.finish(results[rank] if len(ranks) == 1 else {"ranks": results, **shared})


def dry_run(config):
    """Prints what a run would fetch, train and hold in memory, from configuration files and listings alone."""
    layers = config["layer"]
    wanted = [fetch for layer, source in (sae_sources(config) if config["method"] == "lora" else [])
              for fetch in sae_plan(source, layer=layer, width=config["width"], l0=config["l0"])]
    for fetch in model_plan(config["model"]) + wanted:
        print(f"{'here ' if fetch.cached else 'fetch'}  {fetch.bytes / 1e6:10,.1f} MB  {fetch.repo}/{fetch.path}")
    with torch.device("meta"):
        model = Transformer(load_config(config["model"]))
    frozen = sum(p.numel() for p in model.parameters())
    c, rows, itemsize = model.config, config["micro_batch"] * config["context"], DTYPES[config["dtype"]].itemsize
    if config["method"] == "lora":
        spec = config["adapt"] or (["after"] if wanted else default_adapt(load_saes(config, model, "cpu")))
        blocks = adapted_blocks(spec, dict.fromkeys(layers), len(model.layers))
        ranks = config["rank"] if isinstance(config["rank"], list) else [config["rank"]]
        trainable = sum(p.numel() for rank in ranks for p in lora_parameters(detach_lora(add_lora(model, blocks, rank))))
        width = 12 * c.hidden_size + 5 * c.intermediate_size + 4 * c.num_attention_heads * c.head_dim
        activations = len(ranks) * len(blocks) * rows * width * itemsize    # what backward needs of each adapted block
        print(f"\nadapted blocks        {blocks[0]} to {blocks[-1]} ({len(blocks)} of {len(model.layers)})"
              + ("" if config["adapt"] or not wanted else "; all of them if the SAE turns out to be a TopK"))
    else:
        latents = config["width"] or 8 * c.hidden_size
        thresholds = latents if config["method"] == "jumprelu" else 0
        trainable = latents * (2 * c.hidden_size + 1) + c.hidden_size + thresholds
        activations = rows * 4 * (4 * c.hidden_size + thresholds)       # a JumpReLU keeps every pre-activation
        print(f"\nSAE                   {latents:,} latents at the output of block {layers[0]}")
    weights, training = frozen * itemsize, trainable * 16           # fp32: value, gradient, and Adam's two averages
    saes = sum(fetch.bytes for fetch in wanted if not fetch.path.endswith(".json"))
    print(f"trainable parameters  {trainable:,} ({trainable / frozen:.2%} of {frozen:,})")
    print(f"training              {config['steps']:,} steps of {config['batch_size']} x {config['context']} = "
          f"{config['steps'] * config['batch_size'] * config['context']:,} tokens of {config['data']}")
    print(f"memory, about         {(weights + training + saes + activations) / 1e9:.1f} GB: model {weights / 1e9:.1f}, SAEs "
          f"to fetch {saes / 1e9:.1f}, training {training / 1e9:.1f}, activations {activations / 1e9:.1f}")


def merge(folder):
    """Writes folder/merged/: the adapted model (without SAE) as a checkpoint that transformers loads."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("method") != "lora":
        raise InputError(f"{folder} is no run that trained adapters: there is nothing to merge")
    if isinstance(config["rank"], list):
        raise InputError(f"{folder} holds a run of each rank: merge one of them, such as {folder}/rank-{config['rank'][0]}")
    if not (folder / "adapter").is_dir():
        raise InputError(f"{folder} has no adapter to merge: finish the run with python train.py --resume {folder}")
    source, target = model_files(config["model"]), folder / "merged"
    check_free(target)
    model = merge_lora(load_adapter(load_model(config["model"], dtype=config["dtype"]), folder / "adapter"))
    save_model(model, target, config=read_json(source / "config.json"))
    write_bytes(target / "tokenizer.json", (source / "tokenizer.json").read_bytes())
    print(f"{target}/ is the adapted model, without its SAE, as transformers.AutoModelForCausalLM loads it")


def report(results, folder):
    rows, headings = fidelity.table(results)
    print()
    print_table(rows, headings)
    closed = results["gap_closed"]
    l0 = ", ".join(f"{results['l0_sae'][layer]:.1f} -> {results['l0'][layer]:.1f}" for layer in results["l0"])
    print(f"\ngap closed {closed:.1%}" if closed is not None else "\nthe SAE costs nothing", f"  L0 {l0}",
          f"  {results['tokens_per_second']:,.0f} tokens/s", f"  {results['seconds']:.0f} s",
          f"  peak memory {results['peak_memory_bytes'] / 1e9:.2f} GB", sep=" ")
    print(f"{folder}/ holds config.json, metrics.jsonl, results.json, adapter/;  python eval.py {folder} recomputes the table")


def train_sae(config, folder, run=None):
    """--method topk, jumprelu, e2e. run: the one to resume."""
    results = make(config, folder, run)
    print()
    print_table([("base model", results["ce_base"], 0.0), ("with SAE", results["ce_sae"], results["kl_sae"])],
                ("", "CE (nats)", "KL (nats)"))
    print(f"\nFVU {results['fvu']:.4f}  L0 {results['l0']:.1f}  dead latents {results['dead_latents']:.1%}"
          f"  {results['tokens_per_second']:,.0f} tokens/s  {results['seconds']:.0f} s"
          f"  peak memory {results['peak_memory_bytes'] / 1e9:.2f} GB")
    print(f"{folder}/ holds config.json, metrics.jsonl, results.json, sae/;  python train.py --model {config['model']} "
          f"--sae {folder} adapts the model around it")


def main(argv=None):
    args = arguments(sys.argv[1:] if argv is None else argv)
    try:
        if args.merge:
            merge(Path(args.merge))
        elif args.dry_run:
            dry_run(configure(args))
        else:
            run = Run.resume(args.resume) if args.resume else None
            config = run.config if run else configure(args)
            distributed.start(config["device"])
            folder = distributed.agree(args.resume or args.out or default_folder(config))
            if run is None and distributed.rank() == 0:
                check_free(folder)
            start = adapt if config["method"] == "lora" else train_sae
            start(config, Path(folder), run)
            distributed.stop()
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: --resume RUN_DIR continues from the last checkpoint")


if __name__ == "__main__":
    main()
