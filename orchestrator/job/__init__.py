"""Several processes that save and restore together: agreement, signals, decisions, restores."""
