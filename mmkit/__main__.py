"""``python -m mmkit``: what launchers (torchrun, deepspeed, srun) start."""

from mmkit.cli import main

if __name__ == "__main__":
    main()
