"""The one training loop, its checkpoints and schedule, and the stages that run in it."""
