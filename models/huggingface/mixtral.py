"""Mixtral checkpoints and those of other mixtures of experts that are Llama beside them: OLMoE, Qwen2-MoE, Qwen3-MoE.

They are published with a tensor for each matrix of each expert; ours stand stacked. The coefficient of
the balance loss, which config.json has too, is not of the model: one that is read has the losses that `moe` has by default.
"""

from dataclasses import dataclass

from models.huggingface.llama import Llama
from models.huggingface.table import Entry, check_options
from models.language_model import LanguageModel
from nn.moe import MoE
from nn.moe.topk import TopK

ALWAYS = dict(  # what all of them can be told, and is not supported but in this way
    router_jitter_noise=0.0,
    clip_qkv=None,
    decoder_sparse_step=1,
    mlp_only_layers=([], None),
    use_sliding_window=(False, None),
    qkv_bias=True,
)


@dataclass(frozen=True)
class Mixture(Llama):
    """A family of checkpoints whose feed-forward layers are mixtures of experts, by what sets it apart.

    mixture: its name in a layer. parts: those of an expert's gate, up and down. width: the field that says how wide an
    expert is, and experts the one that says how many there are. renormalises: whether the weights of a token always have
    the sum 1; None where config.json says so. shared: whether there is an expert for all tokens, with a gate.
    """

    mixture: str = "mlp"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    width: str = "moe_intermediate_size"
    experts: str = "num_experts"
    renormalises: bool | None = None
    shared: bool = False
    FFN = MoE

    def ffn_in(self, published: dict) -> str:
        check_options(published, ALWAYS)
        many = published["num_local_experts"] if "num_local_experts" in published else published[self.experts]
        renormalises = published.get("norm_topk_prob", False) if self.renormalises is None else self.renormalises
        ffn = f"moe:experts={many}:top_k={published['num_experts_per_tok']}:width={published[self.width]}"
        ffn += "" if renormalises else ":router=topk/over=all"
        if self.shared:
            ffn += f":shared=1:shared_gate=true:shared_width={published['shared_expert_intermediate_size']}"
        return ffn

    def fits(self, model: LanguageModel) -> bool:
        if not super().fits(model):
            return False
        mixtures = [s.layer for s in model.stack[1::2]]
        return all(isinstance(m.router, TopK) and (m.shared_gate is not None) == self.shared for m in mixtures)

    def ffn_out(self, ffn: MoE) -> dict:
        values = {self.experts: ffn.experts.experts, "num_experts_per_tok": ffn.top_k, self.width: ffn.experts.up.out_features}
        if self.renormalises is None:
            values |= dict(norm_topk_prob=ffn.router.over == "chosen")
        if self.shared:
            values |= dict(shared_expert_intermediate_size=ffn.shared.up.out_features)
        return values

    def ffn_table(self, theirs: str, ours: str, ffn: MoE) -> list[Entry]:
        theirs = f"{theirs}.{self.mixture}"
        entries = [Entry(f"{theirs}.gate.weight", f"{ours}.router.gate.weight")]
        parts = list(zip(self.parts, ("gate", "up", "down"), strict=True))
        for e in range(ffn.experts.experts):
            entries += [Entry(f"{theirs}.experts.{e}.{a}.weight", f"{ours}.experts.{b}.weight#{e}") for a, b in parts]
        if self.shared:
            entries += [Entry(f"{theirs}.shared_expert.{a}.weight", f"{ours}.shared.{b}.weight#0") for a, b in parts]
            entries.append(Entry(f"{theirs}.shared_expert_gate.weight", f"{ours}.shared_gate.weight"))
        return entries


MIXTRAL = Mixture(  # Jiang et al. 2024 (arXiv:2401.04088)
    "MixtralForCausalLM", windowed="all", default_eps=1e-5, mixture="block_sparse_moe", parts=("w1", "w3", "w2"),
    width="intermediate_size", experts="num_local_experts", renormalises=True,
)  # fmt: skip
OLMOE = Mixture(  # Muennighoff et al. 2024 (arXiv:2409.02060)
    "OlmoeForCausalLM", qk_norm="all", default_eps=1e-5, width="intermediate_size"
)
QWEN2_MOE = Mixture("Qwen2MoeForCausalLM", inputs_biased=True, shared=True)  # Yang et al. 2024 (arXiv:2407.10671)
QWEN3_MOE = Mixture("Qwen3MoeForCausalLM", qk_norm="head")  # Yang et al. 2025 (arXiv:2505.09388)
