"""RecTools' SASRec, BERT4Rec or HSTU on exported events: from two CSV files to lists of items. For `quality_gts`.

    <peers' python> -P jobs/bench/rectools_peer.py --model sasrec|bert4rec|hstu --train CSV --history CSV --users FILE
        --out CSV [--out-unseen CSV] [--k 200] [--epochs N] [--seed S] [--threads 1] [--cut SECONDS] ...

It runs in the peers' environment (`make peers`), where neither lum_ray nor pyarrow is, so that files are exchanged as
CSV. Importing it takes none of its packages: `quality_gts` reads the defaults from here.

Files: `--train` (what may be trained on) and `--history` (what is known at the cut) have the columns user, item, time
(whole seconds, or dates and times as text); rows of one time stay in the order of the file. `--users` names a user a
line. `--out` gets user, rank (from 1), item, score: seen items are not filtered, because baskets repeat; `--out-unseen`
the same without the items of the user's history. A user without a known item in her history gets no list, and an item
that training never saw is on none: whoever reads the lists fills these up.

Choices that are not obvious:
- RecTools trains on the newest `--length` events of a user only, which would be a tenth of Complete Journey. So that
  the peer is as strong as it can be, histories are cut into windows of that length from the newest event backwards,
  each a user of its own (`windowed`); with `--newest-only` RecTools has it its own way.
- Lists are made from the histories at the cut with the items that training saw: a newer event is read, not learned.
- HSTU also reads the time of the request. The true one is unknown at the cut; it is given the cut's first second.
- The settings are RecTools' defaults but for what minutes on a CPU allow: 64 wide, and a batch of 32 sequences, which
  takes four times the steps of its 128 in the same time. The loss is softmax over the whole catalogue.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

MODELS = ("sasrec", "bert4rec", "hstu")
VERSION = 1
"""Of what this file makes of the same arguments."""


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def windowed(events: Any, length: int) -> Any:
    """Events (a frame, a user's in time order) with a user for each window of `length` events, the newest full.

    A window begins with one event more, the one before it: what predicts its first.
    """
    import pandas as pd

    back = events.groupby("user", sort=False).cumcount(ascending=False)
    window = back // length
    again = events[(back % length == 0) & (back > 0)]
    parts = [
        events.assign(user=events["user"] + "#" + window.astype(str)),
        again.assign(user=again["user"] + "#" + (window[again.index] - 1).astype(str)),
    ]
    return pd.concat(parts).sort_index(kind="stable").reset_index(drop=True)


def read_events(path: str) -> Any:
    """A CSV file as RecTools wants its interactions: user_id, item_id, weight, datetime; here still user and item."""
    import pandas as pd

    events = pd.read_csv(path, dtype={"user": str, "item": str}, keep_default_na=False)
    if pd.api.types.is_integer_dtype(events["time"]):
        events["datetime"] = pd.to_datetime(events["time"], unit="s")
    else:
        events["datetime"] = pd.to_datetime(events["time"])
    # an ID of our own data may be RecTools' name of a pad
    events["item"] = "i" + events["item"]
    return events.drop(columns="time").sort_values("datetime", kind="stable").reset_index(drop=True)


def dataset_of(events: Any) -> Any:
    """A RecTools dataset of events."""
    from rectools import Columns
    from rectools.dataset import Dataset

    names = {"user": Columns.User, "item": Columns.Item, "datetime": Columns.Datetime}
    return Dataset.construct(events.rename(columns=names).assign(**{Columns.Weight: 1.0}))


def trainer(epochs: int) -> Any:
    """A trainer that says on stderr how far it is, and writes nothing."""
    from pytorch_lightning import Callback, Trainer

    begin = time.monotonic()

    class Told(Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            loss = float(trainer.callback_metrics.get("train_loss", float("nan")))
            note(f"epoch {trainer.current_epoch + 1} of {epochs}: loss {loss:.4f}, {time.monotonic() - begin:.0f} s")

    return Trainer(
        min_epochs=epochs,
        max_epochs=epochs,
        deterministic=True,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Told()],
    )


def model_of(options: argparse.Namespace) -> Any:
    """The model that the arguments ask for."""
    from rectools.models import BERT4RecModel, HSTUModel, SASRecModel

    return {"sasrec": SASRecModel, "bert4rec": BERT4RecModel, "hstu": HSTUModel}[options.model](
        n_blocks=options.blocks,
        n_heads=options.heads,
        n_factors=options.factors,
        dropout_rate=options.dropout,
        session_max_len=options.length,
        loss="softmax",
        lr=options.learning_rate,
        batch_size=options.batch,
        epochs=options.epochs,
        deterministic=True,
        recommend_torch_device="cpu",
        get_trainer_func=trainer,
        get_trainer_func_kwargs={"epochs": options.epochs},
    )


def lists_of(model: Any, history: Any, users: Sequence[str], options: argparse.Namespace, unseen: bool) -> Any:
    """A frame of user, rank, item, score: the first `k` items of each user that the model can serve."""
    import pandas as pd
    from rectools import Columns

    context = None
    if model.require_recommend_context:
        request = pd.to_datetime(options.cut, unit="s") if options.cut is not None else history["datetime"].max()
        context = pd.DataFrame({Columns.User: list(users), Columns.Datetime: request, Columns.Weight: 1.0})
    found = model.recommend(
        users=list(users),
        dataset=dataset_of(history),
        k=options.k,
        filter_viewed=unseen,
        on_unsupported_targets="ignore",
        context=context,
    )
    names = {Columns.User: "user", Columns.Rank: "rank", Columns.Item: "item", Columns.Score: "score"}
    found = found.rename(columns=names)[list(names.values())]
    return found.assign(item=found["item"].str[1:])


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--train", required=True, help="CSV of the events to train on")
    parser.add_argument("--history", required=True, help="CSV of the events known at the cut")
    parser.add_argument("--users", required=True, help="file with a user a line")
    parser.add_argument("--out", required=True, help="CSV of the lists")
    parser.add_argument("--out-unseen", help="CSV of the lists without the user's own items")
    parser.add_argument("--k", type=int, default=200, help="places of a list")
    parser.add_argument("--epochs", type=int, default=2, help="about 5 minutes of one core on Complete Journey")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cut", type=int, help="the cut in seconds since 1970, HSTU's time of request")
    parser.add_argument("--factors", type=int, default=64)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=100, help="events of a sequence")
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--newest-only", action="store_true", help="train on the newest events of each user alone")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", str(options.threads))  # read once, when torch is imported
    import warnings

    import torch
    from pytorch_lightning import seed_everything

    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    seed_everything(options.seed, workers=True)

    begin = time.monotonic()
    events, history = read_events(options.train), read_events(options.history)
    with open(options.users, encoding="utf-8") as lines:
        users = [line.rstrip("\n") for line in lines if line.rstrip("\n")]
    shown = f"{len(events):,} events of {events['user'].nunique():,} users and {events['item'].nunique():,} items"
    train = events if options.newest_only else windowed(events, options.length)
    note(f"{options.model}: {options.epochs} epochs over {shown}, {train['user'].nunique():,} sequences")
    model = model_of(options)
    model.fit(dataset_of(train))
    note(f"{options.model}: trained in {time.monotonic() - begin:.0f} s; {len(users):,} lists")
    for path, unseen in ((options.out, False), (options.out_unseen, True)):
        if path:
            found = lists_of(model, history, users, options, unseen)
            note(f"{options.model}: lists of {found['user'].nunique():,} users{' without seen items' * unseen}")
            found.to_csv(path, index=False, float_format="%.9g")
    return 0


if __name__ == "__main__":
    sys.exit(main())
