"""The limit on CPU time inside a process."""

import signal
import threading
import time

import pytest

from magistral_jax.verify.cpu_limit import OutOfTimeError, cpu_limit, without_limit


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def spin_stubbornly() -> None:
    while True:
        try:
            spin(60)
        except Exception:
            continue


def test_a_busy_body_is_stopped_through_handlers_of_exceptions():
    with pytest.raises(OutOfTimeError), cpu_limit(0.05):
        spin_stubbornly()


class Finalised:
    def __del__(self) -> None:
        spin(0.5)


def spin_after_a_finaliser() -> None:
    Finalised()
    spin(60)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_body_is_stopped_though_the_limit_is_met_inside_a_finaliser():
    with pytest.raises(OutOfTimeError), cpu_limit(0.05):
        spin_after_a_finaliser()


def test_nothing_is_left_behind():
    before = signal.getsignal(signal.SIGPROF)
    with cpu_limit(0.05):
        pass
    spin(0.2)
    assert signal.getsignal(signal.SIGPROF) is before
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)


def test_time_without_limit_does_not_count():
    with cpu_limit(0.3), without_limit():
        spin(0.6)


def test_the_clock_goes_on_after_time_without_limit():
    def body() -> None:
        with without_limit():
            spin(0.01)
        spin(60)

    with pytest.raises(OutOfTimeError), cpu_limit(0.2):
        body()


def test_another_thread_has_no_limit():
    done: list[bool] = []

    def body() -> None:
        with cpu_limit(0.01), without_limit():
            spin(0.1)
        done.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert done == [True]
