"""What is said where a forward or backward pass cannot be followed."""

REENTRANT = "reentrant checkpointing cannot be followed: use checkpoint(use_reentrant=False)"
SELECTIVE = "selective activation checkpointing allows a single backward pass: use checkpoint without context_fn"
NESTED = (
    "a backward pass of its own runs inside the backward pass of the losses (a checkpoint function that calls "
    "backward()): gradients of the parameters in there are in no graph. Use torch.utils.checkpoint.checkpoint with "
    "use_reentrant=False"
)
NESTED_TENSORS = "nested (jagged) tensors have no dimension along which the samples lie: pad them"

FREED = (
    "the graph of the losses was freed, by a backward(), `project_` or `gram`: ask before that, or keep it with "
    "retain_graph=True, or keep_output_gradients=False (torch: Trying to backward through the graph a second time)"
)

CHANGED = (
    "a tensor that the per-sample gradients need has been modified by an inplace operation after the forward pass "
    "used it: change a copy"
)

# By words of the error that torch raises.
CHECKPOINTING = {
    "use_reentrant": REENTRANT,
    "Checkpointing is not compatible": REENTRANT,
    "selective activation checkpoint": SELECTIVE,
}
