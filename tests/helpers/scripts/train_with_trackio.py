"""Train a tiny model with trackio and no network; write the Trainer's history, and what trackio kept of it, as JSON."""

import json
import os
import socket
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))


def refuse(self, address):
    raise OSError(f"a reporter reaches out to {address}")


def main(folder: Path):
    socket.socket.connect = socket.socket.bind = refuse  # neither a server far away nor a dashboard here
    os.environ["TRACKIO_DIR"] = str(folder / "trackio")  # read when trackio is imported

    from trackio.sqlite_storage import SQLiteStorage

    from helpers.models import tiny_model
    from helpers.trainers import BLOCKS, make_trainer
    from modeling_stablemoe import RoutingFluctuationCallback, StageTransitionCallback
    from modeling_stablemoe.training import RoutingTrainer

    trainer = make_trainer(
        folder / "run",
        StageTransitionCallback(6, expert_load="reporters"),
        RoutingFluctuationCallback(BLOCKS, check_steps=3, num_tokens=64),
        model=tiny_model(moe_layer_positions=[0, 2]),
        trainer_class=RoutingTrainer,
        report_to="trackio",
        project="stablemoe",
        run_name="first",
    )
    trainer.train()
    kept = SQLiteStorage.get_logs("stablemoe", "first")
    result = {"history": trainer.state.log_history, "kept": kept}
    (folder / "result.json").write_text(json.dumps(result, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
