"""The commands ``compile``, ``plan`` and ``demo``."""

from __future__ import annotations

import typer

from tdcompile.cli.console import Answer
from tdcompile.cli.options import (
    BatchAxis,
    Budget,
    Calibrate,
    Data,
    Decompose,
    DryRun,
    Dynamic,
    DynamicBatch,
    Eval,
    ExampleFile,
    Frontend,
    Goal,
    Grain,
    Importance,
    Input,
    Ir,
    Jobs,
    Json,
    KeepDense,
    KeepFp32,
    Labels,
    Loss,
    MaxDrop,
    Metadata,
    Metric,
    MinSpeedup,
    Normalize,
    Opset,
    Out,
    OutputNames,
    Pipeline,
    Plan,
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


def compile_network(
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
    task: TaskName = None,
    loss: Loss = None,
    metric: Metric = None,
    output: ScoredOutput = None,
    normalize: Normalize = None,
    calibrate: Calibrate = None,
    target: Target = None,
    precision: Precision = None,
    threads: Threads = None,
    opset: Opset = None,
    ir: Ir = None,
    output_names: OutputNames = None,
    metadata: Metadata = None,
    labels: Labels = None,
    grain: Grain = None,
    budget: Budget = None,
    goal: Goal = None,
    decompose: Decompose = None,
    ranks: Ranks = None,
    importance: Importance = None,
    keep_dense: KeepDense = None,
    keep_fp32: KeepFp32 = None,
    recipe: RecipeName = None,
    jobs: Jobs = None,
    out: Out = None,
    eval: Eval = None,
    plan: Plan = None,
    tune: Tune = None,
    max_drop: MaxDrop = None,
    min_speedup: MinSpeedup = None,
    pipeline: Pipeline = None,
    dry_run: DryRun = False,
    resume: Resume = False,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Compile a network to a smaller, faster, verified ONNX model, with a report on every layer."""
    flags = locals()
    from tdcompile.cli.compile_job import Output, compile_network, describe
    from tdcompile.cli.load_job import recipe_of

    made = recipe_of(flags)
    if dry_run:
        return describe(made, as_json=json)
    return compile_network(made, Output(out, resume, json, quiet, context.obj))


def demo(
    context: typer.Context,
    out: Out = None,
    budget: Budget = None,
    tune: Tune = None,
    target: Target = None,
    precision: Precision = None,
    threads: Threads = None,
    resume: Resume = False,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Compile a network that ships with its weights, on data that needs no download."""
    flags = locals()
    from tdcompile.cli.compile_job import Output, compile_demo

    return compile_demo(flags, Output(out, resume, json, quiet, context.obj))


def plan(
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
    task: TaskName = None,
    loss: Loss = None,
    metric: Metric = None,
    output: ScoredOutput = None,
    normalize: Normalize = None,
    calibrate: Calibrate = None,
    target: Target = None,
    precision: Precision = None,
    threads: Threads = None,
    grain: Grain = None,
    budget: Budget = None,
    decompose: Decompose = None,
    ranks: Ranks = None,
    importance: Importance = None,
    keep_dense: KeepDense = None,
    keep_fp32: KeepFp32 = None,
    recipe: RecipeName = None,
    jobs: Jobs = None,
    out: Out = None,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Choose decompositions and ranks, and change nothing."""
    flags = locals()
    from tdcompile.cli.compile_job import make_plan
    from tdcompile.cli.load_job import recipe_of

    return make_plan(recipe_of(flags), out, as_json=json, quiet=quiet)
