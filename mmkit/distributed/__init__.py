"""Everything that knows of processes: engines (one process, DDP, DeepSpeed ZeRO) and preemption."""
