"""The models of the whole steps, with their batches and losses."""

import importlib.util
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

LEARNING_RATE = 1e-4  # small: all contenders stay near the weights they start from
Batch = Callable[[int], tuple[Tensor, Tensor]]
TRANSFORMERS = importlib.util.find_spec("transformers") is not None
GPT2 = {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # else 124 M as published
LLAMA = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SMALL_GPT2 = {**GPT2, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0, "n_embd": 16, "n_layer": 2, "n_head": 2}
SMALL_LLAMA = {**LLAMA, "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL_LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


# Small models in float32.


def labelled(*shape: int) -> Batch:
    return lambda n: (torch.randn(n, *shape), torch.randint(10, (n,)))


def text(tokens: int, vocabulary: int) -> Batch:
    return lambda n: torch.randint(vocabulary, (2, n, tokens)).unbind()


def mlp(*widths: int) -> tuple[nn.Module, Batch]:
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1]), labelled(widths[0])


def conv_net(*channels: int) -> tuple[nn.Module, Batch]:
    """Build 3 x 3 convolution, group norm, ReLU and pooling to half the size, layer by layer, for 32 x 32 images."""
    layers = []
    for i, o in itertools.pairwise(channels):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(8, o), nn.ReLU(), nn.MaxPool2d(2)]
    size = 32 >> len(channels) - 1
    head = nn.Linear(channels[-1] * size**2, 10)
    return nn.Sequential(*layers, nn.Flatten(), head), labelled(channels[0], 32, 32)


def decoder(d: int, layers: int, tokens: int, vocabulary: int) -> tuple[nn.Module, Batch]:
    return Decoder(d, layers, tokens, vocabulary), text(tokens, vocabulary)


def encoder(d: int, layers: int, tokens: int) -> tuple[nn.Module, Batch]:
    return Encoder(d, layers), labelled(tokens, d)


class Logits(nn.Module):
    """A language model of transformers, without all else that it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def adapted_llama(d: int, layers: int, tokens: int, vocabulary: int, rank: int) -> tuple[nn.Module, Batch]:
    """Build LoRA adapters on all linear layers of a Llama but its head."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": max(1, d // 64), "num_key_value_heads": max(1, d // 128)}
    sizes = {"hidden_size": d, "intermediate_size": 4 * d, "num_hidden_layers": layers}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, **heads))
    config = peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return Logits(peft.get_peft_model(base, config)), text(tokens, vocabulary)


class Block(nn.Module):
    """Pre-norm transformer block with heads of 64."""

    def __init__(self, d: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = max(1, d // 64), causal
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, -2).unbind(2)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)  # [n, heads, t, d / heads]
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """GPT-style: learned positions, head not tied to the embedding."""

    def __init__(self, d: int, layers: int, tokens: int, vocabulary: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, d), nn.Embedding(tokens, d)
        self.blocks = nn.Sequential(*(Block(d, causal=True) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        return self.head(self.norm(self.blocks(self.token(x) + self.position(positions))))


class Encoder(nn.Module):
    """Full attention over a sequence of vectors, and a classifier of their mean."""

    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(d, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x)).mean(1))


class Job:
    """A model with its optimizer, and two batches of n samples."""

    def __init__(self, model: nn.Module, batch: Batch, n: int) -> None:
        self.model, self.n, self.samples = model, n, (batch(n), batch(n))
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    @staticmethod
    def losses(logits: Tensor, y: Tensor) -> Tensor:
        """Return the cross-entropy of every sample [n], over a sequence its mean."""
        losses = F.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="none")
        return losses.view(len(y), -1).mean(1)

    def forget(self) -> Tensor:
        x, y = self.samples[0]
        return self.losses(self.model(x), y).mean()

    def retain(self, part: slice = slice(None)) -> Tensor:
        x, y = (z[part] for z in self.samples[1])
        return self.losses(self.model(x), y)

    def per_sample_gradients(self) -> list[Tensor]:
        """Return vmap(grad) of the retain losses: one tensor [n, p_l] per parameter."""

        def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.losses(functional_call(self.model, params, (x[None],)), y[None])[0]

        params = {name: p.detach() for name, p in self.model.named_parameters()}
        return [g.flatten(1) for g in vmap(grad(loss), (None, 0, 0))(params, *self.samples[1]).values()]

    def step_vmap(self, update: Callable[[list[Tensor], list[Tensor]], list[Tensor]]) -> None:
        """Take a step whose gradient `update` makes of the forget gradient and the per-sample gradients."""
        self.optimizer.zero_grad()
        self.forget().backward()
        params = list(self.model.parameters())
        new = update([p.grad.flatten() for p in params], self.per_sample_gradients())
        for p, g in zip(params, new, strict=True):
            p.grad = g.view_as(p)
        self.optimizer.step()


# Language models in any dtype, on any device.


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of every token [t] in float32 from logits [t, v] of any dtype, a few rows at a time.

    The same for all contenders. Besides the logits and their gradient it holds no third tensor of their size.
    """

    ROWS = 1024

    @staticmethod
    def forward(ctx, logits: Tensor, y: Tensor) -> Tensor:
        normalisers = torch.cat([x.float().logsumexp(1) for x in logits.split(TokenLosses.ROWS)])
        ctx.save_for_backward(logits, y, normalisers)
        return normalisers - logits.gather(1, y[:, None])[:, 0].float()

    @staticmethod
    def backward(ctx, weights: Tensor) -> tuple[Tensor, None]:
        logits, y, normalisers = ctx.saved_tensors
        out = torch.empty_like(logits)
        parts = (x.split(TokenLosses.ROWS) for x in (logits, y, normalisers, weights, out))
        for x, target, normaliser, weight, result in zip(*parts, strict=True):
            p = (x.float() - normaliser[:, None]).exp_()
            p.scatter_add_(1, target[:, None], torch.full_like(p[:, :1], -1.0))
            result.copy_(p.mul_(weight[:, None]))
        return out, None


class TokenJob:
    """A language model with SGD, and two batches of n sequences, in any dtype.

    frugal: with `TokenLosses` in the place of torch's cross entropy of float32 logits.
    """

    def __init__(self, model: nn.Module, n: int, tokens: int, vocabulary: int, frugal: bool = True) -> None:
        self.model, self.n, self.frugal = model, n, frugal
        device = next(model.parameters()).device
        self.samples = [torch.randint(vocabulary, (n, tokens + 1), device=device) for _ in range(2)]
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    def losses(self, ids: Tensor) -> Tensor:
        """Return the mean cross-entropy of the tokens of each sequence [n]."""
        x, y = ids[:, :-1], ids[:, 1:]
        logits = self.model(x) if isinstance(self.model, Decoder) else self.model(x, use_cache=False).logits
        logits, y = logits.flatten(0, 1), y.flatten()
        if self.frugal:
            tokens = TokenLosses.apply(logits, y)
        else:
            tokens = nn.functional.cross_entropy(logits.float(), y, reduction="none")
        return tokens.view(len(ids), -1).mean(1)

    def forget(self) -> Tensor:
        return self.losses(self.samples[0]).mean()

    def retain(self) -> Tensor:
        return self.losses(self.samples[1])


def build(kind: str, tiny: bool, dtype: torch.dtype, device: str) -> tuple[nn.Module, int, str]:
    """Return a randomly initialised language model, the size of its vocabulary, and its title."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model, vocabulary, title = _built(kind, tiny)
    finally:
        torch.set_default_dtype(before)
    model.to(device=device, dtype=dtype).train()
    count = sum(p.numel() for p in model.parameters()) / 1e6
    return model, vocabulary, f"{title}, {count:.4g} M parameters"


def _built(kind: str, tiny: bool) -> tuple[nn.Module, int, str]:
    if not TRANSFORMERS:
        sizes = (16, 2, 64, 50) if tiny else (768, 12, 512, 50257) if kind == "gpt2" else (2048, 16, 512, 128256)
        return Decoder(*sizes), sizes[-1], f"own decoder in the place of {kind} (transformers is missing)"
    import transformers

    if kind == "gpt2":
        config = transformers.GPT2Config(**(SMALL_GPT2 if tiny else GPT2))
        return transformers.GPT2LMHeadModel(config), config.vocab_size, "GPT-2"
    config = transformers.LlamaConfig(**(SMALL_LLAMA if tiny else LLAMA))
    return transformers.LlamaForCausalLM(config), config.vocab_size, "Llama-3.2-1B shape"
