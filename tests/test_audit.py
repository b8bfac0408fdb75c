"""`make audit` where the advisory services cannot be reached."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_audit_that_gets_no_answer_fails_and_says_what_was_not_audited() -> None:
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:1")
    environment = {**os.environ, **nowhere, "NO_PROXY": "", "no_proxy": ""}
    done = subprocess.run(
        [ROOT / ".ci" / "audit"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Python: NOT AUDITED, because the service 'pypi' did not answer" in done.stderr
    assert "no known vulnerability" not in done.stdout
