"""The run as it is stored: its journal, its steps, and the deletion of what can never be restored any more."""
