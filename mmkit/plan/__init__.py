"""``mmkit plan``: memory by part, steps and GPU-hours of a recipe, before GPUs are spent."""

from mmkit.plan.figures import Memory, Plan, Work
from mmkit.plan.planner import make_plan

__all__ = ["Memory", "Plan", "Work", "make_plan"]
