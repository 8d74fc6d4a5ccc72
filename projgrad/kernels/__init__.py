"""Plugs the fast kernels into the ops: C++ on the CPU where the extension is built, Triton on CUDA at the first call.

Without them every op runs its reference.
"""

from importlib.util import find_spec

from ..ops import flat
from . import project_out

if find_spec("projgrad._C"):  # absent is fine; present and broken must fail here, loudly
    from .. import _C as _C

    flat._project_out.register_kernel("cpu")(project_out.on_host)

if find_spec("triton"):

    @flat._gram.register_kernel("cuda")
    def _(G, u, wide):
        from .gram import gram

        return gram(G, u, wide)

    @flat._subtract.register_kernel("cuda")
    def _(u, G, c):
        from .subtract import subtract

        return subtract(u, G, c)

    @flat._gram_solve.register_kernel("cuda")
    def _(K, b, damping, rtol):
        from .gram_solve import gram_solve

        return gram_solve(K, b, damping, rtol)

    flat._project_out.register_kernel("cuda")(project_out.on_device)
