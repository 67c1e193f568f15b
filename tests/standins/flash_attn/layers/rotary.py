"""transformers 4.51 to 4.56 import this name; no Qwen calls it."""


def apply_rotary_emb(*args, **kwargs):
    raise NotImplementedError("the stand-in has attention only")
