"""Rewrites of a traced graph, one file a pass: `GraphModule -> GraphModule`, equal up to rounding."""
