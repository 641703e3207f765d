"""A plan as text: for the terminal, and as rows of a Markdown table."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from mmkit.plan.figures import Memory, Plan
from mmkit.plan.hardware import GIB

if TYPE_CHECKING:
    from rich.table import Table


def memory_rows(memory: Memory) -> list[tuple[str, int]]:
    """Parts with their bytes, largest first within states and activations; the last row is the sum."""
    rows = sorted(memory.states.items(), key=lambda row: -row[1])
    # Apart from the states: they depend on the micro-batch, the states do not.
    held = sorted(memory.activations.items(), key=lambda row: -row[1])
    rows += [(f"activations: {name}", size) for name, size in held]
    rows.append(("working memory of backward", memory.working))
    # The update needs its room when the activations are gone: only what it takes beyond theirs counts.
    beyond = memory.step - sum(memory.activations.values()) - memory.working
    rows += [("the update beyond the activations", beyond), ("reserve", memory.reserve), ("in all", memory.total)]
    return [(name, size) for name, size in rows if size]


def table(plan: Plan) -> Table:
    """Memory of one GPU by part."""
    from rich.table import Table

    made = Table(title=f"Memory of one GPU, micro-batch {plan.memory.micro_batch_size}")
    made.add_column("part")
    made.add_column("GiB", justify="right")
    for name, size in memory_rows(plan.memory):
        made.add_row(name, f"{size / GIB:.2f}")
    return made


def lines(plan: Plan) -> list[str]:
    """What stands around the table: the setting above, then steps, time, verdict and advice."""
    machine, work = plan.machine, plan.work
    memory = plan.memory
    largest = plan.largest_micro_batch_size
    found = [
        f"{plan.recipe} on {machine.gpus} x {machine.name} of {machine.memory_gib:g} GiB: {plan.sharding}, {plan.precision}, "
        f"checkpointing {'on' if plan.checkpointing else 'off'}",
        f"parameters {plan.parameters:,}, of which {plan.trainable:,} train",
        f"batch {plan.batch_size}: micro-batch {memory.micro_batch_size}, accumulation {plan.accumulation}, {machine.gpus} GPUs",
    ]
    # Stages of pictures alone have no lengths.
    if plan.lengths.longest:
        mean, longest = plan.lengths.mean, plan.lengths.longest
        found.append(f"tokens a sequence: {mean} for the work (--tokens), {longest} for the memory (--longest)")
    found.append(f"steps {work.steps:,}, samples {work.samples:,}" + (f", tokens {work.tokens:,}" if work.tokens else ""))
    found.append(
        f"work {work.model_flops / 1e9:,.1f} GFLOP a sample, {work.executed_flops / 1e9:,.1f} executed"
        # Of the recipe's own operations: a third where all blocks are checkpointed.
        f" ({work.executed_flops / max(1, work.model_flops) - 1:.0%} computed twice)"
    )
    found.append(
        f"time {work.hours:,.1f} h = {work.gpu_hours:,.0f} GPU-hours, {work.samples_per_second:,.0f} samples/s: an assumption, "
        f"{machine.mfu:.0%} of {machine.tflops:g} TFLOP/s; loading, validation and saving not counted"
    )
    if memory.host:
        found.append(f"host memory {sum(memory.host.values()) / GIB:,.1f} GiB a process: {', '.join(memory.host)}")
    size = f"{memory.total / GIB:.1f} of {machine.memory_gib:g} GiB"
    found.append(f"{'fits' if memory.total <= machine.memory_gib * GIB else 'DOES NOT FIT'}: {size}")
    found.append("largest micro-batch that fits and divides: " + ("none" if largest is None else f"{largest}"))
    return found + [f"to do: {line}" for line in plan.advice]


def text(plan: Plan) -> str:
    """The plan as it is printed: its setting, the table, and what follows from it."""
    from rich.console import Console

    head, *rest = lines(plan)
    # To text and not to the screen: the command line is what prints.
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table(plan))
    return "\n".join([head, console.export_text().rstrip(), *rest])


COLUMNS = ("GPUs", "sharding", "states", "micro-batch", "step", "in all", "largest", "steps", "hours", "GPU-hours")


def markdown_table(plans: list[Plan]) -> str:
    """Plans as rows; in GiB of one GPU the states, what a step takes beyond them, and the sum with the reserve."""
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, plans)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _cells(plan: Plan) -> tuple[str, ...]:
    """A row."""
    memory, work, largest = plan.memory, plan.work, plan.largest_micro_batch_size
    sizes = (sum(memory.states.values()), memory.step, memory.total)
    states, step, total = (f"{size / GIB:.1f}" for size in sizes)
    return (
        f"{plan.machine.gpus}",
        plan.sharding,
        states,
        f"{memory.micro_batch_size}",
        step,
        total,
        "none" if largest is None else f"{largest}",
        f"{work.steps:,}",
        f"{work.hours:,.1f}",
        f"{work.gpu_hours:,.0f}",
    )
