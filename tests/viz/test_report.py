"""The report: one file, complete, escaped, and helpful where pieces are missing."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from jmm_fast.errors import UserError
from jmm_fast.viz import player, write_report
from jmm_fast.viz.clips import masked_clip_of_run

pytestmark = pytest.mark.usefixtures("matplotlib")


class Page(HTMLParser):
    """Collects text, tags and whatever a browser would fetch."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.stack, self.words, self.fetched, self.tags, self.unbalanced = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "input", "br", "link", "img"):
            self.stack.append(tag)
        for name, value in attrs:
            if (
                name in ("src", "href", "xlink:href", "action", "data")
                and value
                and not value.startswith(("#", "data:"))
            ):
                self.fetched.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.stack and self.stack[-1] == tag:
            self.stack.pop()

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if "script" not in self.stack and "style" not in self.stack:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page(reported):
    return Page((reported / "report.html").read_text(encoding="utf-8"))


def test_one_balanced_file_that_fetches_nothing(reported, page):
    assert (reported / "report.html").stat().st_size < 2_000_000
    assert page.fetched == [] and page.unbalanced == [] and page.stack == []
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"url\((?!#|data:)", text) and "@import" not in text and "fetch(" not in text


def test_it_tells_what_was_run(page):
    for words in (
        "hand<made> · run <1>",
        "released score, ratio 0.9",
        "xsub (2 training clips, 1 test clips)",
        "torch 2.13.0",
        "0123456789abcdef",
        "2 January 2026, 03:04 UTC",
        "jmm-fast pretrain '<script>alert(1)</script>'",
        "from 1.000 at the first logged step to 0.025",
        "100 tokens",
        "91 of them are hidden",
    ):
        assert words in page.text, words
    assert "triton" not in page.text


def test_user_text_is_escaped(reported, page):
    text = (reported / "report.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text and "wave <left>" not in text
    assert "wave &lt;left&gt; &amp; $right$" in text
    assert page.tags.count("script") == 2


def test_evaluation_table(page):
    assert "recognises 61.2 % of the test clips, 17.5 points more" in page.text
    assert "11.0" not in page.text  # evaluated again: the later record stands
    assert "finetuned, 10 % of the labels" in page.text and "55.0" in page.text and "raw poses" in page.text
    assert "Nothing to compare with: finetuned, from scratch." in page.text
    assert "Nothing to compare with: linear" not in page.text and "Not evaluated: nearest neighbours." in page.text


def test_several_seeds_give_mean_and_spread(run):
    with open(run / "evaluations.jsonl", "a") as file:
        line = {"protocol": "linear", "encoder": "pretrained", "top1": 63.25, "split": "xsub", "seed": 1}
        file.write(json.dumps(line) + "\n")
    assert "62.2 ± 1.4, 2 seeds" in Page(write_report(run).read_text(encoding="utf-8")).text


def test_figures_are_saved(reported, page):
    names = {path.name for path in (reported / "figures").iterdir()}
    assert names == {"loss.png", "confusion-linear-pretrained.png", "classes.png", "clip-0.png", "clip-1.png"}
    assert page.tags.count("svg") == 5


def test_bare_folder_says_how_to_go_on(tmp_path):
    text = Page(write_report(tmp_path, tmp_path / "out.html").read_text(encoding="utf-8")).text
    for command in ("jmm-fast pretrain", f"jmm-fast probe {tmp_path} --data FILE"):
        assert command in text
    assert not (tmp_path / "report.html").exists()


def test_data_that_moved_or_changed_is_left_out(run, store):
    environment = json.loads((run / "environment.json").read_text())
    environment["data"]["fingerprint"] = "another"
    (run / "environment.json").write_text(json.dumps(environment))
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "report" in text and "--data FILE" in text and "tokens, each one joint" not in text
    text = Page(write_report(run, store=store.path).read_text(encoding="utf-8")).text
    assert "tokens, each one joint" in text


def test_bad_input_writes_nothing(run, tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        write_report(tmp_path / "absent")
    (run / "metrics.jsonl").write_text("{\n{}\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl line 1"):
        write_report(run)
    with pytest.raises(UserError, match="no such file"):
        write_report(run, store=tmp_path / "absent.safetensors")
    assert not (run / "report.html").exists()


def test_equal_runs_give_equal_reports(reported):
    first = (reported / "report.html").read_bytes()
    assert write_report(reported, reported.parent / "again.html").read_bytes() == first


def decode(text: str, dtype) -> np.ndarray:
    import base64

    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def test_player_data_keeps_poses_weights_and_mask(run, store):
    clip = masked_clip_of_run(run, store, 2)
    text = player.player_data([clip])
    assert "<" not in text
    data = json.loads(text)[0]
    assert data["frames"] == 16 and len(data["bodies"]) == 2
    for body, packed in enumerate(data["bodies"]):
        poses = decode(packed["poses"], "<i2").reshape(16, 25, 3) * data["unit"]
        assert np.abs(poses - clip.poses[body]).max() < 1e-4
        assert np.array_equal(decode(packed["hidden"], np.uint8).astype(bool), clip.mask[body])
        weight = data["factor"] ** (decode(packed["weight"], np.uint8) / 127.5 - 1)
        true = np.clip(clip.probability[body] * 100, 1 / data["factor"], data["factor"])
        np.testing.assert_allclose(weight, true, rtol=0.02)


def test_player_script_parses(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed: nothing here can parse JavaScript")
    path = tmp_path / "player.js"
    path.write_text(player.SCRIPT, encoding="utf-8")
    assert subprocess.run([node, "--check", str(path)], capture_output=True).returncode == 0
