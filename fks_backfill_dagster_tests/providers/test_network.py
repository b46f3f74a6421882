"""Proxies and certificates from the environment, with a real proxy and a real TLS server on loopback."""

from __future__ import annotations

import http.client
import logging
import shutil
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.providers.base import (
    PermanentError,
    ProviderError,
    ProviderOptions,
    TransientError,
)
from fks_backfill_dagster.providers.http.client import HttpClient
from fks_backfill_dagster.providers.http.errors import Unreachable
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.forwarding import forwarding
from fks_backfill_dagster_tests.providers.scripted import Scripted, SmallBinance, crypto, serve, span

pytestmark = pytest.mark.server

# Unresolvable: responses from this host came through the proxy.
HOST = "market.example"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
KEY = "sEcReT-key"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *map(str.lower, VARIABLES), *BUNDLES, "NETRC"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def client(pool: RequestPool) -> HttpClient:
    options = ProviderOptions(f"http://{HOST}", timeout_seconds=5.0, key=KEY)
    headers = {"Authorization": f"Bearer {KEY}"}
    return HttpClient("p", options, pool, ProcessLimiter({}), headers=headers)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for HOST, with its key in the same folder."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command to create the certificate")
    folder = tmp_path_factory.mktemp("tls")
    names = f"subjectAltName=DNS:{HOST},IP:127.0.0.1"
    usage = "keyUsage=critical,digitalSignature,keyCertSign"
    kind = ["-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    written = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    about = ["-subj", f"/CN={HOST}", "-addext", names, "-addext", usage]
    subprocess.run(["openssl", "req", *kind, *about, *written], check=True, capture_output=True)
    return folder / "certificate.pem"


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    return context


def stopped_proxy() -> str:
    """The address of a stopped proxy."""
    with forwarding("http://127.0.0.1:1") as proxy:
        return proxy.url


# Routes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_a_request_goes_through_the_proxy(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with serve(lambda _: Scripted(b"good")) as server, forwarding(server.url) as proxy:
        # An address without a scheme is HTTP, as for curl.
        monkeypatch.setenv(variable, f"127.0.0.1:{proxy.port}")
        assert client.exchange(f"http://{HOST}/x", {"a": "1"}).body == b"good"
        assert proxy.requests == [f"GET http://{HOST}/x?a=1"]
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("variable", BUNDLES)
def test_https_uses_a_tunnel_and_the_certificates_of_the_environment(
    client: HttpClient,
    monkeypatch: pytest.MonkeyPatch,
    tls: ssl.SSLContext,
    certificate: Path,
    variable: str,
) -> None:
    with serve(lambda _: Scripted(b"good"), tls) as server, forwarding(server.url) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        monkeypatch.setenv(variable, str(certificate))
        assert client.exchange(f"https://{HOST}/x").body == b"good"
        assert proxy.requests == [f"CONNECT {HOST}:443"], "the proxy sees neither the path nor the key"


def test_an_untrusted_certificate_is_rejected_with_the_remedy(
    client: HttpClient, tls: ssl.SSLContext
) -> None:
    with serve(lambda _: Scripted(b"good"), tls) as server, pytest.raises(PermanentError) as caught:
        client.exchange(f"{server.url}/x")
    assert "its certificate is not trusted (self-signed certificate" in str(caught.value)
    assert "REQUESTS_CA_BUNDLE or SSL_CERT_FILE" in str(caught.value)


@pytest.mark.parametrize("variable", BUNDLES)
@pytest.mark.parametrize("content", [None, "no certificate"], ids=["absent", "no PEM"])
def test_a_file_without_certificates_is_named(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, content: str | None
) -> None:
    file = tmp_path / "bundle.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(variable, str(file))
    with pytest.raises(PermanentError, match=f"{variable} is {file}, which contains no certificates"):
        client.exchange("https://127.0.0.1:1/x")


@pytest.mark.parametrize("named", [HOST, "*", f"other.example, {HOST}", ".example"])
def test_hosts_in_no_proxy_are_requested_directly(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    with serve(lambda _: Scripted(b"good")) as server, forwarding(server.url) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("NO_PROXY", named)
        with pytest.raises(Unreachable, match=f"the host {HOST} is unknown"):
            client.exchange(f"http://{HOST}/x")
        assert proxy.requests == []


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.8.8.8"])
def test_loopback_is_never_requested_through_a_proxy(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    with serve(lambda _: Scripted(b"good")) as server, forwarding(server.url) as proxy:
        for variable in ("HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, proxy.url)
        with suppress(Unreachable):  # the server listens on 127.0.0.1 only
            client.exchange(server.url.replace("127.0.0.1", host))
        assert proxy.requests == []


def test_netrc_does_not_replace_the_key(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text(f"machine {HOST} login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve(lambda _: Scripted(b"good")) as server, forwarding(server.url) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        client.exchange(f"http://{HOST}/x")
        assert server.requests[0].headers["Authorization"] == f"Bearer {KEY}"


def test_klines_and_archives_use_the_same_route(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """ccxt sends the klines."""
    window, url = span("2024-01-05", "2024-01-07T03:00"), f"http://{HOST}"
    market = SmallBinance()
    with serve(market) as server, forwarding(server.url) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        answer = make("binance", url, archive_url=url).fetch(crypto(), window)
        got = Candles.concat([delivery.candles for delivery in answer.deliveries]).sorted()
        assert got.equals(market.truth(crypto(), window))
        paths = {request.partition("?")[0] for request in proxy.requests}
        assert f"GET {url}/api/v3/klines" in paths
        assert any(path.startswith(f"GET {url}/data/spot/daily") for path in paths)
        assert len(proxy.requests) == len(server.requests) == answer.requests


# Proxy errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "text"),
    [
        (407, PermanentError, "requires a user and a password: set them in that variable"),
        (
            403,
            PermanentError,
            f"refuses connections to {HOST}: allow them in the proxy, or add {HOST} to NO_PROXY",
        ),
        (502, TransientError, f"cannot reach {HOST} (it returned 502"),
    ],
)
def test_a_refusal_names_the_proxy_and_its_variable(
    client: HttpClient, monkeypatch: pytest.MonkeyPatch, status: int, kind: type[ProviderError], text: str
) -> None:
    with forwarding("http://127.0.0.1:1", refuse=status) as proxy:
        monkeypatch.setenv("https_proxy", f"http://user:pa55w0rd@127.0.0.1:{proxy.port}")
        with pytest.raises(kind) as caught:
            client.exchange(f"https://{HOST}/x")
    assert f"the proxy {proxy.url} (https_proxy) {text}" in str(caught.value)
    assert "pa55w0rd" not in str(caught.value)


def test_an_unreachable_proxy(client: HttpClient, monkeypatch: pytest.MonkeyPatch) -> None:
    url = stopped_proxy()
    for scheme, variable in (("http", "HTTP_PROXY"), ("https", "HTTPS_PROXY")):
        monkeypatch.setenv(variable, url)
        with pytest.raises(Unreachable) as caught:
            client.exchange(f"{scheme}://{HOST}/x")
        assert f"the proxy {url} ({variable}) cannot be reached" in str(caught.value)
        assert "refused" in str(caught.value)


@pytest.mark.parametrize("named", ["socks5://127.0.0.1:1", "http://", "http://:0"])
def test_an_invalid_proxy(client: HttpClient, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("ALL_PROXY", named)
    with pytest.raises(ProviderError, match=r"the proxy .*\(ALL_PROXY\)"):
        client.exchange(f"https://{HOST}/x")


def test_the_password_is_sent_to_the_proxy_and_in_no_text(
    client: HttpClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also if the application makes http.client print all requests."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
    with serve(lambda _: Scripted(b"good")) as server, forwarding(server.url, user="me:pa55/w0rd") as proxy:
        for password in ("pa55%2Fw0rd", "wr0ng%2F"):
            monkeypatch.setenv("HTTP_PROXY", f"http://me:{password}@127.0.0.1:{proxy.port}")
            reply = client.exchange(f"http://{HOST}/x")
            assert reply.status == (200 if password.startswith("pa55") else 407)
        error = client.failure(reply)
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:wr0ng%2F@127.0.0.1:{proxy.port}")
        with pytest.raises(PermanentError) as caught:
            client.exchange(f"https://{HOST}/x")
    assert isinstance(error, PermanentError)
    texts = f"{error}{caught.value}{caplog.text}{capsys.readouterr()}"
    assert "requires a user and a password" in texts
    for secret in ("w0rd", "wr0ng", "bWU6", KEY):  # bWU6: "me:" in base 64
        assert secret not in texts
