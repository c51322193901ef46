"""The decoder-only transformer (paper Eq. 2-3), SAEs spliced into its residual stream (§3.4).

    x = model.embed(tokens)                    [B, T] -> [B, T, D]
    x = model.run(x, 0, depth, saes)           blocks, with the splice in one visible line
    logits = model.logits(x)                   final norm, head, soft-cap -> [B, T, V]

`run` runs any range of blocks, so that both models can share the first ones (adapt.py).
Shapes: B batch, T tokens, D d_model, V vocabulary.
"""
from torch import nn

from lorasae import gemma2, gemma3, llama3
from lorasae.attention import positions
from lorasae.errors import InputError
from lorasae.linear import Linear, linear
from lorasae.objectives import capped
from lorasae.sae import StandIn, is_in_mlp, splice

# A family is a module with Config, parse, Block and RMSNorm.
FAMILIES = {family.Config.model_type: family for family in (gemma2, gemma3, llama3)}


class Transformer(nn.Module):
    """x_0 = embed(tokens),  x_i = h_i(x_{i-1}),  y = softmax(cap(head(norm(x_L))))  (Eq. 2-3)

    Weights have Hugging Face's names; there are no buffers, so a model can be built on the meta
    device. `layer` counts blocks from 0: an SAE at layer 12 reads the output of the 13th block.
    (The published code for Figure 6 hooks it one block late, multiple_saes.py:196.)
    """

    def __init__(self, config):
        super().__init__()
        family = FAMILIES[config.model_type]
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(
                family.Block(config, layer) for layer in range(config.num_hidden_layers)),
            "norm": family.RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self):
        return self.model["layers"]

    @property
    def head(self):
        """The unembedding [V, D]: the embedding itself if the two are tied."""
        tied = self.config.tie_word_embeddings
        return (self.model["embed_tokens"] if tied else self.lm_head).weight

    @property
    def softcap(self):
        """The cap on the logits (Gemma-2's 30), or None."""
        return self.config.final_logit_softcapping

    @property
    def device(self):
        return self.head.device

    def embed(self, tokens):
        x = self.model["embed_tokens"](tokens)
        return x * self.config.embed_scale(x.dtype)

    def norm(self, x):
        """The final norm. objectives.py multiplies its output by `head`."""
        return self.model["norm"](x)

    def special(self, tokens):
        """tokens [B, T] -> bool [B, T]: BOS and EOS, which some SAEs skip."""
        return (tokens == self.config.bos_token_id) | (tokens == self.config.eos_token_id)

    def run(self, x, start, stop, saes={}, special=None, cache=None):
        """Blocks start .. stop-1. x [B, T, D] -> [B, T, D].

        saes: {layer: SAE}; an SAE's reconstruction replaces the output of its block, or of the
        block's MLP if that is its site. special [B, T]: model.special(tokens), which SAEs that were
        trained without BOS and EOS need.
        cache: an attention.Cache to extend; x then starts at the first position not in it.
        """
        if not saes.keys() <= set(range(len(self.layers))):
            raise InputError(f"saes are for layers {sorted(saes)}, but the model has blocks 0 to "
                             f"{len(self.layers) - 1}")
        first_position = cache.length(start) if cache is not None else 0
        places = positions(self.config, first_position, x)
        for layer in range(start, stop):
            sae = saes.get(layer)
            mlp_sae = sae if is_in_mlp(sae) else None
            x = self.layers[layer](x, places, cache, mlp_sae, special)
            if sae is not None and mlp_sae is None:
                x = splice(x, sae, special)                     # §3.4
        return x

    def read(self, tokens, sae, layer):
        """tokens [B, T] -> the activations that an SAE at `layer` reads at its `site` [B, T, D]."""
        seen = []

        def keep(x):
            seen.append(x)
            return x

        self.run(self.embed(tokens), 0, layer + 1, {layer: StandIn(sae, keep, everywhere=True)})
        return seen[0]

    def residual(self, tokens, saes={}, cache=None):
        """tokens [B, T] -> the residual stream after the last block [B, T, D]."""
        x = self.embed(tokens)
        return self.run(x, 0, len(self.layers), saes, self.special(tokens), cache)

    def logits(self, x):
        """Residual stream after the last block [B, T, D] -> logits [B, T, V], with its soft-cap."""
        return capped(linear(self.norm(x), self.head), self.softcap)

    def forward(self, tokens, saes={}, cache=None):
        """tokens [B, T] -> logits [B, T, V], with every SAE of {layer: SAE} spliced in."""
        return self.logits(self.residual(tokens, saes, cache))
