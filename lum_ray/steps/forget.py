"""forget: take users out of every file under a run's root, keep them out, and prove it.

The order is what makes it safe. Tombstones come first: from then on nothing that is prepared or published holds them.
Then every artifact is rewritten: what a manifest names gets a new name, the manifest is replaced at once, and only then
is the old file deleted, so that whoever opens the artifact sees the one or the other; what is read by listing a folder
is replaced in place, at once. Raw tables come last, because rows are counted in them. A killed `forget` leaves files
that its next call finds like any other. Last, everything is read again.

What cannot be taken out of is a model: the checkpoints that were trained on her are listed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lum_ray import weights
from lum_ray.artifacts import MANIFEST, UserError, find, join, read_json, storage, write_json
from lum_ray.config import Run
from lum_ray.data.delta import LOG
from lum_ray.data.forgotten import FOLDER, tombstone
from lum_ray.data.raw import batches, raw_files
from lum_ray.steps.forget_files import in_place, named_files, prediction_rows, rewritten
from lum_ray.steps.forget_parts import NewFile, files_of, new_manifest, rewrite_file
from lum_ray.steps.prepare import Log, raw_tables, silent, source_uri
from lum_ray.steps.traces import Sought, Trace, files_below, look, theirs

LOCAL_CACHES = "lum_ray_state*"
"""Folders among this machine's temporary files in which published histories are kept."""
PARTS, NAMED = ("timelines", "sequences"), ("calendar", "state")
"""Folders of the artifacts whose manifests name files that hold users."""


@dataclass(frozen=True)
class Forgotten:
    """What `forget` did, and what it found when it read everything again."""

    scanned: int
    rewritten: int
    removed: int
    rows: int
    left: Mapping[str, Trace]
    """Files that still hold a user: the proof failed."""
    namesakes: Mapping[str, Trace]
    checkpoints: tuple[str, ...]
    """Those whose training data held a user, as long as they are not trained anew."""
    source_rows: int
    """Rows that the run's own tables still have of the users; they are not ours to change."""


def forget(run: Run, users: Sequence[str], log: Log = silent) -> Forgotten:
    """Take `users` out of every file under the root of `run`, now and for all that is prepared later, and prove it.

    Again is a no-op that proves it again. Call it while nothing else writes under the root, or once more afterwards.
    Raises UserError where no user is named, and for Delta tables below the root that hold them.
    """
    if not users or not all(users):
        raise UserError("forget: expected the IDs of users, such as `lum-ray forget my.yaml user-17`")
    work = _Work(run.root.rstrip("/"), Sought(tuple(dict.fromkeys(users))))
    traces = work.look()
    held = {uri: trace for uri, trace in traces.items() if trace}
    log(f"{len(traces):,} files, {len(held):,} of them hold what is to be forgotten")
    _refuse_delta_tables(traces, held)
    work.bury(held)
    counts = _raw_rows(run, work.sought)
    for uri in sorted(held, key=lambda uri: (uri.startswith(f"{work.root}/raw/"), uri)):
        work.clean(uri, held, counts)
    work.count_predictions()
    log("reading everything again")
    again = work.look()
    return Forgotten(
        scanned=len(again),
        rewritten=len(work.rewritten),
        removed=len(work.removed),
        rows=sum(trace.rows for trace in held.values()),
        left={uri: trace for uri, trace in again.items() if trace},
        namesakes={uri: trace for uri, trace in again.items() if trace.namesakes},
        checkpoints=work.trained_on(),
        source_rows=0 if counts is None or run.data.source is not None else sum(counts.rows),
    )


def _refuse_delta_tables(files: Iterable[str], held: Iterable[str]) -> None:
    """Raises UserError for Delta tables that hold the users: rewriting a file behind its log would break the table."""
    tables = {uri[: uri.index(f"/{LOG}/")] for uri in files if f"/{LOG}/" in uri}
    theirs_too = sorted(table for table in tables if any(uri.startswith(f"{table}/") for uri in held))
    if theirs_too:
        raise UserError(
            f"forget: {', '.join(theirs_too[:5])}: expected no Delta table that holds them below the root; delete "
            "their rows there (`DeltaTable(uri).delete(...)`, then `vacuum`, and drop the old log), or move the "
            "table out of the root, and run again; nothing was changed"
        )


@dataclass(frozen=True)
class _RawRows:
    """Rows of the users in the raw tables (events, profiles) with these fingerprints."""

    prints: Sequence[Any]
    rows: tuple[int, int]


def _raw_rows(run: Run, sought: Sought) -> _RawRows | None:
    """Counts the users' rows in the run's tables; None where these are not there (any more)."""
    data, counts = run.data, [0, 0]
    try:
        # a source's tables are not written only to be counted
        if data.source is not None and data.events.path is None and find(source_uri(run)[0]) is None:
            return None
        tables, prints = raw_tables(run)
        for place, (name, uri, column) in enumerate(
            [
                ("events", tables.events, data.events.user),
                ("profiles", tables.profiles, data.profiles.user if data.profiles else ""),
            ]
        ):
            for file in raw_files(uri, name) if uri else ():
                for batch, _ in batches(file.uri, [column], None, 0, 1 << 20, file.overlay):
                    counts[place] += int(theirs(batch.rename_columns(["user"]), sought).sum())
    except (UserError, FileNotFoundError):
        return None
    return _RawRows([prints.events, prints.profiles], (counts[0], counts[1]))


class _Work:
    """One call: whom it seeks under which root, and the files that it rewrote and removed."""

    def __init__(self, root: str, sought: Sought) -> None:
        self.root, self.sought = root, sought
        self.rewritten: set[str] = set()
        self.removed: set[str] = set()

    def look(self) -> dict[str, Trace]:
        """What every file holds: under the root, but for the tombstones, and in this machine's caches."""
        caches = glob.glob(os.path.join(tempfile.gettempdir(), LOCAL_CACHES))
        found = {}
        for uri in [uri for place in (self.root, *caches) for uri in files_below(place)]:
            if not uri.startswith(f"{self.root}/{FOLDER}/"):
                try:
                    found[uri] = look(uri, self.sought)
                except FileNotFoundError:
                    continue  # another step removed it meanwhile
        return found

    def bury(self, held: Iterable[str]) -> None:
        """Write the tombstones, and in them the checkpoints that were trained on an artifact that holds the users."""
        digests = {self._inside(uri)[1] for uri in held if len(self._inside(uri)) > 1}
        trained = {}
        for uri in files_below(join(self.root, "checkpoints")):
            if uri.endswith("/run.json"):
                record = read_json(uri)
                if {record.get("timelines"), record.get("sequences")} & digests:
                    trained[self._inside(uri)[1]] = _weights(uri.removesuffix("/run.json"))
        for place in self._tombstones():
            write_json(place, {"kind": "forgotten", "checkpoints": _trained(place) | trained})

    def trained_on(self) -> tuple[str, ...]:
        """The checkpoints of the tombstones, as far as their weights are still the same."""
        known = {name: print_of for place in self._tombstones() for name, print_of in _trained(place).items()}
        places = {join(self.root, "checkpoints", name): print_of for name, print_of in known.items()}
        return tuple(sorted(place for place, print_of in places.items() if _weights(place) == print_of))

    def _tombstones(self) -> Iterator[str]:
        return (tombstone(self.root, number) for number in self.sought.hashes)

    def _inside(self, uri: str) -> list[str]:
        """The parts of a file's path below the root; none outside of it."""
        return uri.removeprefix(f"{self.root}/").split("/") if uri.startswith(f"{self.root}/") else []

    def clean(self, uri: str, held: Mapping[str, Trace], counts: _RawRows | None) -> None:
        """Take the users out of a file that holds them, in the way of the artifact that it belongs to."""
        inside = self._inside(uri)
        if uri in self.removed or uri in self.rewritten:
            return
        if not inside or uri.endswith(".tmp"):
            self._remove(uri)
        elif "_work" in inside:  # of a job that was killed, or that runs: it begins anew, without them
            self._remove_folder(uri[: uri.index("/_work/")] + "/_work")
        elif inside[0] == "reports":  # `evaluate` makes it again
            self._remove_folder(join(self.root, *inside[:2]))
        elif inside[0] in PARTS and len(inside) > 2:
            self._clean_parts(inside[0], held, counts)
        elif inside[0] in NAMED and len(inside) > 2:
            self._clean_named(join(self.root, *inside[:2]), held)
        elif held[uri].held:
            self._replace(uri)

    def _clean_parts(self, kind: str, held: Mapping[str, Trace], counts: _RawRows | None) -> None:
        """All timelines, or all sequences: they may refer to each other's files."""
        folders = {join(self.root, kind, self._inside(uri)[1]) for uri in files_below(join(self.root, kind))}
        artifacts = {uri: found.manifest for uri in sorted(folders) if (found := find(uri)) is not None}
        for uri in sorted(folders - set(artifacts)):
            if any(place.startswith(f"{uri}/") for place in held):
                self._remove_folder(uri)
        made: dict[str, NewFile] = {}
        own, named = set[str](), set[str]()
        for uri, manifest in artifacts.items():
            for folder, entries, _ in files_of(uri, manifest):
                own.add(folder)
                for entry in entries:
                    old = join(folder, entry["name"])
                    if old in held and old not in made and (new := rewrite_file(folder, entry, self.sought)):
                        made[old] = new
        for uri, manifest in artifacts.items():
            known = counts is not None and _same_inputs(manifest, counts.prints)
            after = new_manifest(uri, manifest, made, self.sought, counts.rows if counts and known else None)
            if after is not None:
                write_json(join(uri, MANIFEST), after)
            for folder, entries, _ in files_of(uri, after or manifest):
                named |= {join(folder, entry["name"]) for entry in entries}
        for uri in artifacts:
            for place in files_below(uri):
                if place.rsplit("/", 1)[0] in own:
                    self._retire(place, named, set(made))
                elif place in held and held[place].held and place not in self.removed:
                    self._replace(place)

    def _clean_named(self, uri: str, held: Mapping[str, Trace]) -> None:
        artifact = find(uri)
        if artifact is None:
            self._remove_folder(uri)
            return
        after = rewritten(uri, artifact.manifest, self.sought)
        if after is not None:
            write_json(join(uri, MANIFEST), after)
        before = {join(uri, name) for name in named_files(artifact.manifest)}
        for place in files_below(uri):
            if place.rsplit("/", 1)[0] == uri:
                self._retire(place, {join(uri, name) for name in named_files(after or artifact.manifest)}, before)
            elif place in held and held[place].held:
                self._replace(place)

    def _retire(self, uri: str, named: set[str], before: set[str]) -> None:
        """Delete a file that no manifest names: replaced just now, or by a call that was killed before it came here."""
        if uri not in named and not uri.endswith(f"/{MANIFEST}"):
            self._delete(uri)
            (self.rewritten if uri in before else self.removed).add(uri)

    def count_predictions(self) -> None:
        """Bring the manifests of predictions in line with their files (a call that was killed did not come to it)."""
        files: dict[str, list[str]] = {}
        for uri in files_below(join(self.root, "predictions")):
            files.setdefault(self._inside(uri)[1], []).append(uri)
        for name, uris in files.items():
            artifact = find(join(self.root, "predictions", name))
            if artifact is not None and artifact.manifest.get("rows") not in (None, prediction_rows(uris)):
                write_json(join(artifact.uri, MANIFEST), {**artifact.manifest, "rows": prediction_rows(uris)})

    def _replace(self, uri: str) -> None:
        in_place(uri, self.sought)
        self.rewritten.add(uri)

    def _remove(self, uri: str) -> None:
        self._delete(uri)
        self.removed.add(uri)

    def _remove_folder(self, uri: str) -> None:
        """The manifest first: a folder without one is no artifact."""
        for place in sorted(files_below(uri), key=lambda place: not place.endswith(f"/{MANIFEST}")):
            self._remove(place)
        folder = storage(uri)
        with contextlib.suppress(FileNotFoundError):  # an object store has no empty folders
            folder.filesystem.delete_dir(folder.path)

    def _delete(self, uri: str) -> None:
        place = storage(uri)
        with contextlib.suppress(FileNotFoundError):
            place.filesystem.delete_file(place.path)


def _same_inputs(manifest: Mapping[str, Any], prints: Sequence[Any]) -> bool:
    inputs = manifest.get("inputs")
    return isinstance(inputs, dict) and json.dumps([inputs.get("events"), inputs.get("profiles")]) == json.dumps(prints)


def _trained(place: str) -> dict[str, str]:
    try:
        return dict(read_json(place)["checkpoints"])
    except FileNotFoundError:
        return {}


def _weights(checkpoint: str) -> str | None:
    """The fingerprint of a checkpoint's weights, None where it has none."""
    try:
        return weights.fingerprint(checkpoint)
    except UserError:
        return None
