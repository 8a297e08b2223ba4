import sys

import pytest

from d2v_scale.errors import UserError
from d2v_scale.programs.run_quietly import run_quietly


def test_what_a_program_said_is_told_without_its_noise() -> None:
    run_quietly([sys.executable, "-c", "print('fine')"], "It")
    loud = "import sys; sys.stderr.write('noise\\nerror: shards: missing. Make some.\\n'); sys.exit(2)"
    with pytest.raises(UserError, match=r"^It ended with code 2: shards: missing\. Make some\.$"):
        run_quietly([sys.executable, "-c", loud], "It")
    with pytest.raises(UserError, match="no such luck"):
        run_quietly([sys.executable, "-c", "raise RuntimeError('no such luck')"], "It")
