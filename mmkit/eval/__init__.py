"""Evaluation: tasks, generation, official scorers, statistics and the report."""
