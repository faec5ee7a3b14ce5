"""One module for each place a job can be started in."""
