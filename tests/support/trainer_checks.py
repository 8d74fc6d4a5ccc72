"""`UnlearningTrainer` over several processes takes the steps of one with all samples: run in each of them."""

import os

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from language import model, padded, samples

from projgrad.integrations.transformers import UnlearningTrainer

CASES = {  # way: how the model is spread; then the method, and micro-batches of a step
    ("ddp", "orthograd", 2),
    ("ddp", "npo", 2),
    ("fsdp", "orthograd", 1),
    ("fsdp", "orthograd", 2),
}


def trained(folder: str, method: str, accumulation: int, size: int, shards: bool = False) -> UnlearningTrainer:
    """Train for two steps, the second in a window that an epoch ends, on samples of which each process has its part."""
    args = transformers.TrainingArguments(
        folder,
        per_device_train_batch_size=6 // size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if size > 1 else None,
        fsdp=shards or None,
        fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    )
    if args.device and shards:  # accelerate shards on GPUs alone: it is told that this is one
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made = UnlearningTrainer(
        model().double(),
        args,
        padded,
        forget_dataset=samples(14),
        retain_dataset=samples(24, 14),
        retain_batch_size=10 // size,
        method=method,
        method_options={"union_tolerance": 1e-10} if method == "orthograd" else {},
    )
    made.train()
    return made


def weights(made: UnlearningTrainer) -> dict[str, torch.Tensor]:
    tensors = {name.replace("module.", ""): p.detach() for name, p in made.model.named_parameters()}
    return {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in tensors.items()}


def run(rank: int, size: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # not used: the group is there already
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    for way, method, accumulation in sorted(CASES):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        made = trained(folder, method, accumulation, size, shards=way == "fsdp")
        assert hasattr(next(made.model.parameters()), "full_tensor") == (way == "fsdp")
        expected, found = torch.load(f"{folder}/{method}{accumulation}.pt"), weights(made)
        logs = expected.pop("logs")
        for name, w in expected.items():
            torch.testing.assert_close(found[name], w, rtol=1e-8, atol=1e-10)
        for name, values in logs.items():
            mine = [entry[name] for entry in made.state.log_history if name in entry]
            torch.testing.assert_close(mine, values, rtol=1e-5, atol=1e-6)
