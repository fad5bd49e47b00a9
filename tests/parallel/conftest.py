"""Counts the programs that XLA compiles."""

import jax
import pytest


@pytest.fixture
def compilations():
    """Grows by one with every program that XLA compiles."""
    events = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)
