"""Everything that knows of processes: engines (one process, DDP, DeepSpeed ZeRO), preemption, the loss of a process."""
