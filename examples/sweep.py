"""Search the method, the rank and the learning rate with Optuna, all trials on one backbone.

Each trial puts deltas on the one MiniLM in memory, trains, measures and takes them off. The score
is the accuracy of the best trial; the baseline is the share of the largest class.

    pip install optuna
    python examples/sweep.py
"""

import argparse

import optuna

import opendelta
from opendelta.studies import models


def main(trials, train_size):
    """Search, and print the score."""
    texts = opendelta.Texts("trec", train_size=train_size, test_size=300)
    model, task = models.for_texts("MiniLM", texts)

    def objective(trial):
        method = trial.suggest_categorical("method", ["lora", "adapter", "ia3"])
        size = {
            "lora": lambda: f"lora:lora_r={trial.suggest_int('rank', 2, 16, log=True)}",
            "adapter": lambda: f"adapter:bottleneck_dim={trial.suggest_int('width', 4, 32)}",
            "ia3": lambda: "ia3",
        }[method]()
        rate = trial.suggest_float("rate", 1e-3, 3e-2, log=True)
        report = opendelta.compare(model, task, [size], rates={method: rate}, progress=False)
        print(f"{size} at {rate:.4f}: {report.best.score:.3f}")
        return report.best.score

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(objective, n_trials=trials)
    opendelta.assert_pristine(model)
    print("best:", study.best_params)
    print(f"score {study.best_value:.3f}, baseline {task.baseline:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--train-size", type=int, default=1600, help="questions to learn from")
    given = parser.parse_args()
    main(given.trials, given.train_size)
