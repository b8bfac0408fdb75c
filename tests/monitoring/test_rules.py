"""The alerts for Prometheus: right by their own tests, and about metrics that there are."""

import re
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from otel_pg_exporter.model import Signal
from otel_pg_exporter.monitoring import groups
from otel_pg_exporter.monitoring.groups import Expired, Queue
from otel_pg_exporter.monitoring.metrics import Metrics
from otel_pg_exporter.monitoring.watch import Condition, SpoolReading
from otel_pg_exporter.pipeline.spool_file import SpoolLevel
from otel_pg_exporter.telemetry import BatchReport, ItemCounters, PoolState, Statistics
from tests.test_docs import headings

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "rules.yml"

_OF_PROMETHEUS = {"up", "instance", "job", "le", "severity"}


def everything() -> Metrics:
    """Return metrics of which each shows something."""
    metrics = Metrics()
    spool = SpoolReading(level=SpoolLevel(), max_bytes=1, takes=True, lost=False)
    readings: dict[Any, object] = {
        groups.ITEMS: ItemCounters().by_signal(),
        groups.STATISTICS: Statistics().snapshot(),
        groups.QUEUE: Queue(bytes=0, max_bytes=1, calls=0, max_calls=1),
        groups.POOL: PoolState(limit=1, idle=0, used=0, waiting=0, opened=0, failed=0, timeouts=0),
        groups.SPOOL: spool,
        groups.CONDITION: Condition(postgresql_up=True),
        groups.JOBS: {"retention": 1.0, "partitions ahead": 1.0},
        groups.RETENTION: Expired(partitions=0, rows=0),
        groups.CERTIFICATE: 1.0,
    }
    assert [*readings, groups.BUILD] == list(groups.GROUPS)
    for group in readings:
        metrics.observe(group, partial(readings.get, group))
    metrics.answered("Service/Export", "UNAVAILABLE", 0.1)
    metrics.answered("POST /v1/traces", "503", 0.1)
    metrics.committed(
        BatchReport(
            signal=Signal.TRACES,
            rows=1,
            duplicates=0,
            conflicts=0,
            rejected=0,
            bytes=1,
            seconds=0.1,
            repairs={},
            stages={},
            rejections={},
            dead_letters=0,
            lag=0.1,
        )
    )
    return metrics


def rules() -> str:
    return re.sub(r"(?m)^#.*", "", RULES.read_text(encoding="utf-8"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not there (Debian: prometheus)")
@pytest.mark.parametrize("command", [["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]])
def test_promtool_finds_the_rules_right(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=RULES.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_and_label_in_the_rules_is_one_that_is_shown() -> None:
    content, _ = everything().exposition("")
    samples = [sample for family in text_string_to_metric_families(content.decode()) for sample in family.samples]
    names = {sample.name for sample in samples}
    text = rules()
    expressions = re.sub(
        r"(?m)^ *(- alert|- record|summary|description|runbook_url|for|labels|annotations):.*$", "", text
    )
    used = set(re.findall(r"(?<![:\w\"])(?:otel_pg_exporter|rpc|http|db|process|up)(?:_\w+|\b)(?!:)", expressions))
    labels = {label for sample in samples for label in sample.labels}
    used_as_labels = set(re.findall(r"(\w+)(?:!?=~?|!~)\"", expressions))
    for listed in re.findall(r"\bby \(([\w, ]+)\)", expressions):
        used_as_labels |= set(listed.split(", "))
    assert len(used) > 15
    assert used - labels - names - _OF_PROMETHEUS == set()
    assert used_as_labels - labels - _OF_PROMETHEUS == set()


def test_every_alert_has_a_section_that_says_what_to_do() -> None:
    links = re.findall(r'runbook_url: "{{ \$externalLabels.otel_pg_exporter_docs }}(\S+)"', rules())
    assert len(links) == rules().count("- alert:")
    for link in links:
        document, _, anchor = link.partition("#")
        assert anchor in headings(ROOT / document), link
