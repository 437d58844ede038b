import ctypes
import os
import sys
import threading

import pytest

from tdcompile.support.quiet import native_output_dropped, native_output_to_stderr


def test_what_is_written_to_the_descriptor_goes_to_stderr_and_back(capfd):
    with native_output_to_stderr():
        os.write(1, b"from below\n")
    sys.stdout.write("a result\n")
    out, err = capfd.readouterr()
    assert (out, err) == ("a result\n", "from below\n")


def test_what_is_dropped_goes_nowhere_and_what_was_buffered_before_stays(capfd):
    c = ctypes.CDLL(None)
    c.printf(b"before\n")
    with native_output_dropped():
        os.write(1, b"from below\n")
        c.printf(b"buffered below\n")
    sys.stdout.write("a result\n")
    c.fflush(None)
    out, err = capfd.readouterr()
    assert (sorted(out.split("\n")), err) == (["", "a result", "before"], "")


@pytest.mark.parametrize("redirected", [native_output_to_stderr, native_output_dropped])
def test_the_descriptor_is_put_back_after_an_error(redirected, capfd):
    with pytest.raises(KeyError), redirected():
        raise KeyError
    os.write(1, b"a result\n")
    assert capfd.readouterr().out == "a result\n"


def test_two_threads_that_drop_output_leave_the_descriptor_as_it_was(capfd):
    started = threading.Barrier(2)

    def dropping():
        started.wait()
        for _ in range(50):
            with native_output_dropped():
                os.write(1, b"from below\n")

    threads = [threading.Thread(target=dropping) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.write(1, b"a result\n")
    assert capfd.readouterr().out == "a result\n"
