"""What a runtime's processes log: the error that the others followed from is found."""

import json
import logging.config
import os
from pathlib import Path

from spd_calib.runtimes.vllm.processes import errors_in_a_file, root_cause

LOG = """Engine core failed to start.
Traceback (most recent call last):
  File "a.py", line 1, in <module>
    raise ValueError()
ValueError: Head size: 8 is not supported.

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 1
vllm.v1.engine.exceptions.EngineDeadError: the engine died
"""


def test_the_first_error_is_the_root_cause(tmp_path):
    log = tmp_path / "errors.log"
    log.write_text("Engine core failed to start.\n")
    assert root_cause(log) == ""
    log.write_text(LOG)
    assert root_cause(log) == "Head size: 8 is not supported"


def test_what_the_log_configuration_writes_is_found(monkeypatch):
    monkeypatch.delenv("VLLM_LOGGING_CONFIG_PATH", raising=False)
    with errors_in_a_file() as log:
        logging.config.dictConfig(json.loads(Path(os.environ["VLLM_LOGGING_CONFIG_PATH"]).read_text()))
        logger = logging.getLogger("vllm.worker")
        logger.info("no error")
        try:
            raise RuntimeError("this is why")
        except RuntimeError:
            logger.exception("failed")
        assert root_cause(log) == "this is why"
        assert "no error" not in log.read_text()
    assert "VLLM_LOGGING_CONFIG_PATH" not in os.environ
    with errors_in_a_file() as log:
        assert root_cause(log) == ""
    for handler in list(logging.getLogger("vllm").handlers):
        logging.getLogger("vllm").removeHandler(handler)
        handler.close()
