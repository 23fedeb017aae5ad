"""Runs a model, trains nothing, gives numbers: curvature, analytic head, learned coefficients, scores."""
