"""How the benchmarks measure: in turn, with device events, the allocator's peak and this device's own ceilings."""

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles

import torch
from torch import Tensor

from ..._torch_private import keep_busy
from ..comparison.memory import peak_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WARM_UP = 3
CYCLES = 2_000_000  # clock cycles of a GPU in a millisecond, about
LONGEST = 5_000.0  # milliseconds: what takes longer is run once more and no oftener


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of one call on the CPU."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def wall_clock(call: Callable[[], object]) -> float:
    """Return the milliseconds of one call on the clock of the host, from an idle device to an idle device."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return 1e3 * (time.perf_counter() - start)


def spread(times: list[float]) -> tuple[float, float, float]:
    """Return the median and the 20th and 80th percentile."""
    fifths = quantiles(times, n=5, method="inclusive")
    return median(times), fifths[0], fifths[3]


def synchronize() -> None:
    """Wait for the GPU, where this process uses one: on a full GPU a measurement on the CPU would fail otherwise."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def release() -> None:
    """Give unused memory back, so that what comes next, another process too, can have all of it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    texts = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in texts)


def size_in_bytes(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


class Clock:
    """Milliseconds of one call on the device, and until it returned to the host.

    The second-level cache is overwritten first. The device then waits for as long as the host needs to launch
    everything, so that its time holds no gaps, except where the call itself waits for the device.
    """

    def __init__(self, device: str = DEVICE) -> None:
        self.device = device
        if device == "cuda":
            size = max(256 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
            self.flushed = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], object], head_start: float = 0.0) -> tuple[float, float]:
        if self.device != "cuda":
            elapsed = wall_clock(call)
            return elapsed, elapsed
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.flushed.zero_()
        if head_start:
            keep_busy(int(min(head_start, 20.0) * CYCLES))
        first.record()
        start = time.perf_counter()
        result = call()
        host = 1e3 * (time.perf_counter() - start)
        last.record()
        last.synchronize()
        del result
        return first.elapsed_time(last), host


@dataclass
class Contender:
    """One call and its measurements; there are none where `note` says why."""

    call: Callable[[], object]
    note: str = ""
    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    extra_bytes: int | None = None

    def attempt(self, action: Callable[[], object]) -> object:
        """Return the result of an action, or None with a note where it fails. Raise what breaks the device for good."""
        if self.note:
            return None
        try:
            return action()
        except Exception as error:
            if is_out_of_memory(error):
                self.note = "out of memory"
            elif "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError":
                raise
            else:
                self.note = f"{type(error).__name__}: {error}".splitlines()[0][:160].replace(",", ";")
        release()  # only after the error has let go of its frames
        return None

    def columns(self) -> dict[str, object]:
        """Return the columns of its row: times, rounds, memory and note."""
        names = ("ms", "ms_20", "ms_80")
        if self.note or len(self.device_ms) < 2:
            times = dict.fromkeys((*names, "host_ms"))
        else:
            times = dict(zip(names, spread(self.device_ms), strict=True)) | {"host_ms": spread(self.host_ms)[0]}
        extra = None if self.extra_bytes is None else self.extra_bytes / 1e6
        return {**times, "rounds": len(self.device_ms), "extra_mb": extra, "note": self.note}


def measure(
    contenders: Mapping[str, Contender], clock: Clock, seconds: float = 0.5, rounds: int = 25, memory: bool = True
) -> None:
    """Warm all contenders up, measure their memory, then call one after the other, round by round.

    seconds: about what each may take. rounds: at most; 0: the memory alone.
    """
    plans: dict[str, tuple[int, float]] = {}  # rounds, and how long the device waits for the host
    for name, contender in contenders.items():
        took = contender.attempt(lambda c=contender: clock(c.call))
        for _ in range(WARM_UP - 1):
            if rounds and took is not None and took[0] < LONGEST:
                took = contender.attempt(lambda c=contender: clock(c.call))
        if took is None:
            continue
        if memory:
            contender.attempt(lambda c=contender: _measure_memory(c, clock.device))
        count = min(rounds, 2 if took[0] >= LONGEST else max(5, int(1e3 * seconds / max(took[0], 1e-3))))
        plans[name] = (count, 1.5 * took[1] if took[1] < 0.7 * took[0] or took[1] < 10 else 0.0)
    for i in range(max((count for count, _ in plans.values()), default=0)):
        for name, (count, head_start) in plans.items():
            contender = contenders[name]
            if i < count and (times := contender.attempt(lambda c=contender, h=head_start: clock(c.call, h))):
                contender.device_ms.append(times[0])
                contender.host_ms.append(times[1])


def _measure_memory(contender: Contender, device: str) -> None:
    with peak_memory(device) as peak:
        contender.call()
    contender.extra_bytes = peak.bytes


@dataclass
class Ceilings:
    """Bytes a second of a copy, read and written; floating-point operations a second of a square matrix product."""

    copy: float
    bf16: float
    fp16: float
    tf32: float
    fp32: float
    fp64: float = 0.0

    @property
    def exact(self) -> float:
        """Return the rate of float32 products: with float32 arithmetic, or as six products of bfloat16 parts."""
        return max(self.fp32, self.bf16 / 6)

    def rate(self, dtype: torch.dtype) -> float:
        rates = {torch.bfloat16: self.bf16, torch.float16: self.fp16, torch.float64: self.fp64}
        return rates.get(dtype) or self.exact

    def rows(self) -> Iterator[dict]:
        """Yield a row for every ceiling, in TB/s and TFLOP/s."""
        yield {"op": "ceiling", "contender": "copy, read and written", "rate": self.copy / 1e12, "unit": "TB/s"}
        for kind in ("bf16", "fp16", "tf32", "fp32"):
            rate = getattr(self, kind) / 1e12
            yield {"op": "ceiling", "contender": f"{kind} product", "rate": rate, "unit": "TFLOP/s"}


def ceilings(clock: Clock, tiny: bool) -> Ceilings:
    """Measure what this device does, on random data: the best of nine calls after three."""
    size, count = (64, 1 << 10) if tiny else (8192, 1 << 29)

    def best(call: Callable[[], object]) -> float:
        return 1e-3 * min([clock(call)[0] for _ in range(3 + 9)][3:])

    source = torch.randn(count, device=clock.device)
    target = torch.empty_like(source)
    copy = 2 * size_in_bytes(source) / best(lambda: target.copy_(source))
    source = target = None
    rates = {}
    before = torch.get_float32_matmul_precision()
    for name, dtype, precision, width in (
        ("bf16", torch.bfloat16, "highest", size),
        ("fp16", torch.float16, "highest", size),
        ("tf32", torch.float32, "high", size),
        ("fp32", torch.float32, "highest", size),
        ("fp64", torch.float64, "highest", size // 2),  # at 1/64 of the rate on many GPUs
    ):
        a, b = (torch.randn(width, width, device=clock.device).to(dtype) for _ in range(2))
        torch.set_float32_matmul_precision(precision)
        try:
            rates[name] = 2 * width**3 / best(lambda a=a, b=b: a @ b)
        finally:
            torch.set_float32_matmul_precision(before)
    release()
    return Ceilings(copy, **rates)


def read_rate(G: Tensor, rounds: int = 9) -> float:
    """Return the bytes a second at which this CPU reads G: the best of several sums over it."""
    return size_in_bytes(G) / min(timed(lambda: G.view(-1).sum()) for _ in range(rounds))


def matrix_rate(dtype: torch.dtype, size: int = 1536, rounds: int = 9) -> float:
    """Return the floating-point operations a second of a square matrix product on this CPU: the best of several."""
    a = torch.randn(size, size, dtype=dtype)
    return 2 * size**3 / min(timed(lambda: a @ a) for _ in range(rounds))
