import os
import sys

import pytest

from tdcompile.support.quiet import native_output_to_stderr


def test_what_is_written_to_the_descriptor_goes_to_stderr_and_back(capfd):
    with native_output_to_stderr():
        os.write(1, b"from below\n")
    sys.stdout.write("a result\n")
    out, err = capfd.readouterr()
    assert (out, err) == ("a result\n", "from below\n")


def test_the_descriptor_is_put_back_after_an_error(capfd):
    with pytest.raises(KeyError), native_output_to_stderr():
        raise KeyError
    os.write(1, b"a result\n")
    assert capfd.readouterr().out == "a result\n"
