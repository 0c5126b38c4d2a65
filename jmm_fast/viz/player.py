"""A skeleton player for a page: data as JSON, drawn on a canvas by a few lines of JavaScript without any library."""

import base64
import json
from collections.abc import Sequence

import numpy as np

from jmm_fast.viz import style
from jmm_fast.viz.clips import MaskedClip, PlayedClip
from jmm_fast.viz.figures import limb_order, view_yaw


def player(clips: Sequence[PlayedClip]) -> str:
    """Markup and script that play ``clips``; one player a page. Masked clips show their weights and masks too."""
    data = f'<script type="application/json" id="player-data">{player_data(clips)}</script>'
    return f"{MARKUP}{data}<script>{SCRIPT}</script>"


def player_data(clips: Sequence[PlayedClip]) -> str:
    """JSON for :data:`SCRIPT`, safe inside a ``<script>`` element.

    Poses become int16 steps of a clip's largest coordinate / 32767 (well below a millimetre for a room), weights uint8
    on the colour scale of :func:`jmm_fast.viz.style.weight_range`.
    """
    return json.dumps([_clip(clip) for clip in clips], separators=(",", ":")).replace("<", "\\u003c")


def _clip(clip: PlayedClip) -> dict:
    frames, joints = clip.poses.shape[1:3]
    unit = max(float(np.abs(clip.poses).max()), 1e-6) / 32767
    bodies = [{"poses": _base64(np.round(poses / unit).astype("<i2"))} for poses in clip.poses]
    if clip.seen is not None:
        for body, seen in zip(bodies, clip.seen, strict=True):
            body["seen"] = _base64(seen.astype(np.uint8))
    mask = {}
    if isinstance(clip, MaskedClip):
        weight = clip.probability * clip.probability.shape[1]
        factor = style.weight_range(weight)
        mask = {"patch": clip.t_patch, "factor": factor}
        for body, held in enumerate(bodies):
            place = style.weight_position(weight[body], factor)
            held["weight"] = _base64(np.round(place * 255).astype(np.uint8))
            held["hidden"] = _base64(clip.mask[body].astype(np.uint8))
    return {
        "title": clip.class_name,
        "name": clip.name,
        "seconds": clip.seconds,
        "frames": frames,
        "joints": joints,
        "bones": clip.skeleton.bones,
        "names": [name.replace("_", " ") for name in clip.skeleton.joint_names],
        "rows": limb_order(clip.skeleton),
        # All bodies side by side as joints: people who do something together are then seen apart.
        "yaw": view_yaw(np.concatenate(list(clip.poses), axis=1).astype(np.float64), clip.skeleton),
        "unit": unit,
        "bodies": bodies,
        **mask,
    }


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


STYLE = """
.player { border-top: 1px solid var(--hairline); padding-top: .8rem; }
.player canvas { display: block; width: 100%; touch-action: pan-y; }
.player canvas[hidden] { display: none; }
.player .stage { cursor: grab; outline-offset: 2px; }
.player .stage:active { cursor: grabbing; }
.player .grid { cursor: crosshair; margin-top: .4rem; }
.player .bar { display: flex; gap: .8rem; align-items: center; margin: .5rem 0; }
.player .bar input { flex: 1; accent-color: var(--blue); min-width: 6rem; }
.player button { font: .86rem/1.4 var(--sans); color: var(--ink); background: none; border: 1px solid var(--hairline);
  border-radius: 3px; padding: .25rem .7rem; cursor: pointer; }
.player button[aria-pressed="true"] { border-color: var(--ink); }
.player .choose { display: flex; flex-wrap: wrap; gap: .4rem; margin-bottom: .4rem; }
.player .play { min-width: 4.6rem; }
.player .clock { font: .86rem/1.4 var(--sans); font-variant-numeric: tabular-nums; color: var(--muted);
  white-space: nowrap; }
.player .said { color: var(--muted); font: .86rem/1.4 var(--sans); min-height: 1.3em; margin: .3rem 0 0; }
"""

MARKUP = """
<div class="player" id="player">
  <div class="choose" role="group" aria-label="clip"></div>
  <canvas class="stage" tabindex="0" aria-label="moving skeleton: drag or use the arrow keys to turn it"></canvas>
  <div class="bar"><button class="play" type="button">Play</button>
    <input type="range" min="0" step="1" value="0" aria-label="time"><span class="clock"></span></div>
  <canvas class="grid" aria-label="masking weight of each joint over time"></canvas>
  <p class="said">Drag to turn, double-click to turn back, point at a joint to read it.</p>
</div>
"""

SCRIPT = (
    """
(() => {
  const stops = """
    + json.dumps([[int(stop[i : i + 2], 16) for i in (1, 3, 5)] for stop in style.WEIGHT_STOPS])
    + """;
  const color = w => {
    const x = Math.max(0, Math.min(1, w / 255)) * (stops.length - 1), i = Math.min(stops.length - 2, Math.floor(x));
    return "rgb(" + stops[i].map((a, k) => Math.round(a + (stops[i + 1][k] - a) * (x - i))).join() + ")";
  };
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const clips = JSON.parse(document.getElementById("player-data").textContent);
  for (const clip of clips) for (const body of clip.bodies) {
    body.poses = new Int16Array(bytes(body.poses).buffer);
    if (body.seen) body.seen = bytes(body.seen);
    if (clip.patch) { body.weight = bytes(body.weight); body.hidden = bytes(body.hidden); }
  }
  const root = document.getElementById("player");
  const [stage, grid] = root.querySelectorAll("canvas");
  const play = root.querySelector(".play"), slider = root.querySelector("input");
  const clock = root.querySelector(".clock"), said = root.querySelector(".said");
  const hint = said.textContent;
  const still = matchMedia("(prefers-reduced-motion: reduce)");
  let clip, frame = 0, yaw, pitch, playing = false, last = 0, places = [], low, centre, radius, cells, dot;

  const ink = name => getComputedStyle(root).getPropertyValue(name).trim();
  const fit = (canvas, height) => {
    const ratio = devicePixelRatio || 1, width = canvas.clientWidth;
    canvas.style.height = height + "px";
    canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d"); pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    return [pen, width, height];
  };
  const token = (f, v) => Math.floor(f / clip.patch) * clip.joints + v;
  const size = () => Math.min(420, Math.max(260, stage.clientWidth * .45));

  function choose(index) {
    clip = clips[index]; frame = 0; yaw = clip.yaw; pitch = .12;
    root.querySelectorAll(".choose button").forEach((b, i) => b.setAttribute("aria-pressed", i === index));
    slider.max = clip.frames - 1;
    const span = [[1e9, -1e9], [1e9, -1e9], [1e9, -1e9]];
    for (const body of clip.bodies) body.poses.forEach((p, i) => {
      if (body.seen && !body.seen[Math.floor(i / 3)]) return;
      const s = span[i % 3]; s[0] = Math.min(s[0], p * clip.unit); s[1] = Math.max(s[1], p * clip.unit);
    });
    centre = span.map(s => (s[0] + s[1]) / 2); low = span[1][0];
    const wide = Math.hypot(span[0][1] - span[0][0], span[2][1] - span[2][0]);
    radius = {up: span[1][1] - low || 1, wide: wide || 1};
    drawGrid(); draw();
  }

  function camera(width, height) {
    const tilt = Math.abs(Math.sin(pitch));
    const tall = radius.up * Math.cos(pitch) + (.75 * radius.wide + .6) * tilt;
    const scale = Math.min(height * .86 / tall, width * .9 / radius.wide);
    const c = Math.cos(yaw), s = Math.sin(yaw), cp = Math.cos(pitch), sp = Math.sin(pitch);
    dot = Math.max(3.2, Math.min(4.8, scale * .024));
    return (x, y, z) => {
      x -= centre[0]; y -= centre[1]; z -= centre[2];
      const across = c * x + s * z, depth = -s * x + c * z;
      return [width / 2 + scale * across, height * .5 - scale * (cp * y - sp * depth), depth * cp + y * sp];
    };
  }

  function draw() {
    const [pen, width, height] = fit(stage, size());
    const see = camera(width, height);
    pen.lineCap = "round";
    pen.strokeStyle = ink("--hairline"); pen.lineWidth = 1;
    const reach = Math.max(.5, Math.ceil(radius.wide) / 2 + .25);
    const lines = [];
    for (let a = -reach; a <= reach + 1e-6; a += .5) lines.push([-reach, a, reach, a], [a, -reach, a, reach]);
    if (lines.length <= 120) for (const [x0, z0, x1, z1] of lines) {
      const p = see(centre[0] + x0, low, centre[2] + z0), q = see(centre[0] + x1, low, centre[2] + z1);
      pen.beginPath(); pen.moveTo(p[0], p[1]); pen.lineTo(q[0], q[1]); pen.stroke();
    }
    const bone = ink("--bone"), paper = ink("--paper"), dark = ink("--ink"), things = [];
    places = [];
    clip.bodies.forEach((body, which) => {
      const at = [];
      for (let v = 0; v < clip.joints; v++) {
        const o = (frame * clip.joints + v) * 3, p = body.poses;
        at.push(see(p[o] * clip.unit, p[o + 1] * clip.unit, p[o + 2] * clip.unit));
        if (body.seen && !body.seen[frame * clip.joints + v]) { at[v] = null; continue; }
        things.push([at[v][2] + .06, "joint", at[v], body, v]);
        places.push([at[v][0], at[v][1], which, v]);
      }
      for (const [a, b] of clip.bones) if (at[a] && at[b])
        things.push([(at[a][2] + at[b][2]) / 2, "bone", at[a], at[b]]);
    });
    things.sort((a, b) => a[0] - b[0]);
    for (const thing of things) {
      pen.beginPath();
      if (thing[1] === "bone") {
        pen.strokeStyle = bone; pen.lineWidth = dot * .65;
        pen.moveTo(thing[2][0], thing[2][1]); pen.lineTo(thing[3][0], thing[3][1]); pen.stroke();
      } else {
        const [, , [x, y], body, v] = thing, l = token(frame, v);
        pen.arc(x, y, dot, 0, 7);
        pen.fillStyle = clip.patch ? color(body.weight[l]) : dark; pen.fill();
        pen.strokeStyle = paper; pen.lineWidth = 1; pen.stroke();
        if (!clip.patch || body.hidden[l]) continue;
        pen.beginPath(); pen.arc(x, y, dot + 3.2, 0, 7); pen.strokeStyle = dark; pen.lineWidth = 1.8; pen.stroke();
      }
    }
    slider.value = frame;
    clock.textContent = (frame / clip.frames * clip.seconds).toFixed(1) + " of " + clip.seconds.toFixed(1) + " s";
    if (!clip.patch) return;
    const [top, wide, high] = [grid.getContext("2d"), grid.clientWidth, grid.clientHeight];
    top.clearRect(0, 0, wide, high); top.drawImage(cells, 0, 0, wide, high);
    top.fillStyle = "#000"; top.fillRect((frame + .5) / clip.frames * wide - 1, 0, 2, high);
  }

  function drawGrid() {
    grid.hidden = !clip.patch;
    if (!clip.patch) return;
    const steps = clip.frames / clip.patch, gap = 10, one = clip.joints * 6;
    const [pen, width, height] = fit(grid, one * clip.bodies.length + gap * (clip.bodies.length - 1));
    clip.bodies.forEach((body, which) => clip.rows.forEach((v, row) => {
      for (let t = 0; t < steps; t++) {
        const l = t * clip.joints + v, x = t / steps * width, y = which * (one + gap) + row * 6;
        pen.fillStyle = color(body.weight[l]); pen.fillRect(x, y, width / steps + .6, 6.5);
      }
    }));
    pen.strokeStyle = "#000"; pen.lineWidth = 1.2;
    clip.bodies.forEach((body, which) => clip.rows.forEach((v, row) => {
      for (let t = 0; t < steps; t++) if (!body.hidden[t * clip.joints + v])
        pen.strokeRect(t / steps * width + 1, which * (one + gap) + row * 6 + 1, width / steps - 2, 4);
    }));
    cells = document.createElement("canvas"); cells.width = grid.width; cells.height = grid.height;
    cells.getContext("2d").drawImage(grid, 0, 0);
  }

  const tell = (which, t, v) => {
    said.textContent = (clip.bodies.length > 1 ? "body " + (which + 1) + ", " : "") + clip.names[v];
    if (!clip.patch) return;
    const body = clip.bodies[which], l = t * clip.joints + v;
    const weight = clip.factor ** (body.weight[l] / 127.5 - 1);
    const seconds = (t * clip.patch / clip.frames * clip.seconds).toFixed(1);
    said.textContent += ", " + seconds + " s: weight " + weight.toFixed(2) + " × average, " +
      (body.hidden[l] ? "masked" : "visible to the encoder");
  };

  function tick(now) {
    if (!playing) return;
    frame = (frame + (now - last) / 1000 / clip.seconds * clip.frames) % clip.frames; last = now;
    const exact = frame; frame = Math.floor(frame); draw(); frame = exact;
    requestAnimationFrame(tick);
  }
  function run(on) {
    playing = on; play.textContent = on ? "Pause" : "Play"; frame = Math.floor(frame);
    if (on) { last = performance.now(); requestAnimationFrame(tick); } else draw();
  }

  clips.forEach((item, index) => {
    const button = document.createElement("button");
    button.type = "button"; button.textContent = item.title; button.title = item.name;
    button.onclick = () => { choose(index); };
    root.querySelector(".choose").append(button);
  });
  play.onclick = () => run(!playing);
  slider.oninput = () => { const wanted = +slider.value; run(false); frame = wanted; draw(); };
  let drag = null;
  stage.onpointerdown = e => { drag = [e.clientX, e.clientY, yaw, pitch]; stage.setPointerCapture(e.pointerId); };
  stage.onpointerup = stage.onpointercancel = () => { drag = null; };
  stage.onpointermove = e => {
    if (drag) {
      yaw = drag[2] + (e.clientX - drag[0]) / 120;
      pitch = Math.max(-1.5, Math.min(1.5, drag[3] + (e.clientY - drag[1]) / 160));
      if (!playing) draw();
      return;
    }
    const box = stage.getBoundingClientRect(), x = e.clientX - box.left, y = e.clientY - box.top;
    const near = places.map(p => [Math.hypot(p[0] - x, p[1] - y), p]).sort((a, b) => a[0] - b[0])[0];
    if (near && near[0] < 14) tell(near[1][2], Math.floor(Math.floor(frame) / clip.patch), near[1][3]);
    else said.textContent = hint;
  };
  stage.ondblclick = () => { yaw = clip.yaw; pitch = .12; if (!playing) draw(); };
  stage.onkeydown = e => {
    const turn = {ArrowLeft: [-.1, 0], ArrowRight: [.1, 0], ArrowUp: [0, -.1], ArrowDown: [0, .1]}[e.key];
    if (e.key === " ") run(!playing);
    else if (turn) { yaw += turn[0]; pitch = Math.max(-1.5, Math.min(1.5, pitch + turn[1])); if (!playing) draw(); }
    else return;
    e.preventDefault();
  };
  const cell = e => {
    const box = grid.getBoundingClientRect(), steps = clip.frames / clip.patch, one = clip.joints * 6;
    const y = e.clientY - box.top, which = Math.min(clip.bodies.length - 1, Math.floor(y / (one + 10)));
    const row = Math.min(clip.joints - 1, Math.max(0, Math.floor((y - which * (one + 10)) / 6)));
    const t = Math.min(steps - 1, Math.max(0, Math.floor((e.clientX - box.left) / box.width * steps)));
    return [which, t, clip.rows[row]];
  };
  grid.onpointermove = e => tell(...cell(e));
  grid.onpointerleave = () => { said.textContent = hint; };
  grid.onclick = e => { run(false); frame = cell(e)[1] * clip.patch + Math.floor(clip.patch / 2); draw(); };
  const again = () => { frame = Math.floor(frame); drawGrid(); draw(); };
  addEventListener("resize", again);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  choose(0);
  if (!still.matches) run(true);
})();
"""
)
