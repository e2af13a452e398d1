"""Named models: published stacks with their published sizes, and the small default.

A preset sets fields of the configuration; a flag given beside `--model` takes precedence.
"""


def _gpt2(depth: int, heads: int, dim: int) -> dict:
    """Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2 (124M to 1.5B parameters)."""
    return dict(
        mixer="mha:bias=true", ffn="mlp:activation=gelu_tanh:bias=true", norm="layernorm", position="learned",
        depth=depth, heads=heads, dim=dim, vocab_size=50257, seq_len=1024, tie=True, init="gpt2", softcap=0.0,
    )  # fmt: skip


def _llama(depth: int, dim: int, heads: int, kv_heads: int, width: int, *, vocab_size: int, seq_len: int,
           tie: bool, rope: str = "rope:theta=500000") -> dict:  # fmt: skip
    """Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv:2407.21783), table 3; below 1B the same shape, smaller."""
    return dict(
        mixer=f"gqa:kv_heads={kv_heads}", ffn=f"swiglu:width={width}", norm="rmsnorm:eps=1e-5", position=rope,
        depth=depth, dim=dim, heads=heads, vocab_size=vocab_size, seq_len=seq_len, tie=tie, init="gpt2", softcap=0.0,
    )  # fmt: skip


def _mamba(mixer: str, depth: int, dim: int, *, vocab_size: int, seq_len: int = 2048, tie: bool = True,
           init: str = "gpt2") -> dict:  # fmt: skip
    """Gu and Dao 2023, "Mamba" (arXiv:2312.00752), table 12; Dao and Gu 2024 (arXiv:2405.21060), table 9: no ffn, no positions.

    The vocabulary of GPT-NeoX-20B, 50277, is filled up to a multiple of 8 for Mamba, of 16 for Mamba-2.
    """
    return dict(
        mixer=mixer, ffn="none", norm="rmsnorm:eps=1e-5", position="none",
        depth=depth, dim=dim, heads=max(1, dim // 64), vocab_size=vocab_size, seq_len=seq_len, tie=tie, init=init, softcap=0.0,
    )  # fmt: skip


def _transnormer(depth: int, dim: int, heads: int, width: int, *, vocab_size: int = 64000, seq_len: int = 2048) -> dict:
    """Qin et al. 2023, "Scaling TransNormer to 175 Billion Parameters" (arXiv:2307.14995): sizes of the released models.

    They weight the channels of the first layer by cosines where this turns pairs; how long their texts were is a guess.
    """
    return dict(
        mixer="lightning:slopes=alibi", ffn=f"sglu:width={width}", norm="srmsnorm", position="rope:interleaved=true",
        depth=depth, dim=dim, heads=heads, vocab_size=vocab_size, seq_len=seq_len, tie=True, embedding_scale=dim**0.5,
        init="gpt2", softcap=0.0,
    )  # fmt: skip


def _jetmoe(depth: int, dim: int, heads: int, width: int, *, experts: int, vocab_size: int, seq_len: int,
            init: str = "gpt2") -> dict:  # fmt: skip
    """Shen et al. 2024, "JetMoE" (arXiv:2404.07413): in every layer mixtures of attention heads and of feed-forward layers.

    `heads` are those of an expert. The base of the positions, epsilon and the tied embedding are defaults of their code.
    """
    return dict(
        mixer=f"moa:experts={experts}:top_k=2", ffn=f"moe:experts={experts}:top_k=2:width={width}", norm="rmsnorm:eps=1e-6",
        position="rope", depth=depth, dim=dim, heads=heads, vocab_size=vocab_size, seq_len=seq_len, tie=True, init=init,
        softcap=0.0,
    )  # fmt: skip


_PAIR = "mamba2:groups=8 mlp:activation=relu2:width=21504"  # M-
_NEMOTRON_H = (f"({_PAIR})*3 mamba2:groups=8 gqa:kv_heads=8 mlp:activation=relu2:width=21504 "
               f"(({_PAIR})*4 mamba2:groups=8 gqa:kv_heads=8 mlp:activation=relu2:width=21504)*3 ({_PAIR})*5")  # fmt: skip
STRETCHED = "rope:theta=500000:factor=32"  # Llama 3.2's text models

PRESETS: dict[str, dict] = {
    "small": dict(
        stem="ngram", mixer="gqa:qk_norm=unit,gqa:qk_norm=unit:value_embedding=true", ffn="mlp:activation=relu2",
        norm="rmsnorm:gain=false", position="rope",
        depth=3, dim=256, heads=4, vocab_size=4096, seq_len=256, tie=False, init="fan_in", softcap=0.0,
    ),
    "gpt2": _gpt2(12, 12, 768),
    "gpt2-medium": _gpt2(24, 16, 1024),
    "gpt2-large": _gpt2(36, 20, 1280),
    "gpt2-xl": _gpt2(48, 25, 1600),
    "llama-1m": _llama(4, 128, 4, 2, 256, vocab_size=4096, seq_len=256, tie=True),
    "llama-10m": _llama(6, 320, 5, 5, 896, vocab_size=8192, seq_len=512, tie=True),
    "llama-125m": _llama(12, 768, 12, 4, 2048, vocab_size=32768, seq_len=2048, tie=False),
    "llama-1b": _llama(16, 2048, 32, 8, 8192, vocab_size=128256, seq_len=131072, tie=True, rope=STRETCHED),
    "llama-3b": _llama(28, 3072, 24, 8, 8192, vocab_size=128256, seq_len=131072, tie=True, rope=STRETCHED),
    "llama-8b": _llama(32, 4096, 32, 8, 14336, vocab_size=128256, seq_len=8192, tie=False),
    "llama-70b": _llama(80, 8192, 64, 8, 28672, vocab_size=128256, seq_len=8192, tie=False),
    "mamba": _mamba("mamba", 6, 256, vocab_size=4096, seq_len=256, init="fan_in"),
    "mamba-130m": _mamba("mamba", 24, 768, vocab_size=50280),
    "mamba-370m": _mamba("mamba", 48, 1024, vocab_size=50280),
    "mamba-790m": _mamba("mamba", 48, 1536, vocab_size=50280),
    "mamba-1.4b": _mamba("mamba", 48, 2048, vocab_size=50280),
    "mamba-2.8b": _mamba("mamba", 64, 2560, vocab_size=50280),
    "mamba2": _mamba("mamba2:state=64", 6, 256, vocab_size=4096, seq_len=256, tie=False, init="fan_in"),
    "mamba2-130m": _mamba("mamba2", 24, 768, vocab_size=50288),
    "mamba2-370m": _mamba("mamba2", 48, 1024, vocab_size=50288),
    "mamba2-780m": _mamba("mamba2", 48, 1536, vocab_size=50288),
    "mamba2-1.3b": _mamba("mamba2", 48, 2048, vocab_size=50288),
    "mamba2-2.7b": _mamba("mamba2", 64, 2560, vocab_size=50288),
    "mamba2-hybrid": dict(  # the shares of Waleffe et al. 2024 (arXiv:2406.07887): models.hybrid 14 0.08 0.5
        stack="(mamba2:state=64 mlp:activation=gelu)*3 mlp:activation=gelu gqa:kv_heads=2 "
              "(mamba2:state=64 mlp:activation=gelu)*3",
        norm="rmsnorm:eps=1e-5", position="none",
        dim=256, heads=4, vocab_size=4096, seq_len=256, tie=True, init="fan_in", softcap=0.0,
    ),
    "nemotron-h-8b": dict(  # NVIDIA 2025, "Nemotron-H" (arXiv:2504.03624), table 1: as models.hybrid spells M-M-M-M*-…
        stack=_NEMOTRON_H, norm="rmsnorm:eps=1e-5", position="none",
        dim=4096, heads=32, vocab_size=131072, seq_len=8192, tie=False, init="gpt2", softcap=0.0,
    ),
    "transnormer": _transnormer(6, 256, 4, 704, vocab_size=4096, seq_len=256) | dict(init="fan_in", embedding_scale=1.0),
    "transnormer-385m": _transnormer(24, 1024, 8, 2816),
    "transnormer-1b": _transnormer(16, 2048, 16, 5632),
    "jetmoe": _jetmoe(3, 256, 4, 256, experts=4, vocab_size=4096, seq_len=256, init="fan_in"),
    "jetmoe-8b": _jetmoe(24, 2048, 16, 5632, experts=8, vocab_size=32000, seq_len=4096),
}  # fmt: skip
