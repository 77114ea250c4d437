"""SIGTERM and Ctrl-C to a driver ask its job to stop."""

import os
import signal
import threading
import time

import pytest
from ray.experimental.internal_kv import _internal_kv_del

from pipeline import interruption


@pytest.fixture
def job(driver):
    yield
    _internal_kv_del(interruption._key())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_job_to_make_way_whatever_else_would_take_it(job, number, capsys):
    before = signal.getsignal(number)

    def take():
        """As Ray Train does where it may."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, signal.SIG_IGN)

    with pytest.raises(SystemExit) as end, interruption.graceful_shutdown():
        interruption.run_shielded(take)
        interruption.check()
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            interruption.check()
            time.sleep(0.01)
    assert end.value.code == 75
    assert capsys.readouterr().out.endswith("interrupted; run the same command again to resume\n")
    assert signal.getsignal(number) is before


def test_a_command_in_the_background_ignores_ctrl_c(job):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.graceful_shutdown():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_a_task_a_call_stays_in_its_thread():
    assert interruption.run_shielded(threading.current_thread) is threading.current_thread()
