from __future__ import annotations

import os
import signal

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
