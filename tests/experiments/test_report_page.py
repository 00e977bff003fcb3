"""The page: what it says, that it needs nothing else, and what a browser makes of it."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.cli_helpers import assert_refused, cli
from tests.experiments.helpers import AGENTS, loose, write_matrix, write_run

from contraflow.experiments.compare.matrix import FINAL, cell_folder
from contraflow.experiments.report import charts, tables
from contraflow.experiments.report.charts import CAPTIONS, styles
from contraflow.experiments.report.runs import read
from contraflow.presets import PRESETS
from contraflow.runtime.export import digest


class Text(HTMLParser):
    """What one can read, a space between elements; the sources of images; ids."""

    def __init__(self, page: str):
        super().__init__()
        self.words, self.sources, self.open = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words += " " + data


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    out = write_matrix(folder / "matrix")
    (cell_folder(out, "sac", "probe:action", 4) / FINAL).unlink()
    code, said, err = cli("report", out, "--out", folder / "pages/report.html")
    assert code == 0 and err == ""
    assert "left out  sac/probe-action/seed4: is trained, but not evaluated yet\n" in said
    assert f"and {len(CAPTIONS)} charts beside it" in said
    return folder / "pages/report.html"


def coloured(picture: np.ndarray) -> int:
    """Pixels of a line or a marker: bands are pale, text and axes are grey."""
    return int((picture.max(-1).astype(int) - picture.min(-1) > 60).sum())


def test_lines_of_agents_can_be_told_apart():
    look = styles([f"agent {i:02}" for i in range(28)])
    assert len({(style["color"], style["linestyle"]) for style in look.values()}) == 28


def test_every_chart_is_in_the_page_and_beside_it(page: Path):
    text = Text(page.read_text())
    assert text.open == [] and len(text.sources) == len(CAPTIONS)
    beside = {path.name for path in page.parent.iterdir()} - {"report.html"}
    assert beside == {f"report-{name}.png" for name in CAPTIONS}
    for name in CAPTIONS:
        png = (page.parent / f"report-{name}.png").read_bytes()
        picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        assert picture.shape[1] == 1440 and coloured(picture) > 500, name
        assert (picture[:5] == 255).all() or (picture[:, :5] == 255).all(), "on white"


def test_the_page_needs_nothing_else(page: Path):
    source = page.read_text()
    assert all(link.startswith("data:image/png;base64,") for link in Text(source).sources)
    bare = re.sub(r"data:image/png;base64,[\w+/=]+", "", source)
    assert not re.search(r"https?:|<script|<link|@import|url\(|file:", bare) and "/tmp" not in bare


def test_what_the_page_says(page: Path):
    words = " ".join(Text(page.read_text()).words.split())
    for text in (
        "29 runs: 3 agents, 2 environments, 5 seeds",
        "sac/probe-action/seed4 is trained, but not evaluated yet",
        "sac: 1 run is left out of the aggregates, since",
        "mean over 2 fresh episodes",
        "runs 1 task 2 tasks 4 tasks 8 tasks 2 48 66 73 81 3 74 85 86 89",
        "A step is one decision of the agent",
        "rfm, one particle", "rfm, uniform actions instead of its actor", "32 x 6 NFE, 32 Q", "1 x 1 NFE, 0 Q",
        "sir 32 x 0 NFE, 32 Q 220 ± 15.81 (5) 22 ± 1.581 (5)",
        "sac 1 x 1 NFE, 0 Q 120 ± 15.81 (5) 11.5 ± 1.291 (4)",
        "DeepMind Control Suite: return / 1000",
        "0 is random actions, 1 the best run of any agent here",
        "has too few seeds (fewer than 5) for a verdict against sir",
        "rfm is behind sir: -",
        "Critic, widths, batch, updates per step, clipping and evaluation are the same for all agents.",
        "agent.critic.width 64", "agent.target.estimator Gibbs - -", "agent.actor.width 64 64 -",
        "rfm/probe-action/seed0 rfm probe:action 0 40 45 0.2 0 - contraflow",
        "Success by task", "agent envpool: CheetahRun-v1 probe: action rfm 50% (5) - sac 50% (5) - sir 50% (5) -",
        "cpu: Abacus 3, cores: 2", "jax 0.9.9",
    ):  # fmt: skip
        assert text in words, text


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch):
    """For tests of the text: charts take seconds."""
    monkeypatch.setattr(charts, "draw", lambda *args: {})


def test_settings_that_are_not_the_same_are_told(tmp_path: Path, no_charts: None):
    agents = {"paper": PRESETS["rfm-paper"], "sir": AGENTS["sir"]}
    write_matrix(tmp_path / "m", ["probe:action"], 2, agents, frozenset({"paper"}))
    assert cli("report", tmp_path / "m", "--out", tmp_path / "r.html")[0] == 0
    words = " ".join(Text((tmp_path / "r.html").read_text()).words.split())
    assert "Not the same for all , although a fair comparison requires it: setting paper (own settings) sir" in words
    assert "agent.critic.width 256 64" in words and "are the same for all agents" not in words


def test_runs_without_a_matrix_without_an_actor_free_agent(tmp_path: Path):
    """One agent, one seed, one task, no diagnostics that differ: the page says what it cannot say."""
    write_run(tmp_path / "runs/a", loose(agent=AGENTS["sac"].agent), [1.0, 2.0])
    code, _, err = cli("report", tmp_path / "runs", "--out", tmp_path / "r.html")
    assert code == 0 and err == ""
    words = " ".join(Text((tmp_path / "r.html").read_text()).words.split())
    assert "1 run: 1 agent, 1 environment, 1 seed." in words and "`" not in words
    assert "There is no run of sir , the agent without an actor" in words and "one run: no interval" in words
    assert not (tmp_path / "r-by-time.png").exists() and not (tmp_path / "r-against.png").exists()


def test_agents_of_every_kind(tmp_path: Path, no_charts: None):
    agents = {name: PRESETS[name] for name in ("sir", "ppo", "bc")}
    write_matrix(tmp_path / "m", ["probe:action"], 2, agents, data={"probe:action": "set"})
    assert cli("report", tmp_path / "m", "--out", tmp_path / "r.html")[0] == 0
    words = " ".join(Text((tmp_path / "r.html").read_text()).words.split())
    assert "6 runs: 3 agents, 1 environment, 2 seeds" in words and "take no environment steps" in words
    assert "early stops are not counted" in words and "the same for all agents that have them." in words
    assert "source Dataset Rollouts Replay" in words and "bc/probe-action/seed0 bc probe:action 0 - 40" in words
    assert "Some agents have only 2 complete seeds" in words


def test_names_cannot_break_the_page(tmp_path: Path, no_charts: None):
    write_run(tmp_path / "<b>&amp;", loose(env="bandit:<script>alert(1)</script>"), [1.0, 2.0])
    assert cli("report", tmp_path, "--out", tmp_path / "r.html")[0] == 0
    assert "<script" not in (tmp_path / "r.html").read_text()


def test_the_reference_is_the_actor_free_agent_or_the_one_asked_for(page: Path, tmp_path: Path, no_charts: None):
    matrix = page.parents[1] / "matrix"
    assert "better than sir" in page.read_text()
    assert cli("report", matrix, "--out", tmp_path / "r.html", "--against", "sac")[0] == 0
    assert "better than sac" in (tmp_path / "r.html").read_text()


def test_the_users_scales(page: Path, tmp_path: Path, no_charts: None):
    (tmp_path / "s.csv").write_text("env,low,high\nprobe:action,0,100\n")
    args = ["report", page.parents[1] / "matrix", "--out", tmp_path / "r.html", "--scores", tmp_path / "s.csv"]
    assert cli(*args)[0] == 0
    assert "probe:action 0 100 given table of scales" in " ".join(Text((tmp_path / "r.html").read_text()).words.split())


def test_bad_input(page: Path, tmp_path: Path):
    matrix, out = page.parents[1] / "matrix", tmp_path / "r.html"
    assert_refused(["report", str(tmp_path / "absent")], "is not a folder")
    assert_refused(["report", str(tmp_path)], "there is no finished run")
    assert_refused(
        ["report", str(matrix), "--out", str(out), "--against", "rmf"], "no agent rmf", "did you mean 'rfm'?"
    )
    assert_refused(["report", str(matrix), "--out", str(tmp_path / "r.pdf")], "ends in .html")
    assert_refused(["report", str(matrix), "--out", str(tmp_path)], "ends in .html")
    (tmp_path / "s.csv").write_text("env,low,high\nprobe:acton,0,100\n")
    scores = ["--out", str(out), "--scores", str(tmp_path / "s.csv")]
    assert_refused(["report", str(matrix), *scores], "names probe:acton", "did you mean 'probe:action'?")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/matrix.json").write_text("{")
    assert_refused(["report", str(tmp_path / "m"), "--out", str(out)], "matrix.json is not valid JSON")
    assert list(tmp_path.glob("r*")) == []


def test_the_order_of_the_files_changes_nothing(page: Path, monkeypatch: pytest.MonkeyPatch):
    real = Path.iterdir
    matrix = page.parents[1] / "matrix"
    first = read(matrix)
    monkeypatch.setattr(Path, "iterdir", lambda self: sorted(real(self), reverse=True))
    assert read(matrix) == first


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def test_deployment_lists_files_and_monitors(tmp_path: Path):
    """Not a file of other weights, and nothing at all for runs that were only trained."""
    policy = write_run(tmp_path / "runs/a", loose(), [1.0, 2.0]) / "policy"
    write_run(tmp_path / "runs/b", loose(1), [1.0, 2.0])
    policy.mkdir()
    policy.with_name("monitor").mkdir()
    for name in ("model.safetensors", "policy.onnx", "policy.stablehlo"):
        (policy / name).write_text(name)

    def about(name, weights):
        sums = {"sha256": digest(policy / name), "policy_sha256": digest(policy / weights)}
        return {"file": name, "parity": 1.5e-6, "seconds": {"policy": 2e-4, "file": 1e-4}} | sums

    exports = {
        "onnx": about("policy.onnx", "model.safetensors"),
        "stablehlo": about("policy.stablehlo", "policy.onnx"),
    }
    config = {"spec": {"horizon": 4, "execute": 2}, "exports": exports}
    (policy / "config.json").write_text(json.dumps(config))
    check = {"delta": 0.1, "good": 60, "alarms_good": 4, "other": 0, "alarms_other": 0}
    (tmp_path / "runs/a/monitor/check.json").write_text(json.dumps(check))
    records, _ = read(tmp_path / "runs")
    row = ["a/policy", "0", "2 of 4", "policy.onnx", "1.5e-06", "0.20", "0.10", "4 of 60", "-"]
    assert tables.deployment(records, tmp_path / "runs") == [row]
    assert cli("report", tmp_path / "runs", "--out", tmp_path / "page.html")[0] == 0
    assert "alarms, good" in (tmp_path / "page.html").read_text()


PROBE = """<script>
window.onload = () => {
  const rows = [...document.images].map((image) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let coloured = 0;
    for (let i = 0; i < data.length; i += 4) {
      const rgb = [data[i], data[i + 1], data[i + 2]];
      coloured += Math.max(...rgb) - Math.min(...rgb) > 60;
    }
    const box = image.getBoundingClientRect(), shown = box.width * box.height;
    return {name: image.parentElement.id, width: image.naturalWidth, coloured, shown};
  });
  document.title = JSON.stringify(rows);
};
</script>"""


def test_a_browser_shows_the_charts(page: Path, tmp_path: Path):
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"no browser on the PATH (one of {', '.join(BROWSERS)})")
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", PROBE + "</body>"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,900", "--dump-dom", probed.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    assert found, f"{browser} gave no answer: {done.stderr[-500:]}"
    rows = json.loads(found.group(1))
    assert {row["name"] for row in rows} == set(CAPTIONS)
    for row in rows:
        assert row["width"] == 1440 and row["coloured"] > 500 and row["shown"] > 100_000, row
