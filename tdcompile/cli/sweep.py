"""The command ``sweep``."""

from __future__ import annotations

import typer

from tdcompile.cli.console import Answer
from tdcompile.cli.options import (
    BatchAxis,
    Budget,
    Calibrate,
    Data,
    Decompose,
    Dynamic,
    DynamicBatch,
    Eval,
    ExampleFile,
    Frontend,
    Grain,
    Importance,
    Input,
    Jobs,
    Json,
    KeepDense,
    KeepFp32,
    Loss,
    Metric,
    Normalize,
    Out,
    Pipeline,
    Points,
    Precision,
    Quiet,
    Ranks,
    RecipeName,
    Resume,
    ScoredOutput,
    Seed,
    Source,
    Target,
    Targets,
    TaskName,
    Threads,
    Tokenizer,
    Tune,
    Verbose,
    Weights,
)


def sweep(
    context: typer.Context,
    source: Source = None,
    weights: Weights = None,
    input: Input = None,
    example: ExampleFile = None,
    frontend: Frontend = None,
    dynamic_batch: DynamicBatch = None,
    batch_axis: BatchAxis = None,
    dynamic: Dynamic = None,
    data: Data = None,
    targets: Targets = None,
    tokenizer: Tokenizer = None,
    normalize: Normalize = None,
    task: TaskName = None,
    loss: Loss = None,
    metric: Metric = None,
    output: ScoredOutput = None,
    calibrate: Calibrate = None,
    eval: Eval = None,
    target: Target = None,
    precision: Precision = None,
    threads: Threads = None,
    grain: Grain = None,
    points: Points = 8,
    budget: Budget = None,
    decompose: Decompose = None,
    ranks: Ranks = None,
    importance: Importance = None,
    keep_dense: KeepDense = None,
    keep_fp32: KeepFp32 = None,
    recipe: RecipeName = None,
    tune: Tune = None,
    pipeline: Pipeline = None,
    jobs: Jobs = None,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Compile at several budgets from one calibration: quality against latency and size, with the plan of each point.

    ``--budget NAME=SHARE`` names the cost that is swept and its least share; by default latency, down to what is
    reachable.
    """
    flags = locals()
    from tdcompile.cli.compile_job import Output
    from tdcompile.cli.load_job import recipe_of
    from tdcompile.cli.sweep_job import run_sweep

    return run_sweep(recipe_of(flags), points, Output(out, resume, json, quiet, context.obj))
