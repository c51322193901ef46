"""The LoRA step as others would write it with transformers + peft: the benchmark's peers.

    tuned=False     the published recipe unchanged: eager attention, dropout 0.1, an fp32 SAE in a
                    bf16 model, all logits; each step waits for its loss and empties the cache
    tuned=True      the best these tools can do: no dropout, no waiting, fused AdamW, the fastest
                    attention, the SAE in the model's dtype, head and KL by chunks (no logits kept)

Both run the whole model twice, without and with adapters and this package's SAE: a hook that
replaces an activation allows nothing else. Only the benchmark needs transformers and peft.

Shapes: B batch, T tokens, D d_model, N = B*T.
"""
from copy import deepcopy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from lorasae.lora import TARGETS
from lorasae.objectives import capped

LR, CLIP, DROPOUT = 5e-5, 1.0, 0.1                          # the paper's
CHUNK = 128                                                 # tokens


class Peer:
    """Calling it takes one step for every `batch` sequences of its tokens [B, T].

    Its answer is the first step's loss without dropout and, in fp32, the gradients (bf16 logits
    give others). weights: the frozen Transformer's, shared. adapter: {PEFT's key: tensor}, copied.
    """

    def __init__(self, case, weights, adapter, sae, tokens, *, tuned):
        self.tuned, self.batches = tuned, tokens.split(case.batch)
        self.cap = case.config.final_logit_softcapping
        attention = attention_name(case.config, tokens.device.type) if tuned else "eager"
        model = huggingface(case, weights, attention)
        model.config.use_cache = not tuned
        self.dtype = model.dtype if tuned else torch.float32
        self.sae = deepcopy(sae).to(self.dtype)
        self.spliced = False
        model.model.layers[case.layer].register_forward_hook(self.splice)

        self.whole = model                              # PEFT puts its adapters into it
        self.model = get_peft_model(model, LoraConfig(
            task_type="CAUSAL_LM", r=case.rank, lora_alpha=32,
            lora_dropout=0.0 if tuned else DROPOUT, target_modules=list(TARGETS),
            layers_to_transform=case.blocks))
        set_peft_model_state_dict(self.model, adapter)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=LR, weight_decay=0.01, fused=tuned or None)

    def splice(self, module, args, x):
        """The forward hook: replaces the block's output x [B, T, D] by its reconstruction."""
        return self.sae(x.to(self.dtype)).to(x.dtype) if self.spliced else x

    def loss(self, tokens):
        """Σ_tokens KL(base ‖ adapted with SAE) / B."""
        # Run to the final hidden state if tuned, otherwise to the logits.
        run = self.whole.model if self.tuned else self.whole
        with torch.no_grad(), self.model.disable_adapter():
            base = run(input_ids=tokens)[0]
        self.spliced = True
        adapted = run(input_ids=tokens)[0]
        self.spliced = False
        if self.tuned:
            return self.chunked(base.flatten(0, 1), adapted.flatten(0, 1)) / len(tokens)
        p = base.softmax(-1)
        return F.kl_div(adapted.log_softmax(-1), p, reduction="batchmean")

    def chunked(self, base, adapted):
        """The KL of hidden states [N, D], summed; its gradient is computed chunk by chunk."""
        def logits(hidden):
            return capped(self.whole.lm_head(hidden), self.cap)

        total, leaf = 0, adapted.detach().requires_grad_()
        for target, hidden in zip(base.split(CHUNK), leaf.split(CHUNK)):
            with torch.no_grad():
                p = logits(target).softmax(-1)
            log_q = logits(hidden).log_softmax(-1)
            part = F.kl_div(log_q, p, reduction="sum")
            part.backward()
            total += part.detach()
        through = (adapted * leaf.grad).sum()
        return total + through - through.detach()

    def __call__(self):
        self.model.train()
        for tokens in self.batches:
            self.optimizer.zero_grad()
            loss = self.loss(tokens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.trained, CLIP)
            self.optimizer.step()
            if not self.tuned:
                loss.item()
                del loss
                torch.cuda.empty_cache()

    def answer(self):
        self.model.eval()
        loss = self.loss(self.batches[0])
        if loss.dtype != torch.float32:
            return [loss.detach().float()]
        return [loss.detach(), *torch.autograd.grad(loss, self.trained)]


def huggingface(case, weights, attention):
    """transformers' model, which shares the tensors of `weights` {parameter name: tensor}."""
    some = next(iter(weights.values()))
    with some.device:
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**case.raw), attn_implementation=attention, dtype=some.dtype)
    if case.config.tie_word_embeddings:
        weights = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False)


def attention_name(config, device):
    """The fastest exact attention: SDPA has no soft-cap, FlexAttention no backward on a CPU."""
    if config.attn_logit_softcapping is None:
        return "sdpa"
    return "flex_attention" if device == "cuda" else "eager"
