"""Estimates for a step on absent hardware: memory, operations, communication, time."""
