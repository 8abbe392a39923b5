"""Stage ``prepare``: splits the data source into train, search and test images."""

from pathlib import Path

from autoslim.data.batches import worker_count
from autoslim.data.prepare import prepare
from autoslim.pipeline.checks import check_data, check_model, check_pipeline, check_task_source, check_teacher_file
from autoslim.pipeline.params import load_params
from autoslim.pipeline.project import PREPARED, repository_root
from autoslim.pipeline.recorded_inputs import RecordedInputs
from autoslim.pipeline.tracking.stage import tracked_stage
from autoslim.tasks.building import find_task
from autoslim.tasks.classification import Classification
from autoslim.training.progress import progress_over


def run() -> None:
    """Prepares the data, and checks all parameters of the pipeline against them.

    Raises:
        UserError: a parameter is wrong, or the data cannot be loaded.
    """
    recorded = RecordedInputs("prepare")
    params = load_params()
    data = params.data
    root = repository_root()
    check_data(data, relative_to=root)
    check_model(params.model)
    check_task_source(params.task)
    task = find_task(params.task)
    check_teacher_file(params)
    with tracked_stage(params, "prepare", run_name=f"prepare {data.source}", sections=["data"]) as tracker:
        info = prepare(
            data.source,
            PREPARED,
            image_size=data.size,
            channels=data.channels,
            search_images=data.search_images,
            seed=data.seed,
            train_images=data.train_images,
            test_images=data.test_images,
            storage=data.storage,
            class_targets=isinstance(task, Classification),
            wrong_values=task.value_check(),
            raw=Path("data/raw"),
            relative_to=root,
            workers=worker_count(params.runtime.workers),
            progress=progress_over,
        )
        tracker.metrics({f"{split}_images": count for split, count in info.counts.items()})
        check_pipeline(params, info)
        recorded.check()
