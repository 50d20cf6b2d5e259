"""The demo's input: two QEMU guests that share memory, recorded and reported by name."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]
KSMTRACE = str(Path(sys.executable).parent / "ksmtrace")


def test_report_names_both_guests_and_what_they_share(ksm, tmp_path):
    recording = tmp_path / "guests.ksmt"
    subprocess.run(
        [
            *(ROOT / "scripts" / "guests", "run", "--timeout", "600", "--"),
            *(KSMTRACE, "record", "-o", recording, "--"),
            *(sys.executable, ROOT / "scripts" / "ksmd", "--passes", "5"),
            *("--pages-to-scan", "5000"),
        ],
        check=True,
        timeout=1000,
    )
    done = subprocess.run(
        [KSMTRACE, "report", recording, "--json"], check=True, stdout=subprocess.PIPE
    )
    report = json.loads(done.stdout)
    subprocess.run([sys.executable, ROOT / "scripts" / "ksmd", "--forget"], check=True)

    assert report["complete"], report["incomplete_because"]
    guests = {p["guest"]: p for p in report["processes"] if p["guest"]}
    assert set(guests) == {"alpha", "beta"}
    # scripts/guests fills 16 MiB of each guest with the same 4096 pages.
    for name, other in (("alpha", "beta"), ("beta", "alpha")):
        assert guests[name]["comm"] == f"qemu-{name}"
        shared = {s["guest"]: s["pages"] for s in guests[name]["shared_with"]}
        assert shared[other] >= 4096
        assert guests[name]["ksm_merging_pages"] >= 4096
