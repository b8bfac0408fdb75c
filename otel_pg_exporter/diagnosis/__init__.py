"""What `check` finds: the machine, the database, its tables and rights, each as findings with a remedy."""

from otel_pg_exporter.diagnosis.database import examine_database
from otel_pg_exporter.diagnosis.finding import Finding, Grade
from otel_pg_exporter.diagnosis.machine import examine_machine

__all__ = ["Finding", "Grade", "examine_database", "examine_machine"]
