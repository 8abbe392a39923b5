"""Tracking in MLflow. It logs copies of the files that DVC tracks, and is never an input of a stage.

This is the only package that imports mlflow. It does so inside functions, because the import takes seconds. If the
store fails, no result is lost: the first failing call prints one line on stderr, and what the store did not receive is
kept (see ``unsent``) and sent by the next stage that reaches it, or by ``autoslim sync``. MLflow itself has no such
mode. Callers always have a ``Tracker``, so they need not check whether tracking is enabled. Only rank 0 should track.

Everything that is logged is an *event*, a mapping that JSON can store. ``Sender.send`` sends it, now or later. To send
an event twice changes nothing: its time is part of it, and a run has one model of each name.

The runs of an experiment's stages are children of one run (see ``experiment``), with which a user compares experiments.
Stages are separate processes, in different working directories, and may reach MLflow in another order than they ran in.
Each of them finds that run in the store by a tag with the digest of the parameters, or creates it.
"""
