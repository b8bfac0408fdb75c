"""Watching the receiver: its metrics, by Prometheus and OTLP, and whether it works and takes exports."""
