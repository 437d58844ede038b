"""The program under compilation: graph, layers, facts, plan, target."""
