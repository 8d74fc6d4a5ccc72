"""Small models of one feature each, with their batches, for `bench.features`."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from projgrad.experiments.benchmark.models import Logits

CLASSES = 5
VOCABULARY = 11
Batch = Callable[[int], tuple[Tensor, Tensor]]
Built = tuple[nn.Module, Batch]


def vectors(*shape: int, positions: tuple[int, ...] = ()) -> Batch:
    """Return batches of random inputs [n, *shape] with a class for every sample, or for all its positions."""
    return lambda n: (torch.randn(n, *shape), torch.randint(CLASSES, (n, *positions)))


def text(tokens: int = 3, classes: int = CLASSES) -> Batch:
    return lambda n: (torch.randint(VOCABULARY, (n, tokens)), torch.randint(classes, (n, tokens)))


def layers(*modules: nn.Module, shape: tuple[int, ...] = (6,), positions: tuple[int, ...] = ()) -> Built:
    return nn.Sequential(*modules), vectors(*shape, positions=positions)


def images(convolution: nn.Module, channels: int, *more: nn.Module) -> Built:
    """Put a convolution on images of 2 or 4 channels, 6 x 6, before a mean over the places and a linear layer."""
    body = nn.Sequential(convolution, *more, nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(4 * channels, CLASSES)), vectors(convolution.in_channels, 6, 6)


class Uses(nn.Module):
    """Compute f(module, x) with parameters of the given shapes."""

    def __init__(self, f: Callable[[nn.Module, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.f = f
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def uses(f: Callable[[nn.Module, Tensor], Tensor], batch: Batch | None = None, **shapes: tuple[int, ...]) -> Built:
    return Uses(f, **shapes), batch or sequences()


class Calls(nn.Module):
    """Compute f(modules, x) with the given modules."""

    def __init__(self, f: Callable[[nn.Module, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.f = f
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(self, x)


def calls(f: Callable[[nn.Module, Tensor], Tensor], batch: Batch | None = None, **modules: nn.Module) -> Built:
    return Calls(f, **modules), batch or vectors(6)


def sequences() -> Batch:
    return vectors(3, 6, positions=(3,))


def frozen(module: nn.Module) -> nn.Module:
    return module.requires_grad_(False)


def batch_norm(training: bool) -> Built:
    model, batch = images(nn.Conv2d(2, 4, 3), 4, nn.BatchNorm2d(4))
    norm = model[1]
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.1, 0.4)
    return model.train(training), batch


def attention() -> Built:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, CLASSES)), sequences()


def attend(m: nn.Module, x: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = m.qkv(x).unflatten(-1, (3, 2, -1)).transpose(1, -2).unbind(2)  # [n, heads, t, d / heads]
    return m.head(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


def attend_packed(m: nn.Module, x: Tensor) -> Tensor:
    """Compute the same with all samples in one row, one after the other, and a mask of blocks."""
    n, t = x.shape[:2]
    owner = torch.arange(n * t, device=x.device) // t
    return attend(m, x.reshape(1, n * t, -1), owner[:, None] == owner).view(n, t, -1)


def heads() -> dict[str, nn.Module]:
    return {"qkv": nn.Linear(6, 24), "head": nn.Linear(8, CLASSES)}


def bare(m: nn.Module, x: Tensor) -> Tensor:
    """Use a class token, positions, a scale and a shift, as in vision transformers."""
    x = torch.cat([m.token.expand(len(x), -1, -1), x], 1) + m.positions
    return torch.tanh(x * m.scale + m.shift).mean(1) @ m.w


def low_rank(m: nn.Module, x: Tensor) -> Tensor:
    return m.head(torch.tanh(m.base(x) + 0.5 * m.up(m.down(x))))


def adapters(base: nn.Module) -> dict[str, nn.Module]:
    down, up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
    return {"base": base, "down": down, "up": up, "head": nn.Linear(6, CLASSES)}


class Quantised(nn.Module):
    """A linear layer of 8-bit integers with a scale for every row, made wide when it is used."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, inputs)
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale)


def add_in_place(m: nn.Module, x: Tensor) -> Tensor:
    y = m.inner(x)
    y += x
    return m.head(F.relu_(y))


def dropped(m: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return m.head(F.dropout(torch.tanh(m.inner(x)), 0.5, training=True))


def routed(m: nn.Module, x: Tensor) -> Tensor:
    """Send every token to the better one of two experts."""
    tokens = x.flatten(0, 1)
    gates = F.softmax(m.router(tokens), -1)
    out = torch.zeros_like(tokens)
    for e, expert in enumerate((m.first, m.second)):
        chosen = (gates.argmax(-1) == e).nonzero().squeeze(1)
        out = out.index_add(0, chosen, expert(tokens[chosen]) * gates[chosen, e, None])
    return m.head(out.view_as(x))


def half_narrow(m: nn.Module, x: Tensor) -> Tensor:
    """Compute the first layer in bfloat16, the rest in float32."""
    return m.head(m.norm(m.inner(x.bfloat16()).float()))


class Cube(torch.autograd.Function):
    """x Wᵀ with W cubed entry by entry: an operation that nobody can look into."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.pow(3).mT

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.pow(3), 3 * w.square() * (g.flatten(0, -2).mT @ x.flatten(0, -2))


class Distances(nn.Module):
    """Squared distances from learned centres: a layer that no package has a rule for."""

    def __init__(self, inputs: int, centres: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(centres, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) - self.centres).square().sum(-1)


def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": VOCABULARY, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0))
    return Logits(model).train(), text(classes=VOCABULARY)


def adapted_llama() -> Built:
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "max_position_embeddings": 8}
    grouped = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **grouped))
    config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    return Logits(peft.get_peft_model(base, config)).train(), text(classes=VOCABULARY)


def embedded(**options: object) -> Built:
    return nn.Sequential(nn.Embedding(VOCABULARY, 6, **options), nn.Linear(6, CLASSES)), text()


def tied() -> Built:
    embedding, head = nn.Embedding(VOCABULARY, 6), nn.Linear(6, VOCABULARY, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, nn.Linear(6, 6), nn.Tanh(), head), text(classes=VOCABULARY)


def centred(m: nn.Module, x: Tensor) -> Tensor:
    y = m.inner(x)
    return m.head(y - y.mean(0))
