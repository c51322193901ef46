"""What a run would fetch, train and hold in memory, from configuration files and listings alone: `train.py --dry-run`."""
import torch

from lorasae.adapt import default_adapt
from lorasae.io.checkpoint import load_config
from lorasae.io.hub import model_plan, sae_plan
from lorasae.io.tensors import DTYPES
from lorasae.lora import add_lora, detach_lora, lora_parameters
from lorasae.model import Transformer
from lorasae.runs.adaptation import blocks_to_adapt
from lorasae.runs.setting import load_saes, sae_sources


def dry_run(config):
    """Prints the plan of a run."""
    wanted = []
    for layer, source in sae_sources(config):
        wanted += sae_plan(source, layer=layer, width=config.width, l0=config.l0)
    for fetch in model_plan(config.model) + wanted:
        print(f"{'here ' if fetch.cached else 'fetch'}  {fetch.bytes / 1e6:10,.1f} MB  {fetch.repo}/{fetch.path}")

    with torch.device("meta"):
        model = Transformer(load_config(config.model))
    frozen = sum(p.numel() for p in model.parameters())
    print()
    if config.method == "finetune":
        trainable, activations = finetune_plan(config, model, wanted)
    elif config.method == "lora":
        trainable, activations = adapters_plan(config, model, wanted)
        trainable += sae_parameters(config, model, wanted) if config.train_sae else 0
    else:
        trainable, activations = sae_plan_of(config, model)

    weights = frozen * DTYPES[config.dtype].itemsize
    training = trainable * 16                           # fp32: value, gradient, and Adam's two averages
    saes = sum(fetch.bytes for fetch in wanted if not fetch.path.endswith(".json"))
    total = weights + training + saes + activations
    print(f"trainable parameters  {trainable:,} ({trainable / frozen:.2%} of {frozen:,})")
    print(f"training              {config.steps:,} steps of {config.batch_size} x {config.context} = {config.trained_tokens:,} "
          f"tokens of {config.data}")
    print(f"memory, about         {size(total)}: model {size(weights)}, SAEs to fetch {size(saes)}, training {size(training)}, "
          f"activations {size(activations)}")


def adapters_plan(config, model, wanted):
    """(trainable parameters, bytes of activations) of a run that adapts the model."""
    layers, depth = dict.fromkeys(config.layer), len(model.layers)
    adapt = config.adapt or (("after",) if wanted else default_adapt(load_saes(config, model, "cpu")))
    blocks = blocks_to_adapt(adapt, layers, depth)
    trainable = 0
    for student in config.students:
        trainable += sum(p.numel() for p in lora_parameters(detach_lora(add_lora(model, blocks, student.rank[0]))))

    c, rows = model.config, config.micro_batch * config.context
    width = 12 * c.hidden_size + 5 * c.intermediate_size + 4 * c.num_attention_heads * c.head_dim
    activations = len(config.students) * len(blocks) * rows * width * DTYPES[config.dtype].itemsize     # what backward needs
    unsure = "" if config.adapt or not wanted else "; all of them if the SAE turns out to be a TopK"
    print(f"adapted blocks        {blocks[0]} to {blocks[-1]} ({len(blocks)} of {depth}){unsure}")
    return trainable, activations


def finetune_plan(config, model, wanted):
    """(trainable parameters, bytes of activations) of a run that finetunes an SAE: what backward needs of the blocks after it."""
    c, rows = model.config, config.micro_batch * config.context
    after = len(model.layers) - 1 - config.layer[0]
    width = 8 * c.hidden_size + 4 * c.intermediate_size + 4 * c.num_attention_heads * c.head_dim
    trainable = sae_parameters(config, model, wanted)
    latents = trainable // (2 * c.hidden_size)
    activations = after * rows * width * DTYPES[config.dtype].itemsize + 2 * rows * latents * 4
    print(f"SAE                   about {latents:,} latents at the output of block {config.layer[0]}")
    return trainable, activations


def sae_parameters(config, model, wanted):
    """The parameters of the SAE that is trained on; of one that is still to be fetched, as many as a float32 file holds."""
    if wanted:
        return sum(fetch.bytes for fetch in wanted if not fetch.path.endswith(".json")) // 4
    sae, = load_saes(config, model, "cpu").values()
    return sum(parameter.numel() for parameter in sae.parameters())


def sae_plan_of(config, model):
    """(trainable parameters, bytes of activations) of a run that trains an SAE."""
    d_model, rows = model.config.hidden_size, config.micro_batch * config.context
    latents = config.width or 8 * d_model
    thresholds = latents if config.method == "jumprelu" else 0
    trainable = latents * (2 * d_model + 1) + d_model + thresholds
    activations = rows * 4 * (4 * d_model + thresholds)                 # a JumpReLU keeps every pre-activation
    print(f"SAE                   {latents:,} latents at the output of block {config.layer[0]}")
    return trainable, activations


def size(bytes):
    return f"{bytes / 1e9:.1f} GB" if bytes >= 1e9 else f"{bytes / 1e6:.0f} MB"
