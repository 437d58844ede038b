from tdcompile.passes.importance.none import NoImportance


def test_every_layer_scores_one(program):
    assert NoImportance().score(program) == {"stem": 1.0, "shared": 1.0, "dead": 1.0, "head": 1.0}
