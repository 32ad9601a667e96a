"""Training a job. The road: `stage` joins the ranks, `setup` builds, `loop` trains.

    stage            the command `clkd train`: one job, on as many ranks as the launcher starts
    process          signals, the group of ranks, the job's lock; `operators`: locks on what DeepSpeed compiles
    setup            everything that is read, checked and built before the first step
      distillation   the teacher's side: store, hardness table, normalisers; `validation_gap`: held-out samples
      engine         DeepSpeed around the model
    loop             the training loop
      feed           the planned samples as micro-batches; `batches`: their tensors
      step           forwards, losses as global sums, backwards; `step_metrics`, `metrics`: what is logged
      job_checkpoint what a job saves and goes on from; `job_settings`: which settings must stay the same
        checkpoint   the folder on disk; `engine_state`: DeepSpeed's partitions as whole tensors

Only `engine`, `engine_state` and `process` see DeepSpeed.
"""
