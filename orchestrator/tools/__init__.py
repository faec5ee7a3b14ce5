"""What is done with committed steps from outside a job: verify, diff, export, recover."""
