"""What the benchmark runs: real shapes with random weights, their SAEs and adapters; the LoRA step; its FLOPs.

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
from lorasae.adapt import blocks_to_adapt, compiled_blocks, first_differing, teach
from lorasae.gemma2 import Gemma2Config
from lorasae.io.adapters import PREFIX
from lorasae.llama3 import Llama3Config, RopeScaling
from lorasae.lora import add_lora, attach_lora, base, detach_lora, lora_parameters
from lorasae.model import Transformer
from lorasae.runs import sweep
from lorasae.runs.config import Config


@dataclass(frozen=True)
class Case:
    """A model around one SAE, and how it is adapted: calls of `ahead` sequences, `batch` of them an optimiser step."""
    config: Gemma2Config | Llama3Config
    layer: int
    width: int
    rank: int = 64
    context: int = 1024
    batch: int = 1
    ahead: int = 8                                          # sequences whose frozen part runs at once (adapt.train)
    dtype: torch.dtype = torch.bfloat16
    sae_dtype: torch.dtype = torch.float32                  # as the presets have it

    @property
    def gemma(self):
        """Gemma has a JumpReLU SAE, which asks for `after` (§3.4); Llama a TopK SAE, with all blocks adapted."""
        return self.config.model_type == "gemma2"

    @property
    def blocks(self):
        return blocks_to_adapt(["after" if self.gemma else "all"], {self.layer: None}, self.config.num_hidden_layers)


def gemma(D, intermediate, depth, heads, kv_heads, head_dim, scalar, vocab=256_000):
    return Gemma2Config(vocab, D, intermediate, depth, heads, kv_heads, head_dim, scalar, sliding_window=4096,
                        attn_logit_softcapping=50.0, final_logit_softcapping=30.0, rms_norm_eps=1e-6, rope_theta=1e4,
                        bos_token_id=2, eos_token_id=1)


def llama(D, intermediate, depth, heads, head_dim, factor, tied, vocab=128_256):
    return Llama3Config(vocab, D, intermediate, depth, heads, 8, head_dim, rms_norm_eps=1e-5, rope_theta=5e5,
                        rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192), bos_token_id=0, eos_token_id=1,
                        tie_word_embeddings=tied)


REAL = {
    "gemma-2-2b": Case(gemma(2304, 9216, 26, 8, 4, 256, 256), 12, 2 ** 14),
    "gemma-2-9b": Case(gemma(3584, 14336, 42, 16, 8, 256, 256), 20, 2 ** 17),
    "gemma-2-27b": Case(gemma(4608, 36864, 46, 32, 16, 128, 144), 22, 2 ** 17),
    "llama-3.2-1b": Case(llama(2048, 8192, 16, 32, 64, 32.0, True), 12, 2 ** 14),
    "llama-3.1-8b": Case(llama(4096, 14336, 32, 32, 128, 8.0, False), 12, 2 ** 17, sae_dtype=torch.bfloat16),
}
SMALL = {name: Case(config, 4, 2048, rank=16, context=256, batch=2, ahead=2, dtype=torch.float32) for name, config in {
    "small gemma": gemma(256, 1024, 10, 8, 4, 32, 32, vocab=2 ** 15),
    "small llama": llama(256, 1024, 10, 16, 16, 32.0, True, vocab=2 ** 15)}.items()}
TINY = {name: Case(config, 1, 256, rank=4, context=16, batch=1, ahead=2, dtype=torch.float32) for name, config in {
    "tiny gemma": gemma(32, 64, 4, 4, 2, 16, 16, vocab=512),
    "tiny llama": llama(64, 64, 4, 16, 8, 32.0, False, vocab=512)}.items()}


def random_setting(case, device):
    """A random frozen model, its SAE, and tokens [ahead, T] with a BOS each. On the meta device: their shapes."""
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
        dictionary.fit_biases(sae, x[:case.context], l0=16)
        if case.gemma:
            sae.threshold.copy_(clear_thresholds(x @ sae.W_enc.T + sae.b_enc, l0=64))
    for name, p in sae.named_parameters():
        p.data = p.data.to(torch.float32 if name == "threshold" else case.sae_dtype)
    return model, sae, tokens


def clear_thresholds(pre, l0):
    """Pre-activations [N, M] -> thresholds [M] for about that L0, in wide gaps: rounding will flip no latent."""
    count = max(8, len(pre) * l0 // pre.shape[1])
    top = pre.topk(2 * count, dim=0).values
    place = (top[:-1] - top[1:])[count // 2:].argmax(0, keepdim=True) + count // 2
    return ((top.gather(0, place) + top.gather(0, place + 1)) / 2)[0].clamp(min=0)


def random_adapter(model, blocks, rank):
    """A new adapter, whose B is not zero, as otherwise it would change nothing. The model is left without it."""
    student = detach_lora(add_lora(model, blocks, rank, dropout=0.0))
    for module in student.values():
        nn.init.normal_(module.lora_B.weight, std=0.1 / rank)
    return student


@contextmanager
def precision_of_train(device, tf32=True):
    """As train.py has it: on CUDA fp32 products by TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 and device == "cuda" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Ours:
    """Calling it takes `ahead / batch` steps as adapt.train does; `answer` is the first one's loss, and its gradient.

    students: adapters of `model`, that train side by side.
    """

    def __init__(self, case, model, sae, tokens, students, dropout=0.0, tf32=True):
        self.case, self.model, self.saes, self.tokens = case, model, {case.layer: sae}, tokens
        self.students, self.dropout, self.tf32 = students, dropout, tf32
        self.config = Config(batch_size=case.batch, context=case.context, device=tokens.device.type)
        groups = [{"params": lora_parameters(student)} for student in students]
        self.optimizer = adapt.adamw(groups, self.config)
        self.first = first_differing(attach_lora(model, students[0]), self.saes)

    def __call__(self):
        self.ready(True)
        step = (self.model, self.saes)
        with self.as_train_py():
            lessons = teach(*step, self.tokens, self.first)
            for lesson in adapt.split(lessons, self.case.batch):
                if len(self.students) == 1:
                    adapt.take_step(*step, lesson, self.first, self.optimizer, self.config)
                else:
                    sweep.take_step(*step, lesson, self.first, self.optimizer, self.students, self.config)

    def answer(self):
        self.ready(False)
        step = (self.model, self.saes)
        with self.as_train_py():
            lesson = teach(*step, self.tokens[:self.case.batch], self.first)
            losses = sweep.learn(*step, lesson, self.first, self.students, self.config.compile) / self.case.batch
        parameters = [parameter for student in self.students for parameter in lora_parameters(student)]
        gradients = torch.autograd.grad(losses.sum(), parameters)
        return {"loss": losses.detach().squeeze(), **dict(zip(gradient_names(self.students), gradients))}

    @contextmanager
    def as_train_py(self):
        """The blocks compiled, on a GPU, and fp32 products by TF32."""
        compiled = compiled_blocks(self.model) if self.config.compile else nullcontext()
        with compiled, precision_of_train(self.tokens.device.type, self.tf32):
            yield

    def ready(self, training):
        """The model is shared with other contenders: back to how this one wants it."""
        self.model.train(training)
        for student in self.students:
            attach_lora(self.model, student)
            for module in student.values():
                module.dropout = self.dropout


def gradient_names(students):
    """PEFT's keys, with the number of the student where there are several."""
    several = len(students) > 1
    return [f"{PREFIX}{name}.lora_{side}.weight" + (f" {i}" if several else "")
            for i, student in enumerate(students) for name in student for side in "AB"]


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
                **{f"{name} {i}": value for i, answer in enumerate(answers) for name, value in answer.items()}}


def flops_per_token(case, recipe=False, students=1):
    """FLOPs of a step over its tokens, counted on the meta device, where nothing is computed.

    recipe: the published one, which runs the whole model twice, with every attention score, all logits and a dense SAE.
    students: how many train side by side in the step, without the recipe.
    """
    model, sae, tokens = random_setting(replace(case, ahead=1), "meta")
    side_by_side = [random_adapter(model, case.blocks, case.rank) for _ in range(students)]
    attach_lora(model, side_by_side[0])
    saes, first = {case.layer: sae}, first_differing(model, {case.layer: sae})
    with FlopCounterMode(display=False) as counter:
        if recipe:
            with patch.object(layers, "attention", lambda *inputs: layers.naive_attention(*inputs[:6])):
                with torch.no_grad(), base(model):
                    p = model(tokens).softmax(-1)
                log_q = model(tokens, {case.layer: lambda x: sae.decode(sae.encode(x))}).log_softmax(-1)
                F.kl_div(log_q, p, reduction="batchmean").backward()
        else:
            sweep.learn(model, saes, teach(model, saes, tokens, first), first, side_by_side).sum().backward()
    return counter.get_total_flops() / tokens.numel()
