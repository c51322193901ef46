"""Low-rank adapting models for sparse autoencoders: the reference implementation.

    model = lorasae.load_model("tiny-gemma-2")
    saes = {2: lorasae.load_sae("tiny-gemma-2")}
    tokens = lorasae.encode("tiny-gemma-2", "def area(")
    logits = model(tokens, saes)                        # the SAE replaces block 2's output

adapt.py is the method; the README gives a reading order for the rest.
"""
from lorasae import objectives, topk
from lorasae.errors import InputError
from lorasae.generation import generate
from lorasae.io.adapters import load_adapter, save_adapter
from lorasae.io.models import encode, load_model, load_tokenizer, save_model
from lorasae.io.saes import load_sae, save_sae
from lorasae.lora import add_lora, base, merge_lora
from lorasae.sae import StandIn

__all__ = [
    "InputError", "StandIn", "add_lora", "base", "encode", "generate", "load_adapter", "load_model",
    "load_sae", "load_tokenizer", "merge_lora", "objectives", "save_adapter", "save_model",
    "save_sae", "topk"]
