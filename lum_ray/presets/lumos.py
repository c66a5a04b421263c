"""Named runs of LUMOS."""

from __future__ import annotations

import dataclasses

from lum_ray.config import (
    Behaviour,
    Calendar,
    Data,
    Derived,
    Events,
    Horizon,
    Profiles,
    Run,
    Source,
    Split,
    Subset,
    Train,
)
from lum_ray.lumos.config import LumosConfig

GROCERY = (
    Behaviour("active", "binary", "count()"),
    Behaviour("coupon_used", "binary", "any(coupon_disc > 0)"),
    Behaviour("private_label", "binary", "any(brand == 'Private')"),
    Behaviour("discounted", "binary", "any(retail_disc > 0)"),
    Behaviour("produce", "binary", "any(department == 'PRODUCE')"),
    Behaviour("drug", "binary", "any(department == 'DRUG GM')"),
    Behaviour("meat", "binary", "any(department in ('MEAT', 'MEAT-PCKGD'))"),
    Behaviour("deli", "binary", "any(department == 'DELI')"),
    Behaviour("fuel", "binary", "any(department == 'FUEL')"),
    Behaviour("spend", "continuous", "sum(sales_value)", resolution=0.01, gate="active"),
    Behaviour("discount", "continuous", "sum(retail_disc)", resolution=0.01, gate="discounted"),
    Behaviour("lines", "count", "count()", gate="active"),
    Behaviour("baskets", "count", "n_unique(basket_id)", gate="active"),
)


def lumos_demo() -> Run:
    """A year of household shopping (Complete Journey), minutes on a laptop."""
    return Run(
        name="lumos_demo",
        model="lumos",
        data=Data(
            source=Source("complete_journey"),
            behaviours=GROCERY,
            derived=(Derived("churned", "no active in the next 28 days"),),
            horizons=(
                Horizon("active", "any", 7),
                Horizon("coupon_used", "any", 7),
                Horizon("private_label", "any", 7),
                Horizon("spend", "sum", 7),
                Horizon("lines", "sum", 7),
            ),
            profiles=Profiles(
                categories=(
                    "age",
                    "income",
                    "home_ownership",
                    "marital_status",
                    "household_size",
                    "household_comp",
                    "kids_count",
                )
            ),
            calendar=Calendar(holidays="US"),
            time_zone="America/New_York",
            start="2017-01-01",
            end="2018-01-01",
            engine="ray",
        ),
        split=Split(
            validate_from="2017-09-20",
            train=Subset(from_day="2017-08-20"),
            validate=Subset(from_day="2017-09-20", until_day="2017-10-04", every_days=7),
            test=Subset(from_day="2017-10-11", until_day="2017-12-25", every_days=7),
        ),
        section=LumosConfig(
            history_days=252,
            future_days=7,
            width=64,
            heads=8,
            encoder_layers=1,
            swiglu_width=128,
            embed_width=64,
            dropout=0.1,
            pad="unread",
            positions="lags",
            season=False,
            cuts_per_window=8,
            cut_stride_days=25,
            causal=True,
            lag_logits=True,
            day_match=True,
            raw_values=True,
            continuous="lognormal",
        ),
        train=Train(
            steps=400,
            batch=32,
            micro_batch=32,
            learning_rate=3e-3,
            warmup_share=0.05,
            ema=0.99,
            validate_every=100,
            validate_users=600,
            checkpoint_every=100,
        ),
    )


def lumos_complete_journey() -> Run:
    """`lumos_demo` trained for longer, and with horizons of 28 days: the contest with LightGBM."""
    run = lumos_demo()
    longer = tuple(dataclasses.replace(horizon, days=28) for horizon in run.data.horizons)
    return dataclasses.replace(
        run,
        name="lumos_complete_journey",
        data=dataclasses.replace(run.data, horizons=(*run.data.horizons, *longer), engine="auto"),
        section=dataclasses.replace(run.section, raw_logs=True, encoder_heads=4, recent_days=14, learned_mape=True),
        train=dataclasses.replace(
            run.train, steps=1200, ema=0.995, weight_decay=0.1, validate_every=300, validate_users=100_000
        ),
    )


def lumos_oulad() -> Run:
    """Clicks and submissions of students (OULAD): trained on 2013B and 2013J, tested on 2014B."""
    return Run(
        name="lumos_oulad",
        model="lumos",
        data=Data(
            source=Source("oulad", path="oulad"),
            behaviours=(
                Behaviour("active", "binary", "any(clicks > 0)"),
                Behaviour("submitted", "binary", "any(submitted > 0)"),
                Behaviour("clicks", "count", "sum(clicks)", gate="active"),
                Behaviour("sites", "count", "n_unique(site)", gate="active"),
                Behaviour("forum", "count", "sum(clicks * (activity_type == 'forumng'))", gate="active"),
                Behaviour("content", "count", "sum(clicks * (activity_type == 'oucontent'))", gate="active"),
                Behaviour("quiz", "count", "sum(clicks * (activity_type == 'quiz'))", gate="active"),
            ),
            horizons=(
                Horizon("active", "any", 7),
                Horizon("submitted", "any", 7),
                Horizon("clicks", "sum", 7),
                Horizon("active", "any", 28),
                Horizon("submitted", "any", 28),
                Horizon("clicks", "sum", 28),
            ),
            profiles=Profiles(
                registered="registered",
                ends="ends",
                segment="course",
                numbers=("num_of_prev_attempts", "studied_credits"),
                categories=(
                    "gender",
                    "region",
                    "highest_education",
                    "imd_band",
                    "age_band",
                    "disability",
                    "module",
                ),
                splits=("presentation",),
            ),
            calendar=Calendar(),
        ),
        split=Split(
            segment_column="presentation",
            train=Subset(from_day=100, until_day=225, segments=("2013B", "2013J")),
            validate=Subset(from_day=30, until_day=225, every_days=14, segments=("2013J",), users=(0.8, 1.0)),
            test=Subset(from_day=30, until_day=225, every_days=14, segments=("2014B",)),
            min_history_days=0,
        ),
        section=dataclasses.replace(lumos_complete_journey().section, cut_stride_days=14, calendar_days=28),
        train=Train(
            steps=1200,
            batch=64,
            learning_rate=3e-3,
            warmup_share=0.05,
            ema=0.99,
            validate_every=300,
            validate_users=600,
            checkpoint_every=300,
        ),
    )


def lumos_simulator() -> Run:
    """A planted world with a known oracle: three years of days, a yearly festival, matches, churn, a treatment.

    The treatment works in the last seven days, which no test cut reaches: `predict --cut 2024-12-25 --cohorts ...`.
    """
    options = {"users": 4000, "shards": 2, "seed": 7, "world": "signal", "treatment_odds": 1.5, "treatment_days": 7}
    return Run(
        name="lumos_simulator",
        model="lumos",
        data=Data(
            source=Source("simulator", options=options),
            behaviours=(
                Behaviour("active", "binary", "count()"),
                Behaviour("purchase", "binary", "any(kind == 'purchase')"),
                Behaviour("searched", "binary", "any(kind == 'search')"),
                Behaviour("amount", "continuous", "sum(amount)", resolution=0.01, gate="purchase"),
                Behaviour("events", "count", "count()", gate="active"),
                Behaviour("kinds", "count", "n_unique(kind)", gate="active"),
            ),
            horizons=(Horizon("active", "any", 7), Horizon("amount", "sum", 7)),
            profiles=Profiles(registered="registered", categories=("country", "age_group")),
            calendar=Calendar(),
        ),
        split=Split(
            validate_from="2024-07-15",
            train=Subset(from_day="2023-01-15"),
            validate=Subset(from_day="2024-07-15", until_day="2024-08-15", every_days=10),
            test=Subset(from_day="2024-09-01", until_day="2024-12-15", every_days=15),
        ),
        section=LumosConfig(
            history_days=378,
            future_days=7,
            width=64,
            heads=8,
            encoder_heads=4,
            encoder_layers=1,
            swiglu_width=128,
            embed_width=64,
            pad="unread",
            positions="lags",
            cuts_per_window=16,
            cut_stride_days=9,
            causal=True,
            lag_logits=True,
            day_match=True,
            raw_values=True,
            raw_logs=True,
            recent_days=14,
            continuous="lognormal",
        ),
        train=Train(
            steps=1000,
            batch=32,
            micro_batch=8,
            learning_rate=3e-3,
            warmup_share=0.05,
            ema=0.995,
            validate_every=200,
            validate_users=500,
            checkpoint_every=200,
            keep_best="eval/loss",
        ),
    )


def lumos_tiny() -> Run:
    """The simulator, tiny: for tests and for a first look at the machinery, not for quality."""
    run = lumos_simulator()
    return dataclasses.replace(
        run,
        name="lumos_tiny",
        data=dataclasses.replace(run.data, source=Source("simulator", options={"users": 200, "shards": 2, "seed": 7})),
        section=LumosConfig(
            history_days=28,
            future_days=7,
            width=16,
            heads=2,
            encoder_layers=1,
            swiglu_width=16,
            embed_width=8,
            continuous="lognormal",
        ),
        train=Train(steps=8, batch=32, micro_batch=32, validate_every=4, checkpoint_every=4, learning_rate=1e-3),
    )


def own_data() -> Data:
    """Tables of your own, to be edited."""
    return Data(
        events=Events(path="s3://bucket/events", user="user_id", time="event_time"),
        profiles=Profiles(path="s3://bucket/profiles", user="user_id", categories=("country",)),
        calendar=Calendar(path="s3://bucket/calendar", holidays="IN"),
        time_zone="Asia/Kolkata",
        behaviours=(
            Behaviour("active", "binary", "count()"),
            Behaviour("paid", "binary", "any(amount > 0)"),
            Behaviour("spend", "continuous", "sum(amount)", resolution=0.01, gate="paid"),
            Behaviour("events", "count", "count()", gate="active"),
        ),
        derived=(
            Derived("churned", "no active in the next 28 days"),
            Derived("reactivated", "active after 28 days without"),
        ),
        horizons=(Horizon("active", "any", 7), Horizon("spend", "sum", 7)),
    )


def lumos_paper() -> Run:
    """The paper's largest model (about 21 M parameters with 13 behaviours) on tables of your own."""
    return Run(
        name="lumos_paper",
        model="lumos",
        data=own_data(),
        split=Split(
            validate_from="2024-10-01",
            validate=Subset(from_day="2024-10-01", until_day="2024-10-29", every_days=7),
            test=Subset(from_day="2024-11-05", every_days=7),
        ),
        section=LumosConfig(),
        train=Train(
            steps=100_000,
            batch=4096,
            micro_batch=512,
            workers=8,
            learning_rate=3e-4,
            zero_stage=1,
            validate_every=2000,
            checkpoint_every=1000,
        ),
    )


def lumos_wide() -> Run:
    """`lumos_paper` with the usual SwiGLU width of 8/3 of the model's (about 30 M parameters)."""
    run = lumos_paper()
    return dataclasses.replace(run, name="lumos_wide", section=dataclasses.replace(run.section, swiglu_width=1365))
