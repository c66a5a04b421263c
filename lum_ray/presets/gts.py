"""Named runs of GTS-LUM."""

from __future__ import annotations

import dataclasses

from lum_ray.config import Calendar, Data, Events, Graph, Items, Profiles, Run, Source, Split, Subset, Train
from lum_ray.gts.config import GtsConfig
from lum_ray.presets.lumos import lumos_demo, own_data


def gts_demo() -> Run:
    """The product types of a household's next basket (Complete Journey), minutes on a laptop."""
    data = lumos_demo().data
    return Run(
        name="gts_demo",
        model="gts",
        data=Data(
            source=Source("complete_journey", options={"items": True}),
            events=Events(item="product_type"),
            items=Items(
                text=("department", "product_category", "product_type"),
                numbers=("products", "private_share"),
                categories=("department", "product_category"),
            ),
            graph=Graph(),
            profiles=data.profiles,
            calendar=Calendar(holidays="US"),
            time_zone=data.time_zone,
            start=data.start,
            end=data.end,
            max_reject_share=0.01,  # 0.3 % of the lines have no product type
            engine="ray",
        ),
        split=Split(
            validate_from="2017-11-01",
            train=Subset(from_day="2017-03-01"),
            validate=Subset(from_day="2017-11-01", until_day="2017-11-01"),
            test=Subset(from_day="2017-12-01", until_day="2017-12-01"),
            min_history_days=0,
        ),
        section=GtsConfig(
            text_encoder="minilm",
            max_tokens=96,
            width=64,
            layers=2,
            queries=4,
            llm="smollm2",
            keep_layers=2,
            negatives=256,
            candidates=3,
            propensity_share=0.25,
            align_steps=120,
            align_group=16,
            rerank=10,
        ),
        train=Train(
            steps=400,
            batch=16,
            micro_batch=16,
            learning_rate=1e-3,
            ema=0.99,
            validate_every=200,
            validate_users=500,
            checkpoint_every=200,
            keep_best="eval/ndcg_10",
        ),
    )


NEXT_ITEM_SPLIT = Split(
    validate_from="2023-03-11",
    validate=Subset(from_day="2023-03-11", until_day="2023-03-11"),
    test=Subset(from_day="2023-03-18", until_day="2023-03-18"),
    min_history_days=0,
)


def gts_tiny() -> Run:
    """A planted world, a random tiny Llama: for tests and for a first look at the machinery, not for quality."""
    return Run(
        name="gts_tiny",
        model="gts",
        data=Data(
            source=Source("next_item", options={"users": 200, "items": 120, "seed": 7}),
            events=Events(item="item"),
            items=Items(text=("text",), numbers=("price",), categories=("format",)),
            graph=Graph(),
            profiles=Profiles(categories=("plan",)),
            time_zone="Europe/Berlin",
        ),
        split=NEXT_ITEM_SPLIT,
        section=GtsConfig(
            text_encoder="minilm",
            branching=4,
            depth=2,
            max_tokens=48,
            width=16,
            heads=2,
            layers=2,
            queries=2,
            llm="random",
            negatives=32,
            candidates=3,
            output_width=16,
            align_steps=4,
            align_group=8,
            graph_width=8,
            table_width=8,
            retrieve=20,
            rerank=4,
        ),
        train=Train(steps=8, batch=32, micro_batch=32, validate_every=4, checkpoint_every=4, keep_best="eval/ndcg_10"),
    )


def gts_simulator() -> Run:
    """A planted world where what comes next depends on the last item and on the hour, with a known oracle."""
    run = gts_tiny()
    return dataclasses.replace(
        run,
        name="gts_simulator",
        data=dataclasses.replace(
            run.data, source=Source("next_item", options={"users": 2000, "items": 200, "seed": 7})
        ),
        section=GtsConfig(
            text_encoder="minilm",
            branching=8,
            depth=2,
            max_tokens=36,
            width=64,
            layers=2,
            queries=4,
            llm="smollm2",
            keep_layers=1,
            negatives=400,
            candidates=3,
            propensity_share=0.25,
            align_steps=60,
            align_group=8,
            graph_width=32,
            table_width=16,
            rerank=20,
        ),
        train=Train(
            steps=1000,
            batch=32,
            micro_batch=32,
            learning_rate=2e-3,
            warmup_share=0.05,
            ema=0.99,
            validate_every=200,
            validate_users=500,
            checkpoint_every=200,
            keep_best="eval/recall_10",
        ),
    )


def gts_ml_100k() -> Run:
    """The next film of each person (MovieLens 100K): the last rating, on the made-up day 1000, is the test."""
    return Run(
        name="gts_ml_100k",
        model="gts",
        data=Data(
            source=Source("ml_100k", path="ml-100k"),
            events=Events(item="item"),
            items=Items(text=("title", "genres", "year"), numbers=("year",), categories=("genres",)),
            profiles=Profiles(numbers=("age",), categories=("gender", "occupation")),
            engine="local",
        ),
        split=Split(
            validate_from=999,
            validate=Subset(from_day=999, until_day=999),
            test=Subset(from_day=1000, until_day=1000),
            min_history_days=0,
        ),
        section=GtsConfig(
            text_encoder="minilm",
            max_tokens=103,  # a film is one token: 100 of them behind the prefix, as many as a peer reads
            timestamps="none",
            modalities=("text", "table"),  # one rating an instant: nothing is taken together
            width=64,
            layers=2,
            queries=4,
            dropout=0.1,
            llm="smollm2",
            keep_layers=2,
            negatives=512,
            align_steps=120,
            align_group=16,
            rerank=10,
        ),
        train=Train(
            steps=600,
            batch=16,
            micro_batch=16,
            learning_rate=1e-3,
            ema=0.99,
            validate_every=150,
            validate_users=500,
            checkpoint_every=150,
            keep_best="eval/ndcg_10",
        ),
    )


def gts_paper() -> Run:
    """The paper's setting on tables of your own: BGE-M3 texts, TinyLlama frozen, 240 tokens, 512 negatives."""
    own = own_data()
    return Run(
        name="gts_paper",
        model="gts",
        data=Data(
            events=Events(path="s3://bucket/events", user="user_id", time="event_time", item="item_id"),
            items=Items(path="s3://bucket/items", item="item_id", text=("title", "category")),
            graph=Graph(),
            profiles=own.profiles,
            calendar=Calendar(holidays="IN"),
            time_zone=own.time_zone,
        ),
        split=Split(
            validate_from="2024-10-01",
            validate=Subset(from_day="2024-10-01", until_day="2024-10-29", every_days=7),
            test=Subset(from_day="2024-11-05", every_days=7),
        ),
        section=GtsConfig(),
        train=Train(
            steps=20_000,
            batch=1024,
            micro_batch=128,
            workers=8,
            learning_rate=1e-4,
            zero_stage=2,
            validate_every=1000,
            checkpoint_every=1000,
            keep_best="eval/ndcg_10",
        ),
    )
