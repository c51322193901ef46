"""What a configuration names, loaded: the model, its SAEs, the text."""
from pathlib import Path
from typing import NamedTuple

import torch

from lorasae.errors import InputError
from lorasae.io.adapters import load_adapter
from lorasae.io.models import load_model, load_tokenizer
from lorasae.io.shards import Text, open_held_out
from lorasae.io.saes import check_fits, load_sae
from lorasae.model import Transformer
from lorasae.runs import distributed
from lorasae.runs.config import Config


class Setting(NamedTuple):
    """All that a run trains or evaluates with."""
    model: Transformer
    saes: dict                                          # {layer: SAE}, frozen
    text: Text                                          # or a HeldOut, of an evaluation
    config: Config
    folder: Path | None = None                          # of the run


def load_setting(config, folder=None, adapter=None, trains=True):
    """The Setting of a configuration, with the adapter folder's adapters, if given.

    folder: of the run. trains: whether it needs more than the held-out text that the folder keeps. With `shard` the model
    is left on the CPU, for distributed.shard to spread.
    """
    device = distributed.local(config.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32 for an fp32 SAE: L0 moves less than in bf16, at thrice the speed
    model = load_model(config.model, device="cpu" if config.shard else device, dtype=config.dtype)
    check_context(config, model.config)
    saes = load_saes(config, model, device)
    if adapter is not None:
        load_adapter(model, adapter)
    return Setting(model, saes, load_text(config, model.config, folder, trains), config, folder)


def check_context(config, model_config):
    """Raises InputError where the model does not hold so many tokens."""
    holds = model_config.max_position_embeddings
    if config.context > holds:
        raise InputError(f"--context {config.context} is more than {config.model} holds: pass at most {holds}")


def sae_sources(config):
    """[(layer, source)] of a configuration: one source for all layers, or one a layer."""
    layers, sources = config.layer, config.sae
    if len(sources) == 1:
        sources = sources * len(layers)
    if len(sources) not in (0, len(layers)):
        raise InputError(f"--sae names {len(sources)} SAEs for {len(layers)} layers: pass one source for all, or one a layer")
    return list(zip(layers, sources))


def load_saes(config, model, device):
    """{layer: SAE}, frozen."""
    saes = {}
    for layer, source in sae_sources(config):
        check_layer(config.model, layer, len(model.layers))
        sae = load_sae(source, layer=layer, width=config.width, l0=config.l0, dtype=config.sae_dtype, device=device,
                       llama_scope=config.llama_scope)
        check_fits(sae, model.config.hidden_size)
        saes[layer] = sae
    return saes


def check_layer(model, layer, depth):
    """Raises InputError unless the model has that block."""
    if not 0 <= layer < depth:
        raise InputError(f"--layer {layer} is out of range: {model} has blocks 0 to {depth - 1}")


def load_text(config, model_config, folder=None, trains=True):
    tokenizer = load_tokenizer(config.model, model_config)
    bos, eos = model_config.bos_token_id, model_config.eos_token_id
    if folder is not None and not trains:
        for kept in (folder / "text", folder.parent / "text"):      # the second is that of a sweep
            if (kept / "text.json").exists():
                return open_held_out(kept, tokenizer, bos, eos)
    return Text(config.data, tokenizer, bos, eos, context=config.context, eval_tokens=config.eval_tokens, seed=config.seed,
                batch_size=config.batch_size, field=config.field, folder=folder and folder / "text",
                process=distributed.process())
