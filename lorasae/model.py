"""The decoder-only transformer (paper Eq. 2-3) with SAEs spliced into its residual stream (Eq. 5).

    x = model.embed(tokens)                    [B, T] -> [B, T, D]
    x = model.run(x, 0, depth, saes)           blocks, with the splice in one visible line
    logits = model.logits(x)                   final norm, head, soft-cap -> [B, T, V]

`run` works on any range of blocks, which is what lets the teacher and the student share the frozen prefix (adapt.py).
Shapes: B batch, T tokens, D d_model, V vocabulary.
"""
from torch import nn

from lorasae import gemma2, llama3
from lorasae.attention import positions
from lorasae.linear import Linear, linear
from lorasae.objectives import capped
from lorasae.sae import splice


class Transformer(nn.Module):
    """x_0 = embed(tokens),  x_i = h_i(x_{i-1}),  y = softmax(head(norm(x_L)))  (Eq. 2-3); HF's names for every weight.

    `layer` counts blocks from 0, so SAE layer 12 reads the output of the 13th block. (The published code of Figure 6 hooks
    it a block late, multiple_saes.py:196.) No buffer is registered: a model may be built on the meta device and filled
    with weights afterwards.
    """

    def __init__(self, config):
        super().__init__()
        family = {"gemma2": gemma2, "llama": llama3}[config.model_type]
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(family.Block(config, layer) for layer in range(config.num_hidden_layers)),
            "norm": family.RMSNorm(config),
        })
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def layers(self):
        return self.model["layers"]

    @property
    def head(self):
        """The unembedding [V, D]: the embedding itself where the two are tied."""
        return (self.model["embed_tokens"] if self.config.tie_word_embeddings else self.lm_head).weight

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
        """The final norm: what objectives.py multiplies by `head`."""
        return self.model["norm"](x)

    def special(self, tokens):
        """tokens [B, T] -> bool [B, T]: BOS and EOS positions, which SAEs trained without them leave alone."""
        return special_positions(tokens, self.config.bos_token_id, self.config.eos_token_id)

    def run(self, x, start, stop, saes={}, special=None, cache=None):
        """Blocks start .. stop-1. x [B, T, D] -> [B, T, D].

        saes: {layer: SAE}; the reconstruction of an SAE replaces the output of its block. special [B, T]: where BOS and
        EOS are, `model.special(tokens)`, which SAEs trained without them need to know. cache: an attention.Cache to
        extend; x then continues the positions it holds.
        """
        begun = cache.length if cache is not None else 0
        where = positions(self.config, begun, x)
        for layer in range(start, stop):
            x = self.layers[layer](x, where, cache)
            if layer in saes:
                x = splice(x, saes[layer], special)             # Eq. 5: the reconstruction replaces the activation
        return x

    def logits(self, x):
        """Residual stream after the last block [B, T, D] -> logits [B, T, V], soft-capped where the model is."""
        return capped(linear(self.norm(x), self.head), self.softcap)

    def forward(self, tokens, saes={}, cache=None):
        """tokens [B, T] -> logits [B, T, V], with every SAE of {layer: SAE} spliced in."""
        x = self.embed(tokens)
        x = self.run(x, 0, len(self.layers), saes, self.special(tokens), cache)
        return self.logits(x)


def special_positions(tokens, bos, eos):
    """tokens [B, T] -> bool [B, T]: where a token is BOS or EOS."""
    return (tokens == bos) | (tokens == eos)
