"""Measuring a receiver from outside: made-up telemetry, and a load generator in a process of its own."""
