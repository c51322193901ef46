"""What the benchmark runs: real shapes with random weights, their SAEs and adapters; the LoRA step;
its FLOPs.

Exercised by `python -m lorasae.bench step`. Shapes: B batch, T tokens, M latents, N = B*T.
"""
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lorasae import dictionary
from lorasae import attention as layers
from lorasae import adapt
from lorasae.adapt import blocks_to_adapt, compiled_blocks, frozen_forward
from lorasae.gemma2 import Gemma2Config
from lorasae.io.adapters import PREFIX
from lorasae.llama3 import Llama3Config, RopeScaling
from lorasae.lora import add_lora, attach_lora, base, detach_lora
from lorasae.model import Transformer
from lorasae.runs.adapting import Adapting
from lorasae.runs.config import Config


@dataclass(frozen=True)
class Case:
    """A model around one SAE, and how it is adapted: calls of `ahead` sequences, `batch` of them an
    optimiser step.
    """
    config: Gemma2Config | Llama3Config
    layer: int
    width: int
    rank: int = 64
    context: int = 1024
    batch: int = 1
    ahead: int = 8                              # sequences whose frozen part runs at once
    dtype: torch.dtype = torch.bfloat16
    sae_dtype: torch.dtype = torch.float32      # as the presets have it

    @property
    def gemma(self):
        """Gemma has a JumpReLU SAE, with the blocks after it adapted; Llama a TopK, with all."""
        return self.config.model_type == "gemma2"

    @property
    def blocks(self):
        words = ["after" if self.gemma else "all"]
        return blocks_to_adapt(words, {self.layer: None}, self.config.num_hidden_layers)


def gemma(D, intermediate, depth, heads, kv_heads, head_dim, scalar, vocab=256_000):
    return Gemma2Config(vocab, D, intermediate, depth, heads, kv_heads, head_dim, scalar,
                        sliding_window=4096,
                        attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                        rms_norm_eps=1e-6, rope_theta=1e4,
                        bos_token_id=2, eos_token_id=1)


def llama(D, intermediate, depth, heads, head_dim, factor, tied, vocab=128_256):
    return Llama3Config(vocab, D, intermediate, depth, heads, 8, head_dim, rms_norm_eps=1e-5,
                        rope_theta=5e5,
                        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192), bos_token_id=0,
                        eos_token_id=1,
                        tie_word_embeddings=tied)


REAL = {
    "gemma-2-2b": Case(gemma(2304, 9216, 26, 8, 4, 256, 256), 12, 2 ** 14),
    "gemma-2-9b": Case(gemma(3584, 14336, 42, 16, 8, 256, 256), 20, 2 ** 17),
    "gemma-2-27b": Case(gemma(4608, 36864, 46, 32, 16, 128, 144), 22, 2 ** 17),
    "llama-3.2-1b": Case(llama(2048, 8192, 16, 32, 64, 32.0, True), 12, 2 ** 14),
    "llama-3.1-8b": Case(llama(4096, 14336, 32, 32, 128, 8.0, False), 12, 2 ** 17,
                         sae_dtype=torch.bfloat16),
}
SMALL = {name: Case(config, 4, 2048, rank=16, context=256, batch=2, ahead=2, dtype=torch.float32)
         for name, config in {
    "small gemma": gemma(256, 1024, 10, 8, 4, 32, 32, vocab=2 ** 15),
    "small llama": llama(256, 1024, 10, 16, 16, 32.0, True, vocab=2 ** 15)}.items()}
TINY = {name: Case(config, 1, 256, rank=4, context=16, batch=1, ahead=2, dtype=torch.float32)
        for name, config in {
    "tiny gemma": gemma(32, 64, 4, 4, 2, 16, 16, vocab=512),
    "tiny llama": llama(64, 64, 4, 16, 8, 32.0, False, vocab=512)}.items()}


def random_setting(case, device):
    """A random frozen model, its SAE, and tokens [ahead, T] with a BOS each. On the meta device:
    their shapes.
    """
    torch.manual_seed(0)
    config, kind = case.config, "jumprelu" if case.gemma else "topk"
    with torch.device("meta"):
        model = Transformer(config).to(case.dtype)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=config.hidden_size ** -0.5) if p.dim() == 2 else nn.init.ones_(p)
    with torch.device(device):
        sae = dictionary.new_sae(kind, config.hidden_size, case.width, k=64).requires_grad_(False)
        tokens = torch.randint(3, config.vocab_size, (case.ahead, case.context))
        tokens[:, 0] = config.bos_token_id
    if device != "meta":
        x = model.run(model.embed(tokens), 0, case.layer + 1).flatten(0, 1).float()
        sae.start(x[:case.context], l0=16)
        if case.gemma:
            sae.threshold.copy_(clear_thresholds(x @ sae.W_enc.T + sae.b_enc, l0=64))
    for name, p in sae.named_parameters():
        p.data = p.data.to(torch.float32 if name == "threshold" else case.sae_dtype)
    return model, sae, tokens


def clear_thresholds(pre, l0):
    """Pre-activations [N, M] -> thresholds [M] for about that L0, in wide gaps: rounding will flip
    no latent.
    """
    count = max(8, len(pre) * l0 // pre.shape[1])
    top = pre.topk(2 * count, dim=0).values
    place = (top[:-1] - top[1:])[count // 2:].argmax(0, keepdim=True) + count // 2
    return ((top.gather(0, place) + top.gather(0, place + 1)) / 2)[0].clamp(min=0)


def random_adapter(model, blocks, rank):
    """New adapters whose B is not zero, so that they change something. The model is left without.
    """
    adapters = detach_lora(add_lora(model, blocks, rank, dropout=0.0))
    for module in adapters.values():
        nn.init.normal_(module.lora_B.weight, std=0.1 / rank)
    return adapters


@contextmanager
def precision_of_train(device, tf32=True):
    """As train.py has it: on CUDA, fp32 products by TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 and device == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Ours:
    """Calling it takes `ahead / batch` steps as train.py does.

    `answer` is the loss of the first step, and its gradient. several: adapters of `model`, one set
    or several that train side by side.
    """

    def __init__(self, case, model, sae, tokens, several, dropout=0.0, tf32=True):
        self.case, self.model, self.saes, self.tokens = case, model, {case.layer: sae}, tokens
        self.several, self.dropout, self.tf32 = several, dropout, tf32
        self.config = Config(rank=ranks_of(several), batch_size=case.batch, context=case.context,
                             device=tokens.device.type)
        attach_lora(model, several[0])
        self.kind = Adapting(model, self.saes, several, self.config)

    def __call__(self):
        self.ready(True)
        with self.as_train_py():
            parts = self.frozen(self.tokens)
            for part in adapt.split(parts, self.case.batch):
                self.kind.step(part, 0)

    def answer(self):
        self.ready(False)
        with self.as_train_py():
            losses, _ = self.kind.losses(self.frozen(self.tokens[:self.case.batch]))
        losses = losses / self.case.batch
        gradients = torch.autograd.grad(losses.sum(), self.kind.tensors)
        named = zip(gradient_names(self.several), gradients)
        return {"loss": losses.detach(), **dict(named)}

    def frozen(self, tokens):
        return frozen_forward(self.model, self.saes, tokens, self.kind.first)

    @contextmanager
    def as_train_py(self):
        """The blocks compiled, on a GPU, and fp32 products by TF32."""
        compiled = compiled_blocks(self.model) if self.config.compile else nullcontext()
        with compiled, precision_of_train(self.tokens.device.type, self.tf32):
            yield

    def ready(self, training):
        """The model is shared with other contenders: back to how this one wants it."""
        self.model.train(training)
        for adapters in self.several:
            attach_lora(self.model, adapters)
            for module in adapters.values():
                module.dropout = self.dropout


def ranks_of(several):
    """The rank of each of several sets of adapters."""
    modules = [next(iter(adapters.values())) for adapters in several]
    return tuple(module.lora_A.out_features for module in modules)


def gradient_names(several):
    """PEFT's keys; with a number for each of several sets of adapters."""
    names = []
    for number, adapters in enumerate(several):
        suffix = f" {number}" if len(several) > 1 else ""
        for name in adapters:
            names += [f"{PREFIX}{name}.lora_{side}.weight{suffix}" for side in "AB"]
    return names


class InTurn:
    """Several runs, a step of each."""

    def __init__(self, runs):
        self.runs = runs

    def __call__(self):
        for run in self.runs:
            run()

    def answer(self):
        answers = [run.answer() for run in self.runs]
        return {"loss": torch.stack([answer.pop("loss") for answer in answers]),
                **{f"{name} {i}": value for i, answer in enumerate(answers) for name,
                   value in answer.items()}}


def flops_per_token(case, recipe=False, side_by_side=1):
    """FLOPs of a step over its tokens, counted on the meta device, where nothing is computed.

    recipe: the published one, which runs the whole model twice, with every attention score, all
    logits and a dense SAE. side_by_side: sets of adapters in one step, without the recipe.
    """
    model, sae, tokens = random_setting(replace(case, ahead=1), "meta")
    several = [random_adapter(model, case.blocks, case.rank) for _ in range(side_by_side)]
    attach_lora(model, several[0])
    saes = {case.layer: sae}
    kind = Adapting(model, saes, several, Config(), optimizer=lambda groups, config: None)
    with FlopCounterMode(display=False) as counter:
        if recipe:
            published_step(model, case.layer, sae, tokens)
        else:
            part = frozen_forward(model, saes, tokens, kind.first)
            losses, _ = kind.losses(part)
            losses.sum().backward()
    return counter.get_total_flops() / tokens.numel()


def published_step(model, layer, sae, tokens):
    """Forward and backward as the published recipe has them, for their FLOPs."""
    def dense(x):
        return sae.decode(sae.encode(x))

    def scores(*inputs):
        return layers.naive_attention(*inputs[:6])

    with patch.object(layers, "attention", scores):
        with torch.no_grad(), base(model):
            p = model(tokens).softmax(-1)
        log_q = model(tokens, {layer: dense}).log_softmax(-1)
        F.kl_div(log_q, p, reduction="batchmean").backward()
