"""The command ``study``."""

from __future__ import annotations

import typer

from tdcompile.cli.console import Answer
from tdcompile.cli.options import (
    Calibrate,
    Compressions,
    Data,
    Eval,
    ExampleFile,
    Frontend,
    Input,
    Jobs,
    Json,
    Layers,
    Methods,
    Normalize,
    Out,
    Quiet,
    Ray,
    Resume,
    Seed,
    Seeds,
    Source,
    Target,
    Tune,
    Verbose,
    Weights,
)


def study(
    context: typer.Context,
    source: Source = None,
    weights: Weights = None,
    input: Input = None,
    example: ExampleFile = None,
    frontend: Frontend = None,
    data: Data = None,
    normalize: Normalize = None,
    calibrate: Calibrate = None,
    eval: Eval = None,
    target: Target = None,
    methods: Methods = None,
    compressions: Compressions = None,
    layers: Layers = None,
    seeds: Seeds = 1,
    tune: Tune = None,
    jobs: Jobs = None,
    ray: Ray = False,
    out: Out = None,
    resume: Resume = False,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """Measure how well approximation errors predict accuracy, by layer and decomposition (arXiv 2305.05318)."""
    flags = locals()
    from tdcompile.cli.compile_job import Output
    from tdcompile.cli.load_job import recipe_of
    from tdcompile.cli.study_job import grid_of, run_study

    recipe = recipe_of(flags)
    grid = grid_of(recipe, methods, compressions, tuple(layers or ()), seeds)
    return run_study(recipe, grid, Output(out, resume, json, quiet, context.obj), ray=ray)
