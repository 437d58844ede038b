"""The commands ``analyze`` and ``list``: they look and change nothing."""

from __future__ import annotations

from tdcompile.cli.console import Answer
from tdcompile.cli.options import (
    BatchAxis,
    DynamicBatch,
    ExampleFile,
    Frontend,
    Input,
    Json,
    Kind,
    Quiet,
    Schema,
    Seed,
    Source,
    Verbose,
    Weights,
)


def analyze(
    source: Source = None,
    weights: Weights = None,
    input: Input = None,
    example: ExampleFile = None,
    frontend: Frontend = None,
    dynamic_batch: DynamicBatch = None,
    batch_axis: BatchAxis = None,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """List every layer, and the decompositions that apply to it."""
    flags = locals()
    from tdcompile.cli.layer_table import analyze_network
    from tdcompile.cli.load_job import recipe_of

    return analyze_network(recipe_of(flags), as_json=json, quiet=quiet)


def list_plugins(
    kind: Kind = None,
    schema: Schema = False,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Answer:
    """List passes, decompositions, selectors, scores, costs, models, data or recipes, with their options."""
    from tdcompile.cli.plugin_table import list_plugins, report_schema

    return report_schema() if schema else list_plugins(kind, as_json=json)
