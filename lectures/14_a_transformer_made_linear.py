# %% [markdown]
# # A Transformer made linear
#
# Softmax attention keeps every key and value it has seen. Linear attention keeps one matrix a head, but to train such a model
# anew is dear. LoLCATs (Zhang et al. 2024, arXiv:2410.10254) takes a trained softmax Transformer instead and changes it in two
# steps. Attention transfer: each attention gets a linear form with feature maps f, f' to be learned, and is trained until it
# gives what the softmax gave. LoRA (Hu et al. 2021, arXiv:2106.09685): with these in place, thin matrices beside the frozen
# weights make up for what is still wrong. The paper made an 8B model linear with 40 million tokens, and one of 405B.
#
# Its claims, on a model that is trained here in seconds: neither step alone is enough; each layer can be transferred by itself.

# %%
from copy import deepcopy
from dataclasses import replace

import lectern
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from models import Config, LanguageModel, build_model
from models.distill import Distillation, matrix_of
from models.learn_only import learn_only
from models.linearize import linearize
from models.merge_adapter import merged
from models.weights import adapted
from nn.linear_attention import LolCats
from train import build_optimizer

torch.set_num_threads(1)
SEED = 0

# %% [markdown]
# ## A text in which the far counts
#
# Twelve pairs of a key and a value, then the twelve keys in another order: each wants its value. What is asked for stands
# 2 to 47 tokens back. The teacher has two layers of attention, an mlp between them, and before them a short convolution, with
# which a value knows its key.

# %%
P, SYMBOLS, LENGTH = 12, 16, 48
FIELDS = dict(
    vocab_size=33, dim=64, heads=4, stem="", stack="conv:width=2 gqa mlp:width=128 gqa", position="rope", seq_len=LENGTH,
    optimizer="muon:lr=0.02", rest_optimizer="adamw:lr=0.01:betas=0.8+0.95", embedding_lr=0.05,
)  # fmt: skip


def recall(generator: torch.Generator, rows: int = 32) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, 4 P), -100 where nothing is asked."""
    keys = torch.rand(rows, SYMBOLS, generator=generator).argsort(1)[:, :P]
    values = torch.randint(SYMBOLS, (rows, P), generator=generator)
    order = torch.rand(rows, P, generator=generator).argsort(1)
    pairs = torch.stack([1 + keys, 1 + SYMBOLS + values], -1)  # (B, P, 2)
    asked = pairs.gather(1, order[..., None].expand(-1, -1, 2))
    row = torch.cat([torch.zeros(rows, 1, dtype=torch.long), pairs.flatten(1), asked.flatten(1)], 1)  # (B, 4 P + 1)
    targets = row[:, 1:].clone()
    targets[:, : 2 * P] = targets[:, 2 * P :: 2] = -100
    return row[:, :-1], targets


def learn(loss_of: nn.Module, model: LanguageModel, steps: int, generator: torch.Generator) -> None:
    """Minimise what `loss_of(inputs, targets)` gives, the model itself or one with a teacher, in what may learn of it."""
    optimizer = build_optimizer(model.config, model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1, 2 * (1 - step / steps))
        inputs, targets = recall(generator)
        (loss_of(inputs, targets) / (targets >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.inference_mode()
def judged(model: LanguageModel) -> tuple[float, float]:
    """The loss on rows of which none was trained on, and the share of right answers."""
    inputs, targets = TEST
    right = (model(inputs).argmax(-1) == targets)[targets >= 0]
    return (model(inputs, targets) / (targets >= 0).sum()).item(), right.double().mean().item()


TEST = recall(torch.Generator().manual_seed(1000 + SEED), 256)
teacher = build_model(Config.of(**FIELDS), seed=SEED)
learn(teacher, teacher, 110, torch.Generator().manual_seed(SEED))
loss, right = judged(teacher)
print(f"the teacher: loss {loss:.3f}, {right:.1%} right")
assert right > 0.98

# %% [markdown]
# ## The linear form
#
#           sum_{n-w < i <= n} g exp(q_n.k_i / sqrt(D) - c_n) v_i + f(q_n)^T sum_{j <= n-w} f'(k_j) v_j^T
#     y_n = ---------------------------------------------------------------------------------------------
#           the same with 1 instead of each v
#
# with f(u) = [softmax(u A + b), softmax(-u A - b)], the map of Hedgehog (Zhang et al. 2024, arXiv:2402.04347). The last w
# tokens have their softmax, all before them are a matrix (`nn/linear_attention/lolcats.py`); the teacher's W_q, W_k, W_v and
# W_o stay. Where the window holds the whole text it is the teacher, whatever g is. With a short one the state no longer grows.
# Maps of 8 columns for heads of 16 are half as wide as the heads, as the paper's 64 for 128.

# %%
WINDOW, WIDTH = 4, 8


def student(window: int = WINDOW, **chosen) -> LanguageModel:
    """The teacher with its attention in the linear form, whose maps begin as the identity."""
    made = linearize(teacher, f"lolcats:window={window}:width={WIDTH}", **chosen)
    made.config = replace(made.config, optimizer="adamw:lr=0.04:eps=1e-20", rest_optimizer="adamw:lr=0.04:eps=1e-20")
    return made


with torch.inference_mode():
    for g in (-5.0, 0.0, 5.0):
        whole = student(LENGTH)
        for module in whole.modules():
            if isinstance(module, LolCats):
                module.mix.fill_(g)
        apart = (whole(TEST[0]) - teacher(TEST[0])).abs().max()
        print(f"window {LENGTH}, g = sigmoid({g:+.0f}): logits differ from the teacher's by {apart:.0e}")
        assert apart < 1e-4
for length in (48, 480, 4800):
    grows, stays = (model.init_state(1, length).bytes() for model in (teacher, student()))
    print(f"state of {length:5} tokens: softmax {grows:10,} bytes, window {WINDOW} and matrices {stays:8,} bytes")
assert grows > 50 * stays

# %% [markdown]
# ## Four students
#
# Swapped: nothing is learned. LoRA only: rank 2 beside q, k, v, o, trained on the next token with the feature maps as they are
# at first. Transfer only: the maps and g, trained so that each layer's output has the least square distance from the teacher's.
# Both: half of the steps each. All that learn see as many tokens. On the command line:
#
#     python -m models.linearize runs/teacher --mixer lolcats:window=4:width=8 --out student
#     python train.py --weights student --teacher runs/teacher --match outputs:norm=mse --only "*_map,*_shift,*.mix" --out 1
#     python train.py --weights 1 --adapt lora:rank=2 --out 2
#     python -m models.merge_adapter 2 --out linear

# %%
STEPS, MAPS = 100, "*_map,*_shift,*.mix"


def transfer(model: LanguageModel, steps: int, generator: torch.Generator, source: LanguageModel = teacher) -> int:
    """In place, attention transfer; how many numbers learn."""
    learn_only(model, MAPS)
    learn(Distillation(model, source, "outputs:norm=mse"), model, steps, generator)
    return trainable(model)


def with_lora(model: LanguageModel, steps: int, generator: torch.Generator) -> int:
    """In place, LoRA on the next token; how many numbers learn."""
    adapted(model, "lora:rank=2", seed=SEED)
    model.config = replace(model.config, rest_optimizer="adamw:lr=0.01")
    learn(model, model, steps, generator)
    return trainable(model)


def trainable(model: LanguageModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def tokens() -> torch.Generator:
    """The same ones for all students."""
    return torch.Generator().manual_seed(500 + SEED)


STUDENTS = {name: student() for name in ("swapped", "LoRA only", "transfer only", "both")}
numbers = {"swapped": [0], "LoRA only": [with_lora(STUDENTS["LoRA only"], STEPS, tokens())]}
numbers["transfer only"] = [transfer(STUDENTS["transfer only"], STEPS, tokens())]
stream = tokens()
numbers["both"] = [step(STUDENTS["both"], STEPS // 2, stream) for step in (transfer, with_lora)]
total, LOSS = sum(parameter.numel() for parameter in teacher.parameters()), {}
print(f"{'student':15}{'loss':>7}{'right':>8}   what learns, of the teacher's {total:,} numbers")
for name, model in STUDENTS.items():
    LOSS[name], right = judged(model)
    print(f"{name:15}{LOSS[name]:7.3f}{right:8.1%}   " + ", then ".join(f"{n:,} ({n / total:.1%})" for n in numbers[name]))
for step in ("LoRA only", "transfer only"):
    assert LOSS["both"] < 0.8 * LOSS[step]
    assert LOSS[step] < 0.7 * LOSS["swapped"]
assert numbers["both"][1] == 2 * (64 + 64) * 4 * 2  # rank x (in + out), of four matrices in two layers

# %% [markdown]
# LoRA's share is r (in + out) / (in out): at width 64 it is large, at 4,096 and rank 8 it is 0.4 % of each matrix. Merged it is
# nothing at all: W + (alpha / r) B A is one matrix again.

# %%
plain = merged(STUDENTS["both"])
with torch.inference_mode():
    apart = (plain(TEST[0]) - STUDENTS["both"](TEST[0])).abs().max()
print(f"merged, the logits move by {apart:.0e}; {len(plain.state_dict())} tensors, {len(STUDENTS['both'].state_dict())} before")
assert apart < 1e-3
assert plain.state_dict().keys() == student().state_dict().keys()

# %% [markdown]
# ## Layer by layer is the same
#
# The true softmax output goes on to the next layer while the maps learn: no layer sees what another one has learned, so that
# they can learn one after the other, or on different machines. The paper does so for 405B, block by block.

# %%
FEW, exact = 12, deepcopy(teacher).double()  # so that rounding does not hide what is equal
begun, joint = student().double(), student().double()
transfer(joint, FEW, tokens(), exact)
for number, sublayer in ((2, 1), (3, 3)):  # layer 1 is the convolution
    alone = student(layers=str(number)).double()
    transfer(alone, FEW, tokens(), exact)
    layers = [model.stack[sublayer].layer for model in (begun, joint, alone)]
    for name in ("query_map", "key_map", "query_shift", "key_shift", "mix"):
        first, together, apart = (layer.get_parameter(name).detach() for layer in layers)
        moved, differs = ((together - other).abs().max().item() for other in (first, apart))
        print(f"layer {number}, {name:12} moved by {moved:.3f}; trained alone it differs from that by {differs:.0e}")
        assert differs < 1e-9 * moved

# %% [markdown]
# ## What was learned
#
# The weights of attention, of layers that read what the teacher's read. The teacher looks at the one pair that is asked for;
# the linear form, beyond its window, looks as sharply as a product of softmaxes of features can.

# %%
inputs, asked, reads = TEST[0][:64], slice(2 * P + 1, None, 2), {}
layers = {number: teacher.stack[number].layer for number in (1, 3)}
for number, layer in layers.items():
    layer.register_forward_hook(lambda layer, given, y, number=number: reads.update({number: given}))
with torch.inference_mode():
    teacher(inputs)
    MATRICES = {
        name: torch.cat([matrix_of(model.stack[number].layer, *reads[number]) for number in layers], 1)  # (B, 2 H, T, T)
        for name, model in {"teacher": teacher, **STUDENTS}.items()
    }
ELSEWHERE = {}
for name, weights in MATRICES.items():
    ELSEWHERE[name] = (weights - MATRICES["teacher"]).abs()[:, :, asked].sum(-1).mean().item() / 2
    print(f"{name:15}{ELSEWHERE[name]:6.0%} of a question's weights lie elsewhere than the teacher's")
assert ELSEWHERE["transfer only"] < 0.85 * ELSEWHERE["swapped"]
assert ELSEWHERE["transfer only"] < 0.85 * ELSEWHERE["LoRA only"]

# %% [markdown]
# Transfer brings the maps nearer to the teacher's. LoRA alone does not, although its loss falls as far: it finds ways of its
# own to the answers, and where transfer came first it gives up some of the likeness.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained", width_ratios=[1.2, 1, 1])
axes[0].bar(list(LOSS), list(LOSS.values()))
axes[0].set(ylabel="loss", title=f"{STEPS} steps, the same tokens")
head = MATRICES["teacher"][:, :, asked].amax(-1).mean((0, 2)).argmax().item()  # the one that looks at single tokens
for axis, name in zip(axes[1:], ("teacher", "transfer only"), strict=True):
    axis.imshow(MATRICES[name][0, head], cmap="magma", vmin=0, vmax=1)
    axis.set(xlabel="key", ylabel="query", title=f"{name}: one head")
lectern.save_figure(figure, "14_a_transformer_made_linear")
