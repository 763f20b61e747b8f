"""The training loop and what it stands on; nothing here knows a task by name."""
