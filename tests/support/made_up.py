"""Results of a comparison that never ran, for tables, pictures and reports."""

import random

TITLES = {
    "original": "original",
    "retrained": "retrained",
    "scrub": "SCRUB",
    "orthograd": "OrthoGrad",
    "orthograd_tensor": "OrthoGrad, per tensor",
}
POINT = {"forget_loss": 2.0, "retain_loss": 0.1, "rank": None, "preserved_norm": None, "residual": None}


def made_up_run(method, seed, n=None, **more):
    draw = random.Random(f"{method} {seed} {n}").random
    run = {
        "method": method,
        "seed": seed,
        "n": n,
        "scores": {part: 0.8 + 0.2 * draw() for part in ("forget", "retain", "validation", "test", "mia_auc", "tow")},
        "confidence": {"forget": [5] * 20, "test": [0] * 19 + [100]},
        "steps": None,
        "seconds": 3.25,
        "step_seconds": None,
        "peak_bytes": None,
        "stopped": None,
        "curve": [],
        **more,
    }
    run["scores"] |= {"uis": None, "gap": draw(), "distance": 12.5}
    if method not in ("original", "retrained"):
        run |= {"steps": 60, "step_seconds": 0.0123, "peak_bytes": 2**25}
        ours = {"rank": 64, "preserved_norm": 0.5, "residual": 3e-7} if method.startswith("orthograd") else {}
        run["curve"] = [{"step": s, "forget": draw(), "test": draw(), **POINT, **ours} for s in (0, 30, 60)]
    return run


def made_up_scenario(methods=tuple(TITLES), seeds=(0, 1), **more):
    return {
        "title": "digits: wrong labels",
        "credit": "made up",
        "small": False,
        "forget_title": "wrong labels repeated",
        "orthograd_methods": ["orthograd", "orthograd_tensor"],
        "sizes": {"retain": 855, "forget": 151, "validation": 200, "test": 360},
        "parameters": 76498,
        "trainable": 1000,
        "seeds": list(seeds),
        "skipped": None,
        "settings": {"scrub": {"lr": 0.01, "alpha": None, "usable": 3, "candidates": 12}},
        "runs": [made_up_run(method, seed) for method in methods for seed in seeds],
        "study": [made_up_run("orthograd", seed, n) for n in (4, 8) for seed in seeds],
        **more,
    }


def made_up_results(**scenarios):
    skipped = made_up_scenario(methods=(), study=[], title="news", skipped="pip install 'some-news==1.0'", seeds=())
    return {
        "environment": {"torch": "2.13", "cuda": None, "extension": {"openmp": True}},
        "command": "projgrad compare --fast",
        "finished": True,
        "scenarios": {"digits": made_up_scenario(), "news": skipped, **scenarios},
    }
