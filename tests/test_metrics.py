"""The record: nothing twice, nothing torn, speeds without pauses, utilisation where the chip is known."""

import json
from types import SimpleNamespace

import jax
import pytest

from attnlab import metrics


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def clock(monkeypatch):
  """Time that stands still until told to go on."""
  now = SimpleNamespace(seconds=100.0)
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now.seconds)
  return now


def recorder(tmp_path, **changes):
  arguments = dict(step=0, steps=100, tokens=1000, flops=2e9)
  return metrics.Recorder(tmp_path, **arguments | changes)


def test_records_after_the_restored_step_are_dropped(tmp_path):
  records = [{"step": i, "loss": 1 / (i + 1), "seconds": i} for i in (1, 2, 2, 3, 4)]
  text = "".join(json.dumps(r) + "\n" for r in records) + '{"step": 5, "lo'
  (tmp_path / "metrics.jsonl").write_text(text)
  run = recorder(tmp_path, step=2)
  run.train(3, {"loss": 0.5})
  run.close()
  kept = lines(tmp_path / "metrics.jsonl")
  assert kept[:3] == records[:3]
  assert [r["step"] for r in kept] == [1, 2, 2, 3]
  assert kept[3]["seconds"] >= 2  # The clock goes on from where it stood.


def test_speed_and_utilisation_leave_out_compilation_and_pauses(tmp_path, clock, monkeypatch):
  monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e15)
  run = recorder(tmp_path)
  clock.seconds += 60  # compilation
  run.train(1, {"loss": 3.0})
  for step in range(2, 11):
    clock.seconds += 0.5
    run.train(step, {"loss": 2.0})
    with run.pause():
      clock.seconds += 40  # an evaluation
  run.close()
  first, *rest = lines(tmp_path / "metrics.jsonl")
  assert "tokens_per_second" not in first
  for record in rest:
    assert record["tokens_per_second"] == pytest.approx(2000)
    # 2000 tokens/s at 2e9 FLOPs each, of 1e15 on each of the suite's devices.
    assert record["mfu"] == pytest.approx(4e12 / (1e15 * jax.device_count()))
  assert rest[-1]["seconds"] == pytest.approx(60 + 9 * 0.5 + 8 * 40)
  assert rest[-1]["tokens"] == 10_000


def test_the_speed_is_of_late(tmp_path, clock):
  run = recorder(tmp_path)
  for step in range(1, 101):
    clock.seconds += 1.0 if step < 40 else 0.1
    run.train(step, {"loss": 1.0})
  run.close()
  assert lines(tmp_path / "metrics.jsonl")[-1]["tokens_per_second"] == pytest.approx(1e4)


def test_plain_lines_come_by_the_clock(tmp_path, clock, capsys):
  run = recorder(tmp_path)
  for step in range(1, 101):
    clock.seconds += 3
    run.train(step, {"loss": 1.0, "bits_per_byte": 1.4427})
  run.close()
  out = capsys.readouterr().out.splitlines()
  assert out[0] == "step 1/100  loss 1.0000  1.443 bits/byte"
  assert out[1] == "step 5/100  loss 1.0000  1.443 bits/byte  333 tokens/s  ETA 0:04:45"
  assert out[-1].startswith("step 100/100")
  assert len(out) == 2 + 99 // 4


@pytest.mark.parametrize(
  "kind, peak",
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU7x", 1153.5e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA L4", 121e12),
    ("NVIDIA L40S", None),
    ("NVIDIA GH200 480GB", 989e12),
    ("NVIDIA GB200", 2500e12),
    ("cpu", None),
  ],
)
def test_peak_flops_by_the_names_that_jax_gives(kind, peak):
  assert metrics.peak_flops(SimpleNamespace(device_kind=kind)) == peak


def test_bits():
  values = metrics.with_bits({"nll": 0.6931471805599453, "weights": 30.0, "bytes": 60.0})
  assert values == pytest.approx(
    {"nll": 0.6931471805599453, "bits_per_token": 1.0, "bits_per_byte": 0.5}
  )
  assert "bits_per_byte" not in metrics.with_bits({"nll": 1.0, "weights": 3.0, "bytes": 0.0})


@pytest.mark.parametrize("n, text", [(950, "950"), (1234, "1.23k"), (2.5e6, "2.5M"), (1e9, "1B")])
def test_human(n, text):
  assert metrics.human(n) == text


def test_a_plot_without_evaluations_or_bytes(tmp_path):
  rows = [{"step": i, "loss": 1.0, "bits_per_token": 2.0 / i} for i in range(1, 9)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  assert metrics.plot(tmp_path, "a task")
  assert (tmp_path / "loss.png").stat().st_size > 5000
