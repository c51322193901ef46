"""Adapt a language model to its sparse autoencoders, or train the autoencoder itself.

    python train.py                                             the embedded tiny Gemma-2: no network, minutes on a CPU
    python train.py --model gemma-2-2b --layer 12 --rank 64     the paper's headline run
    python train.py --model llama-3.2-1b --method topk          train an SAE (also: jumprelu, e2e)
    python train.py --method finetune --sae SOURCE              train one that is there already, on the model's own loss
    python train.py --method lora --train-sae                   adapters and SAE together
    python train.py --resume runs/tiny-gemma-2-lora             continue a run that was interrupted
    python train.py --merge runs/tiny-gemma-2-lora              write the adapted model as a plain Hugging Face checkpoint
    python train.py --model gemma-2-2b --dry-run                say what would be fetched and done, and stop
"""
import argparse
import sys
from pathlib import Path

import torch

from lorasae.errors import InputError
from lorasae.evals import fidelity
from lorasae.evals.common import print_table
from lorasae.io.adapters import load_adapter
from lorasae.io.models import copy_beside_weights, load_model, save_model
from lorasae.io.console import Parser, one_line_errors, count, progress_line
from lorasae.io.files import read_json
from lorasae.io.hub import model_files
from lorasae.io.presets import PRESETS
from lorasae.lora import merge_lora
from lorasae.runs import distributed
from lorasae.runs.adapting import adapt_model, student_names
from lorasae.runs.config import LLAMA_SCOPE, METHODS, OBJECTIVES, OPTIMIZERS, RECIPES, THRESHOLDS, Config, read_config
from lorasae.runs.defaults import configure
from lorasae.beyond.finetuning import adapt_with_sae, finetune_sae
from lorasae.runs.folder import Run
from lorasae.runs.lock import new_folder
from lorasae.runs.preflight import check_memory, dry_run
from lorasae.runs.sae_training import train_sae
from lorasae.runs.setting import load_setting

SWITCH = argparse.BooleanOptionalAction


def arguments(argv):
    """The parsed arguments; what is left at None takes its value in runs.defaults.configure."""
    parser = Parser(description=__doc__)

    add = parser.add_argument_group("what").add_argument
    add("--model", help=f"a preset ({', '.join(PRESETS)}), a Hub repository OWNER/NAME, or a local folder "
        f"(default: {Config.model})")
    add("--method", choices=METHODS, help="lora adapts the model to its SAE; finetune trains that SAE instead; the others "
        f"train an SAE from scratch (default: {Config.method})")
    add("--layer", type=int, nargs="+", help="block(s) whose output an SAE replaces, from 0 (default: the preset's, or that "
        "of the SAE's own run; paper: 12)")
    add("--sae", nargs="+", help="file, folder, Hub path or run folder; one for all layers or one a layer (default: the "
        "preset's)")
    add("--width", help="latents of the SAE to choose, such as 16k; of the SAE to train, such as 16384 or 16k (default: the "
        "preset's; else 8 d_model, the paper's)")
    add("--llama-scope", choices=LLAMA_SCOPE, help="how to read Llama Scope files: their authors' arithmetic, or SAELens's; "
        f"legacy is what the paper ran, with L0 far too high (default: {Config.llama_scope})")
    add("--l0", type=float, help="average active latents of the SAE to choose, or that jumprelu is to reach (default: the "
        "preset's; else the nearest to 70, as in the paper, and 64)")

    add = parser.add_argument_group("training an SAE").add_argument
    add("--k", type=int, help=f"active latents of topk and e2e (default: the preset's; else {Config.k}, the paper's)")
    add("--auxk", action="store_true", default=None, help="topk and e2e: revive dead latents by AuxK (the paper does without)")
    add("--dead-after", type=count, help="tokens after which a latent that never fired is dead (default: 10M, at most a "
        "tenth of the run)")

    add = parser.add_argument_group("adapters").add_argument
    add("--rank", type=int, nargs="+", help="rank of every adapter; several, as in 1 4 16 64 256, train side by side in one "
        "pass and end as runs of their own would (default: 64, the paper's)")
    add("--alpha", type=float, help=f"the adapters are scaled by alpha / rank (default: {Config.alpha} at every rank)")
    add("--dropout", type=float, help="dropout probability on the adapters' input (default: the recipe's; else 0.1, the "
        "paper's)")
    add("--adapt", nargs="+", metavar="BLOCKS", help="after (the SAE), all, next, or block numbers "
        "(default: the preset's around its own SAEs; else after for JumpReLU SAEs, whose L0 would move otherwise, and all for "
        "TopK)")

    add("--recipe", choices=RECIPES, help="how to train them: as published, or as a search on small models found better "
        "(default: the preset's; else paper)")

    add = parser.add_argument_group("training an SAE that is there already").add_argument
    add("--objective", choices=OBJECTIVES, help="finetune: the loss (default: balanced, ½ (MSE + KL · sg[MSE / KL]), where sg "
        "stops the gradient)")
    add("--train-sae", action="store_true", default=None, help="lora: train the SAE together with the adapters")
    add("--sae-lr", type=float, help="--train-sae: the SAE's learning rate (default: the recipe's; else that of the "
        "preset's finetune; else 5e-5, the published finetune's)")
    add("--thresholds", choices=THRESHOLDS, help="a JumpReLU's thresholds: trained, with its L0 held at what it was, or frozen "
        f"(default: {Config.thresholds})")

    add = parser.add_argument_group("text").add_argument
    add("--data", help="stdlib, pile, a file, a folder, or hf://datasets/... (default: the preset's; else that of the SAE's "
        "own run, else stdlib)")
    add("--field", help="JSON field that holds the text (default: text, or raw_content)")
    add("--tokens", type=count, help="training tokens, such as 15M (default: the preset's; else the paper's 15M, and 2B for "
        "an SAE)")
    add("--eval-tokens", type=count, help="held-out tokens (default: the preset's; else the paper's 1M)")
    add("--context", type=int, help="tokens a sequence, BOS included (default: the preset's; else the paper's 1024, at most "
        "what the model holds)")

    add = parser.add_argument_group("optimisation").add_argument
    add("--batch-size", type=int, help="sequences a step (default: the recipe's, or the preset's; else 1, the paper's)")
    add("--micro-batch", type=int, help="sequences that pass through the model at once; less memory, same step but for "
        "dropout's masks (default: the whole batch)")
    add("--lr", type=float, nargs="+", help="learning rate; several for adapters, as in 5e-5 2e-4 1e-3, train side by side in "
        "one pass, with one --rank or as many (default: the recipe's, or the preset's; else the paper's, 5e-5 for adapters and "
        "a finetune, 2e-4 / √(latents / 2^14) for an SAE)")
    add("--lr-decay", action=SWITCH, help="let it fall linearly to 0: better where steps are few "
        "(default: the recipe's, or the preset's; paper: --no-lr-decay)")
    add("--optimizer", choices=OPTIMIZERS, help="of adapters (default: the recipe's; else adamw, the paper's)")
    add("--weight-decay", type=float, help=f"the optimiser's weight decay (default: {Config.weight_decay})")
    add("--clip", type=float, help="bound on the gradient norm of the KL summed over a sequence "
        f"(default: {Config.clip})")
    add("--seed", type=int, help=f"of adapters, dropout and the order of the text (default: {Config.seed})")

    add = parser.add_argument_group("machine").add_argument
    add("--dtype", choices=["float32", "bfloat16"], help="of the frozen model; what trains is float32 (default: the preset's; "
        "else bfloat16)")
    add("--sae-dtype", choices=["float32", "bfloat16"], help="of the SAE's matrices (default: the preset's; paper: float32)")
    add("--device", help="cpu, cuda, cuda:1, or mps, which is untried (default: cuda where PyTorch sees a GPU, else cpu)")
    add("--compile", action=SWITCH, help="put blocks and loss through torch.compile (default: on a GPU)")
    add("--ahead", type=int, metavar="SEQUENCES", help="sequences whose frozen part, the prefix and the teacher, runs at once, "
        "before their steps (default: 8 on a GPU, else 1)")
    add("--shard", action="store_true", default=None, help="with torchrun: spread the frozen blocks over the processes, for "
        "models that do not fit")
    add("--out", help="folder of the run (default: runs/MODEL-METHOD, numbered where that is taken)")
    add("--resume", metavar="RUN_DIR", help="continue that run from its last checkpoint, with its own arguments")
    add("--checkpoint-every", type=int, metavar="STEPS", help="steps a killed run can lose (default: a minute's)")
    add("--merge", metavar="RUN_DIR", help="fold that run's adapters into its model, write RUN_DIR/merged/, and stop")
    add("--dry-run", action="store_true", help="print files and sizes to fetch, parameters, memory and steps, and stop")

    args = parser.parse_args(argv)
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    if args.resume is not None and given - {"--resume", "--device"}:
        parser.error("--resume takes every other argument but --device from the run's config.json: pass it alone")
    if args.merge is not None and given != {"--merge"}:
        parser.error("--merge takes every other argument from the run's config.json: pass it alone")
    return args


def config_of(args):
    """The arguments -> Config."""
    given = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "merge", "dry_run")}
    for name in ("layer", "sae", "rank", "adapt", "lr"):
        if given[name] is not None:
            given[name] = tuple(given[name])
    if given["device"] is None:
        given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    return configure(given)


def open_run(args):
    """The run to be made, its folder claimed, or the one to resume."""
    if args.resume is not None:
        device = args.device or read_config(args.resume).device
        distributed.start(device)
        return Run.resume(args.resume, device)
    config = config_of(args)
    distributed.start(config.device)
    check_memory(config)
    folder = args.out
    if folder is None and distributed.process() == 0:
        folder = new_folder(config.model, config.method)
    return Run.create(distributed.agree(folder), config)


def merge(folder):
    """Writes folder/merged/: the adapted model (without SAE) as a checkpoint that transformers loads."""
    config, target = read_config(folder), folder / "merged"
    if config.method != "lora":
        raise InputError(f"{folder} is no run that trained adapters: there is nothing to merge")
    if len(config.variants) > 1:
        raise InputError(f"{folder} holds several runs: merge one of them, such as {folder / student_names(config)[0]}")
    if not (folder / "adapter").is_dir():
        raise InputError(f"{folder} has no adapter to merge: finish the run with python train.py --resume {folder}")
    if target.exists():
        raise InputError(f"{target} is there already: remove it to merge again")

    source = model_files(config.model)
    model = load_adapter(load_model(config.model, dtype=config.dtype), folder / "adapter")
    save_model(merge_lora(model), target, config=read_json(source / "config.json"))
    copy_beside_weights(config.model, target)
    print(f"{target}/ is the adapted model, without its SAE, as transformers.AutoModelForCausalLM loads it")
    if config.train_sae:
        print(f"only the adapters were folded in: the SAE that was trained with them is {folder}/sae/")


def report(results, folder):
    """What a run that adapted the model prints in the end."""
    print()
    print_table(*fidelity.table(results))
    l0 = ", ".join(f"{results['l0_sae'][layer]:.1f} -> {results['l0'][layer]:.1f}" for layer in results["l0"])
    print(f"\n{fidelity.closed(results)}")
    print(f"L0 {l0}   {speed(results)}")
    print(f"{folder}/ holds config.json, metrics.jsonl, results.json, adapter/;  python eval.py {folder} recomputes the table")


def report_both(results, folder):
    """What a run that trained adapters and SAE together prints in the end."""
    before, layer = results["before"], next(iter(results["l0"]))
    changes = [(before["l0"], results["l0"][layer]), (before["fvu"], 1 - results["explained_variance"][layer])]
    print()
    rows = [("base model", results["ce_base"], 0.0), ("with the SAE as it was", before["ce_sae"], before["kl_sae"]),
            ("with the SAE trained", results["ce_sae"], results["kl_sae"]),
            ("with both trained", results["ce_adapted"], results["kl_adapted"]),
            ("LoRA, no SAE", results["ce_lora"], results["kl_lora"])]
    print_table(rows, ("", "CE (nats)", "KL (nats)"))
    (l0_before, l0), (fvu_before, fvu) = changes
    print(f"\n{fidelity.closed(results['closed'])}")
    print(f"L0 {l0_before:.2f} -> {l0:.2f}   FVU {fvu_before:.4f} -> {fvu:.4f}   dead latents {before['dead_latents']:.1%} -> "
          f"{results['dead_latents']:.1%}   {speed(results)}")
    print(f"{folder}/ holds config.json, metrics.jsonl, results.json, adapter/, sae/;  python eval.py {folder} shows what "
          "the adapters win back around the SAE as it is now")


def report_sae(results, folder):
    """What a run that trained an SAE prints in the end."""
    print()
    rows = [("base model", results["ce_base"], 0.0), ("with SAE", results["ce_sae"], results["kl_sae"])]
    before = results.get("before")
    if before is not None:
        rows.insert(1, ("with the SAE as it was", before["ce_sae"], before["kl_sae"]))
    print_table(rows, ("", "CE (nats)", "KL (nats)"))
    if before is not None:
        print(f"\n{fidelity.closed(results['closed'])}")
        print(f"before: FVU {before['fvu']:.4f}   L0 {before['l0']:.2f}   dead latents {before['dead_latents']:.1%}", end="")
    print(f"\nFVU {results['fvu']:.4f}   L0 {results['l0']:.2f}   dead latents {results['dead_latents']:.1%}   {speed(results)}")
    print(f"{folder}/ holds config.json, metrics.jsonl, results.json, sae/;  python train.py --model "
          f"{read_config(folder).model} --sae {folder} adapts the model around it")


def speed(results):
    peak = results["peak_memory_bytes"]
    memory = "" if peak is None else f"   peak memory {peak / 1e9:.2f} GB"
    return f"{results['tokens_per_second']:,.0f} tokens/s   {results['seconds']:.0f} s{memory}"


def main(argv=None):
    args = arguments(sys.argv[1:] if argv is None else argv)
    with one_line_errors("interrupted: --resume RUN_DIR continues from the last checkpoint"):
        if args.merge is not None:
            return merge(Path(args.merge))
        if args.dry_run:
            return dry_run(config_of(args))

        run, setting = open_run(args), None
        try:
            progress_line(f"{run.folder}/ is where this run writes")
            setting = load_setting(run.config, run.folder)
            if run.config.train_sae:
                report_both(adapt_with_sae(setting, run), run.folder)
            elif run.config.method == "lora":
                for folder, results in adapt_model(setting, run).items():
                    report(results, folder)
            elif run.config.method == "finetune":
                report_sae(finetune_sae(setting, run), run.folder)
            else:
                report_sae(train_sae(setting, run), run.folder)
        finally:
            if setting is not None:
                setting.text.close()
            run.close()
        distributed.stop()


if __name__ == "__main__":
    main()
