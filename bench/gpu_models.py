"""The models, losses and contenders of the whole steps on a GPU."""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from projgrad import projectors

from .step_contenders import ALPHA, LEARNING_RATE, Decoder, orthograd, plain

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


class TokenLosses(torch.autograd.Function):
    """Cross-entropy of every token (t,) in float32 from logits (t, v) of any dtype, a few rows at a time.

    The same for all contenders. Besides the logits and their gradient it holds no third tensor of their size.
    """

    ROWS = 1024

    @staticmethod
    def forward(ctx, logits: Tensor, y: Tensor) -> Tensor:
        some = logits.split(TokenLosses.ROWS)
        normalisers = torch.cat([x.float().logsumexp(1) for x in some])
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


class GPUJob:
    """A language model with SGD, and two batches of n sequences."""

    def __init__(self, model: nn.Module, n: int, tokens: int, vocabulary: int) -> None:
        self.model, self.n = model, n
        device = next(model.parameters()).device
        self.samples = [torch.randint(vocabulary, (n, tokens + 1), device=device) for _ in range(2)]
        self.optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)

    def losses(self, ids: Tensor) -> Tensor:
        """(n,): the mean cross-entropy of the tokens of each sequence."""
        x, y = ids[:, :-1], ids[:, 1:]
        logits = self.model(x) if isinstance(self.model, Decoder) else self.model(x, use_cache=False).logits
        return TokenLosses.apply(logits.flatten(0, 1), y.flatten()).view(len(ids), -1).mean(1)

    def forget(self) -> Tensor:
        return self.losses(self.samples[0]).mean()

    def retain(self) -> Tensor:
        return self.losses(self.samples[1])


def build(kind: str, tiny: bool, dtype: torch.dtype, device: str) -> tuple[nn.Module, int, str]:
    """A randomly initialised decoder, its vocabulary, and what it is."""
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


# Explicit per-sample gradients in float32, one backward pass a sample.


def _gradients(job: GPUJob, rows: list[Tensor]) -> None:
    """Row j of every [n, p_l] becomes the gradient of sample j."""
    params = list(job.model.parameters())
    for j in range(job.n):
        loss = job.losses(job.samples[1][j : j + 1]).sum()
        for row, g in zip(rows, torch.autograd.grad(loss, params), strict=True):
            row[j].copy_(g.flatten())


def gram_schmidt(u: Tensor, G: Tensor) -> Tensor:
    """u without the span of the rows of G, which are overwritten with an orthonormal basis: no second matrix."""
    for j in range(len(G)):
        for _ in range(2):
            G[j] -= (G[:j] @ G[j]) @ G[:j]
        G[j] /= torch.linalg.vector_norm(G[j]).clamp_min(torch.finfo(G.dtype).tiny)
    return u - (G @ u) @ G


def explicit(project: Callable[[Tensor, Tensor], Tensor], whole: bool) -> Callable[[GPUJob], Callable[[], None]]:
    """As the published code does, tensor by tensor, or on the whole gradient as its formula reads."""

    def start(job: GPUJob) -> Callable[[], None]:
        params = list(job.model.parameters())
        sizes = [p.numel() for p in params]

        def groups() -> Iterator[tuple[list[nn.Parameter], Tensor]]:
            device = params[0].device
            if whole:
                G = torch.empty(job.n, sum(sizes), device=device)
                _gradients(job, list(G.split(sizes, 1)))
                yield params, G
                return
            rows = [torch.empty(job.n, size, device=device) for size in sizes]
            _gradients(job, rows)
            for p in params:
                yield [p], rows.pop(0)

        def step() -> None:
            job.optimizer.zero_grad()
            job.forget().backward()
            for some, G in groups():
                u = torch.cat([p.grad.flatten().float() for p in some])
                mean = G.mean(0)
                new = project(u, G).mul_(ALPHA - 1).add_(mean, alpha=ALPHA)
                for p, g in zip(some, new.split([p.numel() for p in some]), strict=True):
                    p.grad.copy_(g.view_as(p))
            job.optimizer.step()

        return step

    return start


@dataclass(frozen=True)
class StepContender:
    """`heavy`: it holds all per-sample gradients and runs alone; `truth`: whose update it must equal."""

    start: Callable[[GPUJob], Callable[[], object]]
    heavy: bool = False
    truth: str | None = None


CONTENDERS = {
    "plain": StepContender(plain),
    "projgrad global": StepContender(orthograd(scope="global"), truth="explicit QR, global"),
    "projgrad per_tensor": StepContender(orthograd(scope="per_tensor"), truth="explicit QR, per tensor"),
    "explicit QR, per tensor": StepContender(explicit(projectors.qr, whole=False), heavy=True),
    "explicit Gram-Schmidt, per tensor": StepContender(
        explicit(gram_schmidt, whole=False), heavy=True, truth="explicit QR, per tensor"
    ),
    "explicit QR, global": StepContender(explicit(projectors.qr, whole=True), heavy=True),
}


@dataclass(frozen=True)
class StepCase:
    """targets: of which contender, in units of plain: time, and peak memory with the model."""

    kind: str
    n: int
    tokens: int = 512
    targets: tuple[tuple[str, str, float], ...] = ()

    @property
    def name(self) -> str:
        return f"{self.kind}-n{self.n}"

    def job(self, tiny: bool, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[GPUJob, str]:
        model, vocabulary, title = build(self.kind, tiny, dtype, device)
        n, tokens = (2, 6) if tiny else (self.n, self.tokens)
        return GPUJob(model, n, tokens, vocabulary), f"{title}, n = {n}, {tokens} tokens"


CONTRACT = (("time_over_plain", "<=", 1.5), ("total_over_plain", "<=", 1.15))
CASES = [StepCase("llama", 4, targets=CONTRACT), StepCase("gpt2", 32), StepCase("llama", 16)]
GATE = StepCase("gpt2", 4, 128)


def pairs() -> Iterator[tuple[str, str]]:
    """Contenders and whose update theirs must equal."""
    return ((name, some.truth) for name, some in CONTENDERS.items() if some.truth)


def gate_names() -> list[str]:
    return list(dict.fromkeys(itertools.chain.from_iterable(pairs())))
