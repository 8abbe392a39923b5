"""What a user touches: stages, the command, parameters, tracking and the report."""
