"""Credentials and certificates of Postgres that change while the program runs."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
import trustme
import uvloop
from cryptography.hazmat.primitives import serialization
from tests.integration.postgres_clients import changed, checked, config_of, migrated, opened
from tests.servers.certificates import NAMES, Certificates
from tests.servers.fixtures import or_skip
from tests.servers.postgres import Database, PostgresServer, postgres_server
from tests.servers.waiting import wait_for_code

from viralfx.bootstrap import postgres
from viralfx.core.clock import SystemClock
from viralfx.core.errors import ConfigurationError, StartupError
from viralfx.jobs.postgres import PostgresLeaseStore
from viralfx.postgres import CertificateError, PostgresConfig, PostgresDatabase
from viralfx.postgres.connections import Connector
from viralfx.postgres.credentials import TlsContexts
from viralfx.settings import (
    CredentialsCallable,
    CredentialsError,
    DatabaseAddress,
    DatabaseSettings,
    Secret,
    Settings,
    read_settings,
)
from viralfx.telemetry.logging.redaction import Redaction

pytestmark = pytest.mark.timeout(120)


class Login:
    """A role whose password changes."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.name = f"role_{urlsplit(database.url).path[1:]}"
        self.file = folder / "password"
        self.password = "first-one"
        database.execute(f"create role {self.name} login superuser password '{self.password}'")
        self.write()

    def change(self, password: str) -> None:
        """Change the password in the server, and end all sessions of the role."""
        self.password = password
        self.database.execute(f"alter role {self.name} password '{password}'")
        self.database.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"  # noqa: S608
            f" where usename = '{self.name}'"
        )

    def write(self) -> None:
        """Write the password of the moment to the file."""
        self.file.write_text(f"{self.password}\n")

    @property
    def url(self) -> str:
        """The address with the password of the moment."""
        parts = urlsplit(self.database.url)
        return f"postgresql://{self.name}:{self.password}@{parts.netloc.split('@')[1]}{parts.path}"

    def in_file(self) -> PostgresConfig:
        """Return a configuration with the password in a file."""
        config = config_of(self.database, user=self.name, password=None)
        password = Secret(self.password, file=str(self.file))
        return replace(config, settings=msgspec.structs.replace(config.settings, password=password))

    def of(self, ask: CredentialsCallable) -> PostgresConfig:
        """Return a configuration with a callable, which wins over a stale password."""
        stale = config_of(self.database, user=self.name, password="stale")
        return replace(stale, ask_password=ask)


@pytest.fixture
def login(database: Database, tmp_path: Path) -> Iterator[Login]:
    """Return a role of the test."""
    login = Login(database, tmp_path)
    yield login
    login.change("last")
    database.execute(f"drop owned by {login.name} cascade")
    database.execute(f"drop role {login.name}")


async def answer(pool: PostgresDatabase) -> None:
    """Run a statement; connections that were ended may be tried first."""
    await pool.execute_with_retry(lambda connection: connection.fetchval("select 1"), 5)


async def test_password_in_a_file_is_read_again(login: Login) -> None:
    """All connections end; pool, check and lease are back with the new password at once."""
    config = await migrated(login.in_file())
    async with opened(config) as pool, checked(pool) as check:
        store = PostgresLeaseStore(pool)
        await store.register("w", ["default"], 5.0)
        assert (await check.check()).code is None
        login.password = "second-two"
        login.write()
        login.change("second-two")

        assert (await wait_for_code(check, None)).code is None
        await answer(pool)
        await store.register("w", ["default"], 5.0)
        await store.close()


async def test_file_may_change_after_the_server(login: Login) -> None:
    """Until then the code is ``auth``; then the next check finds the new password."""
    async with opened(await migrated(login.in_file())) as pool, checked(pool) as check:
        login.change("second-two")
        refused = await wait_for_code(check, "auth")
        login.write()

        assert refused.message == "Database refuses the user or password"
        assert (await check.check()).code is None
        await answer(pool)


async def test_role_that_has_expired_has_a_code(login: Login) -> None:
    """``auth``, until its time is extended; the program needs no restart."""
    async with opened(await migrated(login.in_file())) as pool, checked(pool) as check:
        login.database.execute(f"alter role {login.name} valid until '2000-01-01'")
        login.change(login.password)
        refused = await wait_for_code(check, "auth")
        assert refused.message == "Database refuses the user or password"
        login.database.execute(f"alter role {login.name} valid until 'infinity'")

        assert (await check.check()).code is None
        await answer(pool)


async def test_password_in_a_file_for_each_server_is_read_again(
    login: Login, tmp_path: Path
) -> None:
    """By ``passfile``: the first line that fits counts, and new connections read it anew."""
    config = config_of(login.database, user=login.name, password=None)
    path, server = tmp_path / "pgpass", login.database.server

    def write(password: str) -> None:
        other = f"{server.host}:{server.port}:{config.address.database}:another:wrong"
        own = f"{server.host}:{server.port}:*:{login.name}:{password}"
        path.write_text(f"# of the test\n{other}\n{own}\n*:*:*:*:wrong\n")

    write(login.password)
    config = await migrated(changed(config, passfile=str(path)))
    async with opened(config) as pool, checked(pool) as check:
        assert (await check.check()).code is None
        login.change("second:two\\")
        await wait_for_code(check, "auth")
        write(r"second\:two\\")

        assert (await check.check()).code is None
        await answer(pool)
    with pytest.raises(StartupError, match="refuses the user or password"):
        await PostgresDatabase(changed(config, user="nobody"), clock=SystemClock()).open()


async def test_address_in_a_file_is_read_again(
    login: Login,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """User, password and host; an unusable address is one log line, and changes nothing."""
    monkeypatch.setattr("viralfx.settings.rotation.READ_INTERVAL_SECONDS", 0.0)
    path = tmp_path / "url"
    path.write_text(login.url)
    config = replace(
        config_of(login.database, user=login.name, password=login.password),
        url=Secret(login.url, file=str(path)),
    )
    redaction = Redaction()
    async with opened(config) as pool:
        path.write_text(login.url.replace(login.password, "second-two"))
        login.change("second-two")
        await answer(pool)
        assert redaction.text("second-two") == "***"

        for broken in ("mysql://h/d", login.url.replace("/test_", "/other_")):
            path.write_text(broken)
            login.change("second-two")
            for _ in range(2):
                await (await pool.connector.connect()).close()
    lines = [r for r in caplog.records if r.getMessage().startswith("Secret file cannot be used")]
    assert [vars(line)["reason"].split(":")[0] for line in lines] == [
        "is not a Postgres address",
        "names another database; restart the program to use it",
    ]


@pytest.mark.parametrize("form", ["password", "user and password", "async"])
async def test_callable_is_called_for_each_connection(login: Login, form: str) -> None:
    """It wins over the settings, and may name the user."""

    async def coroutine() -> str:
        return login.password

    forms: dict[str, CredentialsCallable] = {
        "password": lambda: login.password,
        "user and password": lambda: (login.name, login.password),
        "async": coroutine,
    }
    async with opened(await migrated(login.of(forms[form]))) as pool, checked(pool) as check:
        login.change("second-two")

        assert (await wait_for_code(check, None)).code is None
        await answer(pool)


async def test_failing_callable_is_named(login: Login, caplog: pytest.LogCaptureFixture) -> None:
    """It is no missing socket: the code is ``auth``, and the text of its error stays private."""
    broken = False

    def token() -> str:
        if broken:
            raise FileNotFoundError("planted-secret")
        return login.password

    async with opened(await migrated(login.of(token))) as pool, checked(pool) as check:
        broken = True
        login.change("second-two")
        failed = await wait_for_code(check, "auth")
        with pytest.raises(CredentialsError):
            await answer(pool)
        broken = False
        back = await check.check()

    assert back.code is None
    assert failed.message.startswith(
        "Database cannot be logged in to: OperationsConfig.database_password: tests."
    )
    assert failed.message.endswith("token: raised FileNotFoundError")
    assert [r.getMessage() for r in caplog.records].count("Credentials callable failed") == 1


async def test_callable_that_fails_at_the_start_is_named(login: Login) -> None:
    """In the line of the start; the first connection needs it already."""

    async def token() -> str:
        raise KeyError("planted-secret")

    with pytest.raises(StartupError) as caught:
        async with opened(login.of(token)):
            pass

    message = str(caught.value)
    assert " cannot be logged in to: OperationsConfig.database_password: " in message
    assert message.endswith(
        "token: raised KeyError, after 1 attempt; correct that callable; see the log"
    )


async def test_callable_counts_as_part_of_the_connection(login: Login) -> None:
    """One that does not answer within ``DB_CONNECTION_TIMEOUT`` is named, long before its 10 s."""

    async def token() -> str:
        await asyncio.Event().wait()
        return "never"

    config = replace(changed(login.of(token), connection_timeout=0.2), ask_password=token)
    connector = Connector(config)
    async with asyncio.timeout(5.0):
        with pytest.raises(CredentialsError, match=r"token: no answer within 0\.2 s"):
            await connector.connect()


async def test_callable_runs_on_the_loop_of_the_pool(login: Login) -> None:
    """A lease store of another thread waits for it, or uses the last result if it is blocked."""
    loops = []

    async def token() -> str:
        loops.append(asyncio.get_running_loop())
        return login.password

    config = await migrated(config_of(login.database))
    config = replace(config, ask_password=token, address=replace(config.address, user=login.name))
    ended: list[Exception | None] = []

    async def renew(pool: Any) -> None:
        store = PostgresLeaseStore(pool)
        await store.register("w", ["default"], 30.0)
        await store.close()

    def work(pool: Any) -> None:
        try:
            asyncio.run(renew(pool))
            ended.append(None)
        except Exception as error:  # noqa: BLE001 - compared below
            ended.append(error)

    async with opened(config) as pool:
        await asyncio.to_thread(work, pool)
        thread = threading.Thread(target=work, args=(pool,))
        thread.start()
        thread.join(20.0)  # blocks this loop

    assert ended == [None, None]
    assert set(loops) == {asyncio.get_running_loop()}


class Authority(Certificates):
    """Certificates of one authority, which end at a time; tests trust any of them."""

    def __init__(self, folder: Path, authority: trustme.CA, *, valid: timedelta) -> None:
        folder.mkdir()
        now = datetime.now(UTC)
        issued = authority.issue_cert(
            *NAMES, not_before=now - timedelta(days=2), not_after=now + valid
        )
        self.ca, self.certificate, self.key = (
            folder / name for name in ("ca.pem", "server.pem", "server.key")
        )
        authority.cert_pem.write_to_path(str(self.ca))
        self.certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.key.write_bytes(issued.private_key_pem.bytes())

    def client_context(self) -> ssl.SSLContext:
        """Return a context for the statements of tests."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Return the authority of the server and its clients."""
    return trustme.CA()


@pytest.fixture(scope="module")
def server(
    authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[PostgresServer]:
    """Run a server that speaks TLS and verifies the certificates of clients."""
    shown = Authority(tmp_path_factory.mktemp("tls") / "a", authority, valid=timedelta(days=1))
    with or_skip(), postgres_server(tls=shown) as server:
        [(folder,)] = server.execute("show data_directory")
        lines = authority.cert_pem.bytes().decode().replace("\n", "|")
        copied = f"copy (select * from string_to_table('{lines}', '|'))"  # noqa: S608
        server.execute(f"{copied} to '{folder}/clients.pem'")
        server.execute("alter system set ssl_ca_file = 'clients.pem'")
        server.execute("select pg_reload_conf()")
        yield server


def wrapped(context: Any) -> ssl.SSLObject:
    """Begin a connection with a context, as the driver does."""
    result: ssl.SSLObject = context.wrap_bio(
        ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="192.0.2.1"
    )
    return result


@pytest.mark.parametrize(
    ("mode", "count"), [("prefer", 0), ("require", 0), ("verify-ca", 1), ("verify-full", 1)]
)
def test_certificates_of_the_system_are_loaded_to_verify(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch, mode: Any, count: int
) -> None:
    """Loading them takes longer than any other part of the wiring, and some modes never verify."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ca))
    monkeypatch.setenv("SSL_CERT_DIR", str(certificates.ca.parent))
    context = wrapped(TlsContexts(DatabaseSettings(tls_mode=mode)).for_host("one")).context

    assert context.cert_store_stats()["x509_ca"] == count
    assert context.verify_mode == (ssl.CERT_REQUIRED if count else ssl.CERT_NONE)
    assert context.check_hostname == (mode == "verify-full")


def test_new_host_gets_the_last_good_certificates(authority: trustme.CA, tmp_path: Path) -> None:
    """After a failover while the files are broken; each host's own name is verified."""
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    contexts = TlsContexts(DatabaseSettings(tls_mode="verify-full", tls_ca_file=str(ca_file)))
    ca_file.write_text("no certificate")

    names = [wrapped(contexts.for_host(host)).server_hostname for host in ("one", "two", "one")]
    assert names == ["one", "two", "one"]


def test_threads_share_new_certificates_and_no_name(tmp_path: Path) -> None:
    """The thread of the lease connects to one host while the pool connects to another."""
    ca_file = tmp_path / "ca.pem"
    # The sizes of their files differ: the time of two changes may be the same.
    names = ("one", "another with a longer name")
    authorities = [trustme.CA(organization_name=name) for name in names]
    authorities[0].cert_pem.write_to_path(str(ca_file))
    contexts = TlsContexts(DatabaseSettings(tls_mode="verify-full", tls_ca_file=str(ca_file)))
    hosts = [f"host-{number}" for number in range(8)]
    with ThreadPoolExecutor(len(hosts)) as threads:
        for turn in range(1, 21):
            authorities[turn % 2].cert_pem.write_to_path(str(ca_file))
            found = [wrapped(each) for each in threads.map(contexts.for_host, hosts)]

            assert [each.server_hostname for each in found] == hosts
            trusted = [str(each.context.get_ca_certs()[0]["subject"]) for each in found]
            assert [f"'{names[turn % 2]}'" in each for each in trusted] == [True] * len(hosts)


def cut(server: PostgresServer) -> None:
    """End all sessions of the program."""
    server.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity"
        " where application_name like 'viralfx%'"
    )


async def test_server_certificates_expire_and_change(
    server: PostgresServer, authority: trustme.CA, tmp_path: Path
) -> None:
    """An expired one is refused; a new one, by an authority that the file has by then, is not."""
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca_file))
    config = changed(
        config_of(server), host="localhost", tls_mode="verify-full", tls_ca_file=str(ca_file)
    )
    other = trustme.CA()
    async with opened(await migrated(config)) as pool, checked(pool) as check:
        assert (await check.check()).code is None
        server.present(Authority(tmp_path / "old", authority, valid=timedelta(days=-1)))
        cut(server)
        expired = await wait_for_code(check, "tls")
        server.present(Authority(tmp_path / "new", other, valid=timedelta(days=1)))
        untrusted = await check.check()
        ca_file.write_text("no certificate")
        assert (await check.check()).code == "tls"
        other.cert_pem.write_to_path(str(ca_file))

        assert (await check.check()).code is None
        await answer(pool)
    assert expired.message == "Database presents a certificate that has expired"
    assert untrusted.code == "tls"
    server.present(Authority(tmp_path / "again", authority, valid=timedelta(days=1)))


def test_client_certificate_is_presented_and_read_again(
    server: PostgresServer, authority: trustme.CA, tmp_path: Path
) -> None:
    """An expired one is refused by the server; the files may change at any time."""
    certificate, key = tmp_path / "client.pem", tmp_path / "client.key"

    def issue(name: str, valid: timedelta) -> None:
        issued = Authority(tmp_path / name, authority, valid=valid)
        certificate.write_bytes(issued.certificate.read_bytes())
        key.write_bytes(issued.key.read_bytes())

    issue("one", timedelta(days=1))
    config = changed(
        config_of(server),
        host="localhost",
        tls_mode="require",
        tls_cert_file=str(certificate),
        tls_key_file=str(key),
    )

    async def scenario() -> str:
        async with opened(await migrated(config)) as pool, checked(pool) as check:
            async with pool.acquire() as connection:
                assert await connection.fetchval(
                    "select client_dn from pg_stat_ssl where pid = pg_backend_pid()"
                )
            issue("two", timedelta(days=-1))
            await asyncio.to_thread(cut, server)
            refused = await wait_for_code(check, "tls")
            issue("three", timedelta(days=1))

            assert (await check.check()).code is None
            await answer(pool)
        return refused.message

    # The loop of the program: only this one passes on the reason that the server gives.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(scenario()) == "Database refuses the client certificate"


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_version_of_tls_is_that_of_the_address(server: PostgresServer, version: str) -> None:
    """The server confirms it."""
    config = changed(config_of(server), tls_mode="require", tls_versions=(version, version))
    async with opened(config) as pool, pool.acquire() as connection:
        used = await connection.fetchval(
            "select version from pg_stat_ssl where pid = pg_backend_pid()"
        )
    assert used == version


async def test_lower_version_of_tls_is_refused(server: PostgresServer) -> None:
    """With ssl_min_protocol_version; the connection is not made in another way."""
    server.execute("alter system set ssl_max_protocol_version = 'TLSv1.2'")
    server.execute("select pg_reload_conf()")
    config = changed(config_of(server), tls_mode="require", tls_versions=("TLSv1.3", "TLSv1.3"))
    try:
        with pytest.raises(StartupError, match="after 1 attempt"):
            await PostgresDatabase(config, clock=SystemClock()).open()
    finally:
        server.execute("alter system reset ssl_max_protocol_version")
        server.execute("select pg_reload_conf()")


async def test_passphrase_of_the_key_is_that_of_the_address(
    server: PostgresServer, authority: trustme.CA, tmp_path: Path
) -> None:
    """By its parameter ``sslpassword``; another one is an error before anything is connected."""
    issued = Authority(tmp_path / "client", authority, valid=timedelta(days=1))
    issued.key.write_bytes(encrypted(issued.key))
    config = changed(
        config_of(server),
        tls_mode="require",
        tls_cert_file=str(issued.certificate),
        tls_key_file=str(issued.key),
        key_password="secret",
    )
    async with opened(config) as pool, pool.acquire() as connection:
        assert await connection.fetchval(
            "select client_dn from pg_stat_ssl where pid = pg_backend_pid()"
        )
    with pytest.raises(CertificateError) as caught:
        Connector(changed(config, key_password="wrong"))
    assert str(caught.value).startswith(
        f"DB_TLS_KEY_FILE: {issued.key} holds no private key in PEM format for sslpassword"
    )
    assert "secret" not in repr(config)


def test_the_other_addresses_share_the_passphrase_and_the_versions_of_tls(tmp_path: Path) -> None:
    """They are those of DATABASE_URL; a passphrase of their own that is wrong ends the start."""
    issued = Authority(tmp_path / "client", trustme.CA(), valid=timedelta(days=1))
    issued.key.write_bytes(encrypted(issued.key))
    files = f"sslcert={issued.certificate}&sslkey={issued.key}&sslpassword=secret"
    environ = {
        "DATABASE_URL": f"postgresql://db/app?{files}&ssl_min_protocol_version=TLSv1.3",
        "DB_TLS_MODE": "require",
        "DATABASE_MIGRATION_URL": "postgresql://db/app",
        "DATABASE_LISTEN_URL": "postgresql://db/app",
    }

    def listen(settings: Settings) -> None:
        clock = SystemClock()
        pool, _, _ = postgres.wire_postgres(settings, clock, lambda: None)
        postgres.notifier(settings, pool, clock)

    settings = read_settings(environ)
    own = postgres.migration_config(settings).address
    assert (own.key_password, own.tls_versions) == ("secret", ("TLSv1.3", "TLSv1.3"))
    listen(settings)
    environ["DATABASE_LISTEN_URL"] += "?sslpassword=wrong&ssl_min_protocol_version=TLSv1.2"
    with pytest.raises(ConfigurationError, match=f"^DB_TLS_KEY_FILE: {issued.key} holds no"):
        listen(read_settings(environ))


def encrypted(key: Path) -> bytes:
    """Return a key with a passphrase."""
    loaded: Any = serialization.load_pem_private_key(key.read_bytes(), None)
    result: bytes = loaded.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    return result


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("passphrase", "DB_TLS_KEY_FILE: {key} holds no key without a passphrase"),
        ("other key", "DB_TLS_KEY_FILE: {key} holds no key of the certificate in {certificate}"),
        ("no key", "DB_TLS_KEY_FILE: {key} holds no private key in PEM format"),
        ("no certificate", "DB_TLS_CERT_FILE: {certificate} holds no certificate in PEM format"),
        ("missing", "DB_TLS_CERT_FILE: {certificate} holds no certificate"),
    ],
)
def test_unusable_client_certificate_is_explained(tmp_path: Path, fault: str, message: str) -> None:
    """Before anything is connected; OpenSSL's own question for a passphrase would hang."""
    authority = trustme.CA()
    one, two = (
        Authority(tmp_path / name, authority, valid=timedelta(days=1)) for name in ("one", "two")
    )
    match fault:
        case "passphrase":
            one.key.write_bytes(encrypted(one.key))
        case "other key":
            one.key.write_bytes(two.key.read_bytes())
        case "no key":
            one.key.write_text("no key")
        case "no certificate":
            one.certificate.write_text("no certificate")
        case "missing":
            one.certificate.unlink()
    config = PostgresConfig(address=DatabaseAddress(hosts=(("localhost", 5432),)))
    files = {"tls_cert_file": str(one.certificate), "tls_key_file": str(one.key)}
    with pytest.raises(CertificateError) as caught:
        Connector(changed(config, **files))

    expected = message.format(key=one.key, certificate=one.certificate)
    assert str(caught.value).startswith(expected)
