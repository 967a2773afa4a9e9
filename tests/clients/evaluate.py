"""A process of its own for lm-eval, which brings much along: scores a model there and here, prints both as JSON."""

import json
import sys
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = ["capitals", "endings"]


def scores(model: str, arguments: dict[str, Any], tasks: TaskManager) -> dict[str, Any]:
    """The results of each task, and the log-likelihood of each answer that was weighed."""
    found = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=TASKS, task_manager=tasks, bootstrap_iters=0, device="cpu"
    )
    numbers = {
        f"{task} {name.partition(',')[0]}": value
        for task in TASKS
        for name, value in found["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    }
    weighed = {task: [sample["filtered_resps"] for sample in found["samples"][task]] for task in TASKS}
    return {"results": numbers, "weighed": weighed}


if __name__ == "__main__":
    url, folder, file = sys.argv[1:]
    manager = TaskManager(include_path=".", include_defaults=False)
    there = {"model": "smollm2", "base_url": f"{url}/v1/completions", "num_concurrent": 4}
    here = {"pretrained": folder, "gguf_file": file, "dtype": "float32"}
    json.dump([scores("local-completions", there, manager), scores("hf", here, manager)], sys.stdout)
