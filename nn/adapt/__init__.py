"""Adapters: what learns beside the frozen weights of a model, `(model)`; they change it in place."""

from nn.adapt.lora import lora

ADAPTERS = {
    "lora": lora,
}
