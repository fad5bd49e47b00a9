"""What a step needs of hardware that is not there: memory, operations, exchanges, time."""
