"""The LoRA step as others would write it, over transformers + peft: the peers of the benchmark.

    tuned=False     the published recipe as it is: eager attention, dropout 0.1, an fp32 SAE beside
                    a bf16 model, all logits of both models, and each step waits for its loss and
                    empties the allocator's cache
    tuned=True      what the same tools can do: no dropout, no waiting, fused AdamW over only the
                    adapters, the fastest attention that transformers has for the architecture, the
                    SAE in the model's own dtype

Both run the whole model twice, as a hook that swaps an activation leaves no choice: without
adapters and SAE for the base model, then with them. Only the benchmark imports this file:
transformers and peft are optional.

Shapes: B batch, T tokens, D d_model, M latents, N = B*T.
"""
from dataclasses import asdict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from lorasae.lora import TARGETS

LR, CLIP, DROPOUT = 5e-5, 1.0, 0.1                          # the paper's


class Peer:
    """Calling it takes a step for every `batch` of its tokens; `answer` is the loss of the first,
    and its gradient.

    case: a workloads.Case. weights: of the frozen Transformer, whose tensors are shared. adapter:
    {PEFT's key: tensor}, copied. tokens [B, T]; keep [B, T]: where the SAE leaves the activation
    alone, or None.
    """

    def __init__(self, case, weights, adapter, sae, tokens, keep, *, tuned):
        self.tuned, self.batch, self.tokens, self.keep = tuned, case.batch, tokens, keep
        self.spliced, self.kept = False, None
        attention = attention_name(case.config, tokens.is_cuda) if tuned else "eager"
        model = huggingface(case.config, weights, attention, use_cache=not tuned)
        self.sae = published_sae(sae, model.dtype if tuned else torch.float32)
        targets = [f"model.layers.{block}.{part}.{name}" for block in case.blocks
                   for part, names in (("self_attn", TARGETS[:4]), ("mlp", TARGETS[4:]))
                   for name in names]
        self.model = get_peft_model(model,
                                    LoraConfig(task_type="CAUSAL_LM", r=case.rank, lora_alpha=32,
                                                      lora_dropout=0.0 if tuned else DROPOUT,
                                                      target_modules=targets))
        set_peft_model_state_dict(self.model, adapter)
        model.model.layers[case.layer].register_forward_hook(self.splice)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.clipped = self.trained if tuned else list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.clipped, lr=LR, weight_decay=0.01, fused=True
                                           if tuned else None)

    def splice(self, module, args, output):
        """The forward hook: the reconstruction in place of the block's output [B, T, D]."""
        if not self.spliced:
            return output
        x = output[0] if isinstance(output, tuple) else output  # a tuple before transformers 4.54
        x_hat = self.sae(x.flatten(0, 1)).to(x.dtype).view_as(x)
        x_hat = x_hat if self.kept is None else torch.where(self.kept[..., None], x, x_hat)
        return (x_hat, *output[1:]) if isinstance(output, tuple) else x_hat

    def loss(self, tokens, keep):
        """Σ_tokens KL(base ‖ adapted with SAE) / B, through all the logits of both."""
        self.kept = keep
        with torch.no_grad(), self.model.disable_adapter():
            p = F.softmax(self.model(input_ids=tokens).logits, dim=-1)
        self.spliced = True
        log_q = F.log_softmax(self.model(input_ids=tokens).logits, dim=-1)
        self.spliced = False
        return F.kl_div(log_q, p, reduction="batchmean")

    def batches(self):
        keep = [None] * len(self.tokens) if self.keep is None else self.keep.split(self.batch)
        return zip(self.tokens.split(self.batch), keep)

    def __call__(self):
        self.model.train()
        for tokens, keep in self.batches():
            self.optimizer.zero_grad()
            loss = self.loss(tokens, keep)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.clipped, CLIP)
            self.optimizer.step()
            if not self.tuned:
                loss.item()
                del loss
                if tokens.is_cuda:
                    torch.cuda.empty_cache()

    def answer(self):
        """{"loss": scalar, PEFT's key: gradient} of the first batch, without dropout."""
        self.model.eval()
        loss = self.loss(*next(iter(self.batches())))
        gradients = torch.autograd.grad(loss, self.trained)
        names = [name.replace(".default", "") for name, p in self.model.named_parameters()
                 if p.requires_grad]
        return {"loss": loss.detach().float(), **dict(zip(names, gradients))}


def huggingface(config, weights, attention, use_cache):
    """transformers' model of a lorasae config around the same tensors as `weights` {Hugging Face's
    name: tensor}.
    """
    fields = {**asdict(config), "use_cache": use_cache}
    scaling = fields.pop("rope_scaling", None)
    fields["rope_parameters"] = {"rope_theta": fields.pop("rope_theta"),
                                 **({"rope_type": "llama3", **scaling} if scaling
                                    else {"rope_type": "default"})}
    kind = {"gemma2": Gemma2Config, "llama": LlamaConfig}[fields.pop("model_type")]
    some = next(iter(weights.values()))
    with some.device:
        model = AutoModelForCausalLM.from_config(kind(**fields), attn_implementation=attention,
                                                 dtype=some.dtype)
    tied = {}
    if config.tie_word_embeddings:
        tied["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict({**weights, **tied}, assign=True)
    return model.requires_grad_(False)


def attention_name(config, cuda):
    """transformers' fastest exact one: SDPA knows no soft-cap, FlexAttention has no backward on a
    CPU.
    """
    if config.attn_logit_softcapping is None:
        return "sdpa"
    return "flex_attention" if cuda else "eager"


def published_sae(sae, dtype):
    """x [N, D] -> x̂ [N, D], encoded densely; a TopK SAE decodes sparsely, as the published kernels
    do.
    """
    t = SimpleNamespace(**{name: p.detach().to(dtype) for name, p in sae.named_parameters()})
    # PyTorch 2.11's bag has no bf16 backward on CUDA
    rows = t.W_dec.float() if t.W_dec.is_cuda else t.W_dec

    def top_k(x):
        values, indices = F.linear(x.to(dtype) - t.b_dec, t.W_enc,
                                   t.b_enc).relu().topk(sae.k, sorted=False)
        return F.embedding_bag(indices, rows, per_sample_weights=values.to(rows.dtype),
                               mode="sum") + t.b_dec

    def jump_relu(x):
        pre = F.linear(x.to(dtype), t.W_enc, t.b_enc)
        return F.relu(pre) * (pre > t.threshold) @ t.W_dec + t.b_dec

    return {"topk": top_k, "jumprelu": jump_relu}[sae.architecture]
