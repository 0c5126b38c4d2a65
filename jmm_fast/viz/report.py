"""One HTML file that tells what a run did: no script, font or picture comes from outside it."""

import shlex
import statistics
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path

import numpy as np

from jmm_fast.data.store import ClipStore
from jmm_fast.errors import UserError
from jmm_fast.files import atomic_write_text
from jmm_fast.viz import figures, page, player, style
from jmm_fast.viz.clips import MaskedClip, masked_clip_of_run, typical_clips
from jmm_fast.viz.page import facts, section
from jmm_fast.viz.records import (
    Predictions,
    read_config,
    read_environment,
    read_evaluations,
    read_predictions,
    read_training,
    run_folder,
)

PLAYED_CLIPS = 6
DRAWN_CLIPS = 2

# Columns of the evaluation table, in the order of their interest.
_ENCODERS = ("pretrained", "untrained", "scratch", "raw")
_PROTOCOLS = {"linear": "linear probe", "knn": "nearest neighbours", "finetune": "finetuned"}


def write_report(run: str | Path, out: str | Path | None = None, store: str | Path | None = None) -> Path:
    """Write the report of a run as one self-contained HTML file, and its figures under ``RUN/figures``.

    Args:
        run: folder that ``jmm-fast pretrain --out`` wrote; evaluations found in it are shown too.
        out: file to write; default ``RUN/report.html``.
        store: clip store for the masked clips; default the one that the run was trained on, where it still lies there.

    Returns:
        The file written.

    Raises:
        UserError: ``run`` is no run folder or holds damaged files, ``store`` cannot be used, nothing can be written,
            or matplotlib is missing. What a run does not have yet is no error: the report says which command makes it.
    """
    style.require_matplotlib()
    run = run_folder(run)
    out = Path(out) if out is not None else run / "report.html"
    config, environment = read_config(run), read_environment(run)
    evaluations = read_evaluations(run)
    clips_store = _open_store(store, environment)
    sections = [
        _what_was_run(run, config, environment, clips_store),
        _training(run, config),
        _evaluation(run, evaluations, environment),
        _classes(run),
        *_clips(run, config, clips_store),
    ]
    title = f"{config.get('recipe', 'run')} · {run.resolve().name}"
    atomic_write_text(out, page.page("jmm_fast run report", title, _lead(config, evaluations, clips_store), sections))
    return out


def _open_store(store: str | Path | None, environment: dict) -> ClipStore | None:
    if store is not None:
        return ClipStore.open(store, check_values=False)
    data = environment.get("data")
    path = data.get("path") if isinstance(data, dict) else None
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    found = ClipStore.open(path, check_values=False)
    # The file may have been prepared anew since; other clips would illustrate another run.
    return found if found.fingerprint == data.get("fingerprint") else None


def _lead(config: dict, evaluations: Sequence[dict], store: ClipStore | None) -> str:
    """What stands under the title: the network, the data, and what the probe found."""
    model, mask = config.get("model") or {}, config.get("mask") or {}
    sentences = []
    if model and mask:
        sentences.append(
            f"A transformer of {model.get('depth')} blocks, {model.get('dim')} wide, that learned to predict the "
            f"motion of the {100 * mask.get('mask_ratio', 0):.0f} % of joint tokens hidden from it."
        )
    if store is not None:
        joints = f"{store.skeleton.name} joints"
        sentences.append(f"The set holds {store.num_clips:,} clips of {store.num_classes} classes ({joints}).")
    split = (config.get("data") or {}).get("split")
    found: dict[str, list[float]] = {}
    for record in _latest(evaluations):
        if record.get("protocol") == "linear" and record.get("split") == split:
            found.setdefault(_encoder(record), []).append(float(record["top1"]))
    if {"pretrained", "untrained"} <= found.keys():
        pretrained, untrained = (statistics.fmean(found[name]) for name in ("pretrained", "untrained"))
        gain = pretrained - untrained
        sentences.append(
            f"A linear probe on its features recognises {pretrained:.1f} % of the test clips, {abs(gain):.1f} points "
            f"{'more' if gain >= 0 else 'fewer'} than on those of the same network untrained."
        )
    return " ".join(sentences)


def _what_was_run(run: Path, config: dict, environment: dict, store: ClipStore | None) -> str:
    rows: list[tuple[str, str]] = []
    model, mask, data, loss = (config.get(name) or {} for name in ("model", "mask", "data", "loss"))
    if config:
        rows.append(("Recipe", f"{config.get('recipe', 'unnamed')}, seed {config.get('seed')}, {config.get('dtype')}"))
        rows.append(
            (
                "Model",
                f"encoder {model.get('depth')} × {model.get('dim')} ({model.get('heads')} heads), decoder "
                f"{model.get('decoder_depth')} × {model.get('decoder_dim')}, topology {model.get('topology')}, "
                f"{model.get('num_frames')} frames × {model.get('num_joints')} joints in tokens of "
                f"{model.get('t_patch')} frames",
            )
        )
        gate = "" if mask.get("gate") is None else f", gate {mask['gate']}"
        rows.append(
            (
                "Mask",
                f"{mask.get('variant')} score, ratio {mask.get('mask_ratio')}, temperature {mask.get('tau')}{gate}",
            )
        )
        rows.append(
            (
                "Training",
                f"{_count(config.get('epochs'), 'epoch')} in batches of {data.get('batch_size')} clips, "
                f"{data.get('modality')} modality, target stride {loss.get('stride')}",
            )
        )
        rows.append(("Split", _split_words(data.get("split"), store)))
    recorded = environment.get("data") or {}
    if recorded:
        rows.append(("Data", f"{recorded.get('path')}, {recorded.get('clips')} clips"))
        rows.append(("Data hash", str(recorded.get("fingerprint"))))
    elif store is not None:
        rows.append(("Data", f"{store.path}, {store.num_clips} clips"))
    if environment:
        versions = environment.get("versions") or {}
        rows.append(("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
        device = environment.get("device")
        where = environment.get("cpu") if device == "cpu" else device
        rows.append(
            ("Device", f"{where}, {_count(environment.get('threads'), 'thread')}" if device == "cpu" else str(where))
        )
        rows.append(("Commit", str(environment.get("commit") or "not a git checkout")))
        launches = [*(environment.get("earlier") or []), environment]
        times = [str(item["time"]) for item in launches if item.get("time")]
        if times:
            resumed = (
                f", resumed {_count(len(times) - 1, 'time')}, last {_clock_time(times[-1])}" if len(times) > 1 else ""
            )
            rows.append(("Started", _clock_time(times[0]) + resumed))
    seconds = _training_seconds(run)
    if seconds is not None:
        rows.append(("Training time", _duration(seconds)))
    body = facts(rows)
    command = environment.get("command")
    if command:
        body += f"<pre>{escape(_command_line(command))}</pre>"
    if not rows:
        body = _missing("This folder holds no settings.", "jmm-fast pretrain RECIPE --data FILE --out RUN")
    return section("What was run", body)


def _command_line(command: object) -> str:
    if not isinstance(command, list) or not command:
        return str(command)
    # Where the program lies says nothing about the run.
    name = Path(str(command[0])).name
    return shlex.join(["jmm-fast" if name == "__main__.py" else name, *map(str, command[1:])])


def _split_words(name: str | None, store: ClipStore | None) -> str:
    words = name or "the only one stored"
    if store is None:
        return words
    try:
        split = store.split(name)
    except UserError:  # a store given by hand may be another one than the run's
        return words
    return f"{words} ({len(split.train):,} training clips, {len(split.test):,} test clips)"


def _training(run: Path, config: dict) -> str:
    if not (run / "metrics.jsonl").exists():
        return section(
            "Pretraining", _missing("There is no training log yet.", f"jmm-fast pretrain RECIPE --out {run}")
        )
    log = read_training(run)
    normalized = (config.get("loss") or {}).get("normalize")
    finite = log["loss"][np.isfinite(log["loss"])]
    drawn = _figure(figures.loss_curve(run), run, "loss")
    words = (
        f"Mean squared error between the predicted and the true motion of the masked tokens: from {finite[0]:.3f} at "
        f"the first logged step to {finite[-1]:.3f} at epoch {log['epoch'][-1]:.4g} ({log['step'][-1]:,} steps)."
        + (" The targets are normalised: always predicting zero would give about 1." if normalized else "")
        if len(finite)
        else "No logged loss is finite."
    )
    return section("Pretraining", f"<p>{escape(words)}</p>{drawn}")


def _evaluation(run: Path, evaluations: Sequence[dict], environment: dict) -> str:
    records = _latest(evaluations)
    data = (environment.get("data") or {}).get("path") or "FILE"
    if not records:
        return section("Evaluation", _missing("Nothing was evaluated yet.", f"jmm-fast probe {run} --data {data}"))
    encoders = [name for name in _ENCODERS if any(_encoder(record) == name for record in records)]
    encoders += sorted({_encoder(record) for record in records} - set(encoders))
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        key = (
            str(record.get("protocol")),
            str(record.get("split") or ""),
            float(record.get("labels") or 1.0),
            int(record.get("augment_views") or 0),
            str(record.get("modality") or "joint"),
        )
        groups.setdefault(key, []).append(record)
    order = [*_PROTOCOLS]
    rows = []
    for protocol, split, labels, views, modality in sorted(
        groups, key=lambda key: (order.index(key[0]) if key[0] in order else len(order), *key[:2], -key[2], *key[3:])
    ):
        group = groups[protocol, split, labels, views, modality]
        name = escape(_PROTOCOLS.get(protocol, protocol))
        if labels != 1.0:
            name += f", {100 * labels:g} % of the labels"
        if views:
            name += f", {views} random view{'s' * (views > 1)} of each training clip"
        if modality != "joint":
            name += f", {modality.replace('_', ' ')}"
        cells = []
        values = {encoder: [record for record in group if _encoder(record) == encoder] for encoder in encoders}
        means = [statistics.fmean(float(item["top1"]) for item in items) for items in values.values() if items]
        best = max(means) if len(means) > 1 else None
        for encoder in encoders:
            cells.append(_score_cell(values[encoder], best))
        details = sorted({_details(record) for record in group})
        rows.append(
            f'<tr><th scope="row">{name}<span class="sub">{escape(split)}</span></th>{"".join(cells)}'
            f'<td class="small">{"<br>".join(escape(item) for item in details)}</td></tr>'
        )
    head = "".join(f'<th scope="col" class="number">{escape(_encoder_title(name))}</th>' for name in encoders)
    table = (
        '<div class="wide"><table><thead><tr><th scope="col">protocol</th>'
        f'{head}<th scope="col">how</th></tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    words = (
        "<p>Top-1 accuracy in per cent on the test clips of the split, top-5 in small figures; bold is the best of a "
        "row. <em>Pretrained</em> is this run's encoder. <em>Untrained</em> is the same network with its first, random "
        "weights: what the architecture gives without learning. <em>From scratch</em> is that network trained on the "
        "labels alone, and <em>raw poses</em> compares the joint positions themselves, without a network.</p>"
    )
    done = {(str(record.get("protocol")), _encoder(record)) for record in records}
    hints = []
    for protocol, command, baseline in (
        ("linear", "probe", "untrained"),
        ("knn", "knn", "untrained"),
        ("finetune", "finetune", "scratch"),
    ):
        call = f"jmm-fast {command} {run} --data {data}"
        if (protocol, "pretrained") not in done:
            hints.append(_missing(f"Not evaluated: {_PROTOCOLS[protocol]}.", call))
        elif (protocol, baseline) not in done:
            what = f"Nothing to compare with: {_PROTOCOLS[protocol]}, {_encoder_title(baseline)}."
            hints.append(_missing(what, f"{call} --encoder {baseline}"))
    return section("Evaluation", words + table + "".join(hints))


def _encoder(record: dict) -> str:
    """Encoder of a record; finetuning with few labels adds their share to the name, which has a field of its own."""
    return str(record.get("encoder") or "pretrained").partition("-labels")[0]


def _encoder_title(name: str) -> str:
    return {"scratch": "from scratch", "raw": "raw poses"}.get(name, name)


def _details(record: dict) -> str:
    parts = []
    if record.get("epochs"):
        parts.append(_count(record["epochs"], "epoch"))
    if record.get("k"):
        parts.append(f"k = {record['k']}")
    if record.get("seconds") is not None:
        parts.append(_duration(float(record["seconds"])))
    return _encoder_title(_encoder(record)) + ": " + ", ".join(parts) if parts else ""


def _score_cell(records: Sequence[dict], best: float | None) -> str:
    if not records:
        return '<td class="number none">–</td>'
    values = [float(record["top1"]) for record in records]
    mean = statistics.fmean(values)
    text = f"{mean:.1f}"
    if best is not None and mean >= best - 1e-9:
        text = f"<strong>{text}</strong>"
    if len(values) > 1:
        text += f' <span class="sub">± {statistics.stdev(values):.1f}, {len(values)} seeds</span>'
    top5 = [float(record["top5"]) for record in records if record.get("top5") is not None]
    if top5:
        text += f'<span class="sub">{statistics.fmean(top5):.1f}</span>'
    return f'<td class="number">{text}</td>'


def _latest(evaluations: Iterable[dict]) -> list[dict]:
    """The last record of each protocol, encoder, split, share of labels, seed and modality: what is run again replaces
    what was there."""
    latest: dict[tuple, dict] = {}
    for record in evaluations:
        if isinstance(record.get("top1"), int | float):
            names = ("protocol", "encoder", "split", "labels", "seed", "k", "augment_views")
            key = (*(str(record.get(name)) for name in names), record.get("modality") or "joint")
            latest.pop(key, None)
            latest[key] = record
    return list(latest.values())


def _classes(run: Path) -> str:
    found = {path.stem: read_predictions(path) for path in sorted((run / "predictions").glob("*.npz"))}
    if not found:
        hint = _missing("No predictions are kept here yet.", f"jmm-fast probe {run} --data FILE")
        return section("Which classes it knows", hint)
    preferred = [name for protocol in _PROTOCOLS for name in found if name == f"{protocol}-pretrained"]
    main = (preferred or list(found))[0]
    data = found[main]
    drawn = _figure(
        figures.confusion_matrix(data, title=f"Confusion matrix: {_title_of(main)}"), run, f"confusion-{main}"
    )
    body = f"<p>{escape(_confusion_words(data))}</p>{drawn}"
    protocol = main.partition("-")[0]
    companions = {main: data} | {
        name: other
        for name, other in found.items()
        if name.partition("-")[0] == protocol and other.class_names == data.class_names
    }
    shown = {_title_of(name): item for name, item in list(companions.items())[:3]}
    body += _figure(figures.class_accuracy(shown), run, "classes")
    body += _confusions(data)
    return section("Which classes it knows", body)


def _title_of(stem: str) -> str:
    protocol, _, encoder = stem.partition("-")
    return f"{_PROTOCOLS.get(protocol, protocol)}, {_encoder_title(encoder)}" if encoder else stem


def _confusion_words(data: Predictions) -> str:
    accuracy = data.class_accuracy
    best, worst = int(np.nanargmax(accuracy)), int(np.nanargmin(accuracy))
    return (
        f"Best recognised: {data.class_names[best]} ({100 * accuracy[best]:.0f} %). "
        f"Least: {data.class_names[worst]} ({100 * accuracy[worst]:.0f} %)."
    )


def _confusions(data: Predictions, most: int = 5) -> str:
    counts = data.counts
    support = counts.sum(axis=1)
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    rows = []
    for true, predicted in zip(*np.unravel_index(order, off.shape), strict=True):
        if off[true, predicted]:
            rows.append(
                f"<tr><td>{escape(data.class_names[true])}</td><td>{escape(data.class_names[predicted])}</td>"
                f'<td class="number">{off[true, predicted]} of {support[true]}</td></tr>'
            )
    if not rows:
        return "<p>No test clip was taken for another class.</p>"
    return (
        '<h3>Most frequent mistakes</h3><div class="wide"><table><thead><tr><th scope="col">true class</th>'
        '<th scope="col">taken for</th><th scope="col" class="number">test clips</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _clips(run: Path, config: dict, store: ClipStore | None) -> list[str]:
    if not config:
        return []
    if store is None:
        hint = "The clips this run was trained on do not lie where they did."
        return [section("What the mask hides", _missing(hint, f"jmm-fast report {run} --data FILE"))]
    clips = [masked_clip_of_run(run, store, clip) for clip in typical_clips(store, PLAYED_CLIPS)]
    first = clips[0]
    tokens = first.mask.shape[1]
    masked = int(first.mask[0].sum())
    variant = (config.get("mask") or {}).get("variant")
    words = (
        f"<p>A clip is cut into {tokens} tokens, each one joint over {first.t_patch} frames. Before the network sees "
        f"it, {masked} of them are hidden, and it has to predict how those joints move. {_MASK_WORDS.get(variant, '')} "
        "Red tokens had more weight in the draw than the average one, blue ones less; framed cells and ringed joints "
        f"are the {tokens - masked} tokens that stayed visible to the encoder. The weights only tilt the draw: where "
        "most tokens are hidden, still joints are hidden often as well, and some moving ones stay.</p>"
    )
    drawn = "".join(_clip_figure(clip, run) for clip in clips[:DRAWN_CLIPS])
    shown = (
        "<p>Clips in motion, at their own speed, with the mask of the run's first epoch. The strip below holds one row "
        "per joint; click into it to jump there.</p>"
        f"{player.player(clips)}"
    )
    return [section("What the mask hides", words + drawn), section("Clips to turn around", shown)]


def _clip_figure(clip: MaskedClip, run: Path) -> str:
    tokens, masked = clip.mask.shape[1], int(clip.mask[0].sum())
    note = f"{clip.name}: {masked} of {tokens} tokens masked"
    if len(clip.poses) > 1:
        note += f"; body 1 of {len(clip.poses)}"
    drawn = figures.masked_clip(
        clip.poses[0],
        clip.probability[0],
        clip.mask[0],
        t_patch=clip.t_patch,
        skeleton=clip.skeleton,
        title=clip.class_name,
        note=note,
        seconds=clip.seconds,
    )
    return _figure(drawn, run, f"clip-{clip.index}")


def _figure(drawn, run: Path, name: str) -> str:
    """Save as PNG under ``RUN/figures`` and give the markup of the inlined drawing."""
    safe = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in name)
    style.save(drawn, run / "figures" / f"{safe}.png")
    return page.figure(drawn)


def _training_seconds(run: Path) -> float | None:
    if not (run / "metrics.jsonl").exists():
        return None
    times = read_training(run)["time"]
    return float(times[-1]) if np.isfinite(times[-1]) else None


def _count(number: object, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _clock_time(text: str) -> str:
    try:
        return datetime.fromisoformat(text).strftime("%-d %B %Y, %H:%M %Z").strip()
    except ValueError:
        return text


def _missing(what: str, command: str) -> str:
    return f'<p class="missing">{escape(what)} To get it: <code>{escape(command)}</code></p>'


_MASK_WORDS = {
    "released": "The draw prefers joints that move much from one token to the next.",
    "mamp": "The draw prefers joints that move much from one token to the next.",
    "paper": (
        "A token's weight grows with how far its joint moved since the token before and with how well its coordinates "
        "correlate with that token's; the correlation is close to one for most tokens, and where it is lost the weight "
        "drops."
    ),
}
