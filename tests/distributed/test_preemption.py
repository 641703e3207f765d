from __future__ import annotations

import os
import signal

import pipeline
import pytest

from mmkit.distributed.preemption import SIGNALS, Preemption


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_and_nothing_else_happens(number):
    with Preemption() as preemption:
        assert preemption.requested is None
        os.kill(os.getpid(), number)
        assert preemption.requested is number


def test_a_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt), Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Preemption():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_entered_again_inside_it_goes_on_listening_until_the_outer_end():
    before = signal.getsignal(signal.SIGTERM)
    preemption = Preemption()
    with preemption:
        with preemption as inner:
            assert inner is preemption
        # The loop is over, the product is being saved.
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.requested is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


# The signal comes while the module that does the work is imported.
IMPORTING = """
import os, signal, sys, types
from mmkit import cli
class Importing(types.ModuleType):
    def __getattr__(self, name):
        os.kill(os.getpid(), signal.NUMBER)
        raise AssertionError("went on")
sys.modules["MODULE"] = Importing("MODULE")
cli.main("COMMAND".split())
"""


COMMANDS = [
    ("eval recipe.yaml", "mmkit.eval.run"),
    ("train recipe.yaml", "mmkit.commands"),
    ("probe recipe.yaml", "mmkit.commands"),
    ("demo", "mmkit.demo"),
]


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(("command", "module"), COMMANDS)
def test_a_signal_that_comes_before_the_work_leaves_with_75_too(command, module, number):
    code = IMPORTING.replace("NUMBER", number).replace("MODULE", module).replace("COMMAND", command)
    done = pipeline.python("-c", code)
    assert (done.returncode, done.stderr) == (75, f"mmkit: stopped by {number}; the same command goes on\n")


CHILD = """
import os, signal, time
from mmkit.distributed.preemption import Preemption, leave_on_signals
before = signal.getsignal(signal.SIGTERM)
with leave_on_signals():
    pass
assert signal.getsignal(signal.SIGTERM) is before
with leave_on_signals():
    ready, begun = os.pipe()
    child = os.fork()
    if not child:
        os.write(begun, b"x")
        time.sleep(20)
        os._exit(0)
    # Python forgets a signal that comes while it forks.
    os.read(ready, 1)
    os.kill(child, signal.SIGTERM)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGTERM)
        print(preemption.requested.name, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_children_end_by_the_signal_itself_and_a_preemption_goes_first():
    done = pipeline.python("-c", CHILD)
    assert done.stdout.split() == ["-15", "SIGTERM"] and done.returncode == 75, done
    assert done.stderr.count("stopped by SIGTERM") == 1
