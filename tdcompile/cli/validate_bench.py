"""The commands ``validate`` and ``bench``."""

from __future__ import annotations

from tdcompile.cli.console import Answer
from tdcompile.cli.options import (
    Against,
    Atol,
    Batch,
    BatchAxis,
    Dynamic,
    DynamicBatch,
    ExampleFile,
    Frontend,
    Input,
    Json,
    Localise,
    Model,
    Models,
    Quiet,
    Rtol,
    Seconds,
    Seed,
    Target,
    Threads,
    Verbose,
    Weights,
)


def validate(
    model: Model,
    against: Against,
    weights: Weights = None,
    input: Input = None,
    example: ExampleFile = None,
    frontend: Frontend = None,
    dynamic_batch: DynamicBatch = None,
    batch_axis: BatchAxis = None,
    dynamic: Dynamic = None,
    target: Target = None,
    threads: Threads = None,
    rtol: Rtol = None,
    atol: Atol = None,
    localise: Localise = False,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Compare a model with another one, or with the PyTorch network it came from; exit 3 if they differ."""
    flags = locals()
    from tdcompile.cli.compare_models import validate_model

    return validate_model(model, against, flags, {"rtol": rtol, "atol": atol}, localise=localise, as_json=json)


def bench(
    models: Models,
    input: Input = None,
    target: Target = None,
    threads: Threads = None,
    batch: Batch = None,
    seconds: Seconds = 5.0,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Time models against each other, in alternation."""
    flags = locals()
    from tdcompile.cli.compare_models import bench_models
    from tdcompile.cli.load_job import recipe_of

    return bench_models(models, recipe_of(flags), batch, seconds, as_json=json)
