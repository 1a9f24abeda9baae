"""Scaling laws from anybody's table of runs: count, fit, forecast, plan (numpy and scipy only)."""
