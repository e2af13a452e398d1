"""Llama checkpoints (2 to 3.2) and those of its relatives: rotary positions, RMSNorm, gated layers, shared key/value heads."""

import re
from dataclasses import dataclass

from models.huggingface.table import Entry, check_options
from models.language_model import LanguageModel
from nn.attention import GQA, MHA, MQA
from nn.ffn import GLU
from nn.norm import RMSNorm
from nn.position import RoPE

STRETCH = dict(factor="factor", low="low_freq_factor", high="high_freq_factor", original="original_max_position_embeddings")
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu:approximate=true"}
NORMS = {  # names of the norms of attention and of the feed-forward layer, by the place where they stand
    "pre": (["input_layernorm"], ["post_attention_layernorm"]),
    "output": (["post_attention_layernorm"], ["post_feedforward_layernorm"]),
    "sandwich": (
        ["input_layernorm", "post_attention_layernorm"],
        ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
    ),
}


@dataclass(frozen=True)
class Llama:
    """A family of checkpoints, by what sets it apart from Llama.

    place: where norms stand. qk_norm: as of `gqa`. inputs_biased: queries, keys and values have a bias, the output none.
    windowed: the layers with a window where config.json has no layer_types: "all", "even", "last" or "none".
    activation: of the gate. offset: added to the gains. scaled: embeddings are multiplied by sqrt(dim), and scores and
    logits have options of their own, as in Gemma 2.
    """

    architecture: str
    place: str = "pre"
    qk_norm: str = "none"
    inputs_biased: bool = False
    windowed: str = "none"
    activation: str = "silu"
    offset: float = 0.0
    scaled: bool = False
    default_eps: float = 1e-6
    FFN = GLU
    PREFIX = "model."
    IGNORED = re.compile(r".*rotary_emb\.inv_freq")

    def config_in(self, published: dict) -> dict:
        """Fields of config.json -> fields of ours."""
        check_options(published, {"hidden_activation" if self.scaled else "hidden_act": self.activation})
        check_options(published, dict(pretraining_tp=1, use_bidirectional_attention=(None, False)))
        heads, eps = published["num_attention_heads"], published.get("rms_norm_eps", self.default_eps)
        mixer = f"gqa:kv_heads={published.get('num_key_value_heads') or heads}"
        if published.get("head_dim"):
            mixer += f":head_dim={published['head_dim']}"
        if self.inputs_biased or published.get("attention_bias"):
            mixer += ":bias=true:out_bias=false" if self.inputs_biased else ":bias=true"
        if self.qk_norm != "none":
            mixer += f":qk_norm={self.qk_norm}:qk_eps={eps}"
        if self.scaled:
            mixer += f":scale={published['query_pre_attn_scalar'] ** -0.5}"
            mixer += f":softcap={published.get('attn_logit_softcapping') or 0.0}"
        mixers = [mixer + (f":window={window}" if window else "") for window in self.windows(published)]
        period = next(n for n in range(1, len(mixers) + 1) if mixers == (mixers[:n] * len(mixers))[: len(mixers)])
        return dict(
            model="llama-8b",
            depth=published["num_hidden_layers"],
            heads=heads,
            dim=published["hidden_size"],
            vocab_size=published["vocab_size"],
            seq_len=published.get("max_position_embeddings", 2048),
            norm=f"rmsnorm:eps={eps}" + (f":offset={self.offset}" if self.offset else ""),
            norm_place=self.place,
            mixer=",".join(mixers[:period]),
            ffn=self.ffn_in(published),
            position=rope_in(published),
            tie=published.get("tie_word_embeddings", self.scaled),
            embedding_scale=published["hidden_size"] ** 0.5 if self.scaled else 1.0,
            softcap=published.get("final_logit_softcapping") or 0.0 if self.scaled else 0.0,
        )

    def ffn_in(self, published: dict) -> str:
        """The spec of the feed-forward layers."""
        bias = ":bias=true" if published.get("mlp_bias") else ""
        return f"{ACTIVATIONS[self.activation]}:width={published['intermediate_size']}{bias}"

    def windows(self, published: dict) -> list[int | None]:
        """The window of each layer."""
        depth, window = published["num_hidden_layers"], published.get("sliding_window")
        first = published.get("max_window_layers", depth)
        if not published.get("use_sliding_window", self.windowed != "last"):
            window = None
        chosen = {"all": range(depth), "even": range(0, depth, 2), "last": range(first, depth), "none": ()}[self.windowed]
        kinds = published.get("layer_types") or [("full", "sliding")[i in chosen] + "_attention" for i in range(depth)]
        if len(kinds) != depth or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise ValueError(f"config.json: layer_types are full_attention or sliding_attention, {depth} of them")
        return [window if kind == "sliding_attention" else None for kind in kinds]

    def fits(self, model: LanguageModel) -> bool:
        """Whether the parts are those that `config_out` asks; that nothing else differs is seen by reading it again."""
        parts = model.alternates((GQA, MHA, MQA), self.FFN, RMSNorm) and type(model.position) is RoPE
        stretched = parts and model.position.factor != 1 and model.position.scaling != "llama3"
        return parts and not stretched and model.config.norm_place == self.place and all(
            (s.layer.query_gain is None) == (self.qk_norm in ("none", "unit")) for s in model.stack[0::2]
        )

    def config_out(self, model: LanguageModel) -> dict:
        config, mixer, ffn = model.config, model.stack[0].layer, model.stack[1].layer
        windows = [s.layer.window for s in model.stack[0::2]]
        window = next((w for w in windows if w is not None), None)
        kinds = [("full", "sliding")[w is not None] + "_attention" for w in windows]
        values = dict(
            architectures=[self.architecture],
            num_hidden_layers=len(model.stack) // 2,
            hidden_size=config.dim,
            num_attention_heads=mixer.heads,
            num_key_value_heads=mixer.kv_heads,
            head_dim=mixer.head_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.seq_len,
            rms_norm_eps=model.stack[0].norm.eps,
            **rope_out(model.position),
            attention_bias=mixer.query.bias is not None,
            tie_word_embeddings=config.tie,
            **self.ffn_out(ffn),
        )
        values["hidden_activation" if self.scaled else "hidden_act"] = self.activation
        if self.windowed != "none":
            values |= dict(sliding_window=window)
        if self.windowed == "last":
            values |= dict(use_sliding_window=window is not None, max_window_layers=len(windows))
        if self.windowed in ("last", "even"):
            values |= dict(layer_types=kinds)
        if self.scaled:
            scalar = round(mixer.scale**-2, 9)
            values |= dict(
                query_pre_attn_scalar=int(scalar) if scalar.is_integer() else scalar,
                attn_logit_softcapping=mixer.softcap or None,
                final_logit_softcapping=config.softcap or None,
            )
        return values

    def ffn_out(self, ffn: GLU) -> dict:
        """What config.json says of the feed-forward layers."""
        return dict(intermediate_size=ffn.gate.out_features, mlp_bias=ffn.gate.bias is not None)

    def table(self, model: LanguageModel) -> list[Entry]:
        """Their tensors and ours, in the order of the file."""
        entries = [Entry("embed_tokens.weight", "embedding.weight")]
        for i in range(model.config.depth):
            block, mixer, ffn = f"layers.{i}", f"stack.{2 * i}", f"stack.{2 * i + 1}"
            for name, sublayer in zip(NORMS[self.place], (mixer, ffn), strict=True):
                places = zip(name, ("norm", "second_norm"), strict=False)
                entries += [Entry(f"{block}.{theirs}.weight", f"{sublayer}.{ours}.weight") for theirs, ours in places]
            for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out")):
                kinds = ("weight",) if getattr(model.stack[2 * i].layer, ours).bias is None else ("weight", "bias")
                entries += [Entry(f"{block}.self_attn.{theirs}.{kind}", f"{mixer}.layer.{ours}.{kind}") for kind in kinds]
            if self.qk_norm != "none":
                for theirs, ours in (("q_norm", "query_gain"), ("k_norm", "key_gain")):
                    entries.append(Entry(f"{block}.self_attn.{theirs}.weight", f"{mixer}.layer.{ours}"))
            entries += self.ffn_table(block, f"{ffn}.layer", model.stack[2 * i + 1].layer)
        entries.append(Entry("norm.weight", "final_norm.weight"))
        return entries + ([] if model.config.tie else [Entry("lm_head.weight", "head.weight", prefixed=False)])

    def ffn_table(self, theirs: str, ours: str, ffn: GLU) -> list[Entry]:
        """The tensors of a feed-forward layer; `theirs` and `ours` are the names of what it stands in."""
        kinds = ("weight",) if ffn.gate.bias is None else ("weight", "bias")
        parts = (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down"))
        return [Entry(f"{theirs}.mlp.{a}.{kind}", f"{ours}.{b}.{kind}") for a, b in parts for kind in kinds]


def rope_in(published: dict) -> str:
    """The spec of the rotary positions that config.json describes."""
    rope = published.get("rope_parameters") or {}  # newer files keep all of rope here
    scaling = published.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope_type {kind!r} is not supported, only default and llama3")
    stretch = "".join(f":{ours}={scaling[theirs]}" for ours, theirs in STRETCH.items()) if kind == "llama3" else ""
    return f"rope:theta={published.get('rope_theta', rope.get('rope_theta', 10000.0))}{stretch}"


def rope_out(rope: RoPE) -> dict:
    """What config.json says of rotary positions, in the fields that older and newer readers look at."""
    parameters = dict(rope_type="default", rope_theta=rope.theta)
    if rope.factor != 1:
        parameters = dict(rope_type="llama3", rope_theta=rope.theta) | {
            theirs: getattr(rope, ours) for ours, theirs in STRETCH.items()
        }
    return dict(
        rope_parameters=parameters, rope_theta=rope.theta, rope_scaling=parameters if rope.factor != 1 else None
    )


LLAMA = Llama("LlamaForCausalLM")
MISTRAL = Llama("MistralForCausalLM", windowed="all")  # Jiang et al. 2023 (arXiv:2310.06825)
QWEN2 = Llama("Qwen2ForCausalLM", inputs_biased=True, windowed="last")  # Yang et al. 2024 (arXiv:2407.10671)
QWEN3 = Llama("Qwen3ForCausalLM", qk_norm="head", windowed="last")  # Yang et al. 2025 (arXiv:2505.09388)
OLMO2 = Llama("Olmo2ForCausalLM", place="output", qk_norm="all", default_eps=1e-5)  # OLMo et al. 2024 (arXiv:2501.00656)
GEMMA2 = Llama(  # Gemma Team 2024 (arXiv:2408.00118)
    "Gemma2ForCausalLM", place="sandwich", windowed="even", activation="gelu_pytorch_tanh", offset=1.0, scaled=True
)
