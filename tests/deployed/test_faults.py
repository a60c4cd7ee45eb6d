"""What hospitals' networks and disks do to a run: proxies, slow and cut lines, a site gone for good, a full disk."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from lab import Lab, free_port, wait_for
from proxies import ConnectProxy, Tap

pytestmark = pytest.mark.slow  # many minutes

SITES = ("ash", "birch", "cedar")
QUORUM_OF_TWO = "\n[aggregation]\nmin_sites = 2\n"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("faults"), address="127.0.0.2")  # no agent goes to 127.0.0.1 by way of a proxy
    try:
        lab.coordinate("--name", "Faults")
        lab.log_in()
        for number, name in enumerate(SITES):
            lab.enrol(name)
            lab.settle(name, lab.draw(name, seed=number))
        for name in SITES[:2]:
            lab.start_agent(name)
        lab.await_online(*SITES[:2])
        yield lab
    finally:
        lab.close()


@contextlib.contextmanager
def agent(lab, name, env=None):
    """A site's agent for as long as the block lasts."""
    lab.start_agent(name, env)
    try:
        lab.await_online(name, seconds=150)
        yield
    finally:
        lab.end(name)


def run_with(lab, name, rounds=1, more=""):
    """Launches and waits; the lines of its rounds."""
    run_id = lab.launch(lab.write_run(name, rounds, private=False, round_minutes=1.0, more=QUORUM_OF_TWO + more))
    assert lab.await_end(run_id)["state"] == "finished", lab.logs()[-3000:]
    return lab.rounds(run_id)


def test_a_hospital_behind_a_slow_proxy(lab):
    proxy = ConnectProxy(rate=100_000)
    try:
        with agent(lab, "cedar", {"HTTPS_PROXY": proxy.url, "HTTP_PROXY": proxy.url}):
            lines = run_with(lab, "proxied", 2)
            assert [line["sites"] for line in lines] == [3, 3]
            checked = lab.fedscan("agent", "check", lab.site("cedar"), env={"HTTPS_PROXY": proxy.url}, code=None)
            assert "coordinator" in checked
        assert set(proxy.seen) == {f"{lab.address}:{lab.port}"} and not proxy.other
        assert proxy.bytes_up > 2 * 13_888 and proxy.bytes_down > 2 * 13_888  # two models each way
    finally:
        proxy.close()


def test_a_line_that_is_cut_and_mended(lab):
    proxy = ConnectProxy()
    try:
        with agent(lab, "cedar", {"HTTPS_PROXY": proxy.url}):
            more = QUORUM_OF_TWO
            run_id = lab.launch(lab.write_run("cut", 40, private=False, round_minutes=0.25, more=more))
            wait_for(lambda: len(lab.rounds(run_id)) >= 2, 120, "two rounds")
            proxy.cut()
            there = len(lab.rounds(run_id))
            wait_for(lambda: len(lab.rounds(run_id)) >= there + 3, 150, "rounds without the site")
            proxy.cut(False)
            alone = len(lab.rounds(run_id))
            wait_for(lambda: any(r["sites"] == 3 for r in lab.rounds(run_id)[alone:]), 200, "it takes part again")
            lab.fedscan("stop", run_id)
            assert lab.await_end(run_id)["state"] == "stopped"
        lines = lab.rounds(run_id)
        assert lines[0]["sites"] == 3 and any(line["sites"] == 2 for line in lines[there:alone])
        assert not any(line["void"] for line in lines)
        lab.fedscan("agent", "audit", "verify", lab.site("cedar"))
    finally:
        proxy.close()


def test_a_site_that_is_gone_for_good(lab):
    lab.start_agent("cedar")
    lab.await_online("cedar", seconds=150)
    run_id = lab.launch(lab.write_run("gone", 5, private=False, round_minutes=0.25, more=QUORUM_OF_TWO))
    wait_for(lambda: lab.rounds(run_id), 120, "a round")
    lab.running.pop("cedar").kill()
    assert lab.await_end(run_id)["state"] == "finished"
    assert lab.rounds(run_id)[-1]["sites"] == 2
    assert any("cedar" in note for note in lab.rounds(run_id)[-1]["dropped"])


def test_an_authority_that_is_not_the_coordinators(lab, tmp_path):
    """Somebody in the middle with a certificate of their own: nothing is sent, and the check says so."""
    site = lab.site("cedar")
    ca = next(site.glob("coordinator-ca.pem"))
    kept = ca.read_bytes()
    other = Lab(tmp_path / "other")
    other.root.mkdir()
    other.fedscan("server", "init", "--state", other.state, "--address", f"127.0.0.1:{free_port()}")
    ca.write_bytes((other.state / "pki" / "ca.crt").read_bytes())
    try:
        told = lab.fedscan("agent", "check", site, code=1)
        assert "✗" in told and "certificate" in told and "Traceback" not in told
    finally:
        ca.write_bytes(kept)


def test_a_certificate_that_has_expired(lab, tmp_path):
    from datetime import UTC, datetime, timedelta
    from ipaddress import ip_address

    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

    pki = lab.state / "pki"
    authority = x509.load_pem_x509_certificate((pki / "ca.crt").read_bytes())
    signing = load_pem_private_key((pki / "ca.key").read_bytes(), None)
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    old = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")]))
        .issuer_name(authority.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=90))
        .not_valid_after(now - timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), False)
        .sign(signing, SHA256())
    )
    (tmp_path / "old.crt").write_bytes(old.public_bytes(Encoding.PEM))
    (tmp_path / "old.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    tap = Tap((lab.address, lab.port), tmp_path / "old.crt", tmp_path / "old.key", pki / "ca.crt")
    path = lab.site("cedar") / "connection.toml"
    kept = path.read_text()
    path.write_text(kept.replace(f"{lab.address}:{lab.port}", f"127.0.0.1:{tap.port}"))
    try:
        told = lab.fedscan("agent", "check", lab.site("cedar"), code=1)
        assert "expired" in told and not any(tap.up)
    finally:
        path.write_text(kept)
        tap.close()


def test_a_clock_that_is_8_seconds_off(lab):
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("faketime is not installed: scripts/install-test-tools")
    off = {"LD_PRELOAD": str(library), "FAKETIME": "+8s", "DONT_FAKE_MONOTONIC": "1"}
    told = lab.fedscan("agent", "check", lab.site("cedar"), code=1, env=off)
    (line,) = [line for line in told.splitlines() if "clock" in line.split()[:2]]
    assert "✗" in line and "ahead" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_disk_that_is_full_at_a_site(lab):
    """The site answers with the one constant, the run goes on, and once there is room the site takes part again."""
    site, aside = lab.site("cedar"), lab.root / "aside"
    shutil.move(site, aside)
    site.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", site], check=True)
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", site], check=True)
        with agent(lab, "cedar"):
            run_id = lab.launch(lab.write_run("full", 30, private=False, round_minutes=0.5, more=QUORUM_OF_TWO))
            wait_for(lambda: lab.rounds(run_id), 120, "a round")
            with contextlib.suppress(OSError), (site / "ballast").open("wb") as ballast:
                while True:
                    ballast.write(os.urandom(2**16))
                    ballast.flush()
            there = len(lab.rounds(run_id))
            wait_for(lambda: len(lab.rounds(run_id)) >= there + 3, 120, "rounds without the site")
            assert lab.rounds(run_id)[-1]["sites"] == 2
            (site / "ballast").unlink()
            alone = len(lab.rounds(run_id))
            wait_for(lambda: any(r["sites"] == 3 for r in lab.rounds(run_id)[alone:]), 120, "it takes part again")
            lab.fedscan("stop", run_id)
            lab.await_end(run_id)
            text = json.dumps(lab.rounds(run_id)) + lab.logs()
            assert "No space" not in text and str(site) not in text
        lab.fedscan("agent", "audit", "verify", site)
        lab.fedscan("agent", "ledger", site)
    finally:
        subprocess.run(["umount", "-l", site], check=False)
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(aside, site)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="network namespaces need root and iproute2")
def test_three_hospitals_with_networks_of_their_own(tmp_path):
    """A coordinator and three sites, each at an address of its own; one cable is pulled out and put back.

    Each site may send whatever it likes wherever it likes: all of it goes to the coordinator's one port, and nobody
    asks for an outside name. (Telemetry and update checks would.)
    """
    netlab = Path(__file__).parents[2] / "scripts" / "netlab"

    def net(*words):
        env = {**os.environ, "FEDSCAN_LAB": "test"}
        return subprocess.run([netlab, *words], env=env, check=True, capture_output=True, text=True).stdout.strip()

    net("up", "3")
    try:
        ip = ["ip", "netns", "exec"]
        hosts = {name: [*ip, f"fedscan-test-site-{number + 1}"] for number, name in enumerate(SITES)}
        hosts["coordinator"] = [*ip, "fedscan-test-coordinator"]
        centre = net("address", "coordinator")
        lab = Lab(tmp_path / "lab", address=centre, hosts=hosts, port=8443)
        sniffers = []
        for number, name in enumerate(SITES):
            net("run", f"site-{number + 1}", "ip", "route", "add", "default", "via", centre)
            sniff = [*hosts[name], sys.executable, str(Path(__file__).with_name("sniff.py")), str(tmp_path / name)]
            sniffers.append(subprocess.Popen(sniff))
        try:
            lab.coordinate()
            lab.log_in()
            for number, name in enumerate(SITES):
                lab.enrol(name)
                lab.settle(name, lab.draw(name, seed=number))
                lab.start_agent(name)
            lab.await_online(*SITES)
            run_id = lab.launch(lab.write_run("net", 60, private=False, round_minutes=0.3, more=QUORUM_OF_TWO))
            wait_for(lambda: lab.rounds(run_id), 120, "a round")
            net("cut", "site-3")
            there = len(lab.rounds(run_id))
            wait_for(lambda: any(r["sites"] == 2 for r in lab.rounds(run_id)[there:]), 120, "a round without it")
            net("mend", "site-3")
            alone = len(lab.rounds(run_id))
            wait_for(lambda: any(r["sites"] == 3 for r in lab.rounds(run_id)[alone:]), 200, "it takes part again")
            lab.fedscan("stop", run_id, role="coordinator")
            lab.await_end(run_id)
            for name in SITES:
                assert (tmp_path / name).read_text().split("\n")[:-1] == ["ready", f"tcp {centre} 8443"]
        finally:
            lab.close()
            for sniffer in sniffers:
                sniffer.kill()
                sniffer.wait()
    finally:
        net("down")
