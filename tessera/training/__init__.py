"""Training glue on Lightning: optimizers, schedules, checkpoints, callbacks and the one function that runs a stage."""
