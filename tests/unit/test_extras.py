"""The line about a missing extra: its variable, and the source from which pip adds it."""

import json
from pathlib import Path

import pytest

from viralfx.core.extras import SOURCE, install_command, is_set, problem
from viralfx.settings import Settings, prefixed, read_settings


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file in which an installer records where the distribution came from."""
    folder = tmp_path / "viralfx-9.9.9.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.4\nName: viralfx\nVersion: 9.9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder / "direct_url.json"


def test_an_extra_comes_from_the_wheel_of_the_installation(recorded: Path, tmp_path: Path) -> None:
    """The command works in every folder, also with a path that a shell would split."""
    wheel = tmp_path / "our wheels" / "viralfx-9.9.9-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    recorded.write_text(json.dumps({"url": wheel.as_uri(), "archive_info": {}}))

    assert install_command("serve", "postgres") == f"pip install '{wheel}[serve,postgres]'"


def test_an_extra_comes_from_the_clone_of_the_installation(recorded: Path, tmp_path: Path) -> None:
    """An editable installation stays editable."""
    recorded.write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {}}))
    assert install_command("redis") == f"pip install '{tmp_path}[redis]'"
    recorded.write_text(json.dumps({"url": tmp_path.as_uri(), "dir_info": {"editable": True}}))
    assert install_command("redis") == f"pip install -e '{tmp_path}[redis]'"


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (
            {
                "url": "https://git.example.com/viralfx",
                "vcs_info": {"vcs": "git", "commit_id": "9f2c1aa"},
            },
            "viralfx[redis] @ git+https://git.example.com/viralfx@9f2c1aa",
        ),
        (
            {"url": "https://files.example.com/viralfx-9.9.9.whl", "archive_info": {}},
            "viralfx[redis] @ https://files.example.com/viralfx-9.9.9.whl",
        ),
    ],
)
def test_an_extra_comes_from_the_address_of_the_installation(
    recorded: Path, record: dict[str, object], wanted: str
) -> None:
    """The same commit of a repository, and the same file of a server."""
    recorded.write_text(json.dumps(record))

    assert install_command("redis") == f"pip install '{wanted}'"


@pytest.mark.parametrize("record", [None, {"url": "file:///gone/viralfx.whl"}])
def test_without_a_record_an_extra_comes_from_the_source_of_the_documents(
    recorded: Path, record: dict[str, object] | None
) -> None:
    """No index has the distribution, so the bare name is in no command."""
    if record is not None:
        recorded.write_text(json.dumps(record))

    assert install_command("redis") == f"pip install '{SOURCE.format(version='9.9.9')}[redis]'"


@pytest.mark.parametrize(
    ("environ", "variables"),
    [
        ({"DATABASE_URL": "postgresql://db/app"}, [("DATABASE_URL",)]),
        (
            {"REDIS_URL": "redis://cache", "DATABASE_URL": "postgresql://db/app"},
            [("DATABASE_URL",), ("REDIS_URL",), ("REDIS_URL", "DATABASE_URL")],
        ),
        ({"REDIS_HOST": "cache"}, [("REDIS_HOST",)]),
        ({"REDIS_SOCKET": "/run/redis.sock"}, [("REDIS_SOCKET",)]),
        (
            {"REDIS_SENTINEL_ENABLED": "true", "REDIS_SENTINELS": "a:26379"},
            [("REDIS_SENTINEL_ENABLED",)],
        ),
        ({"WEBHOOK_ALLOWED_HOSTS": "hooks.example.com"}, [("WEBHOOK_ALLOWED_HOSTS",)]),
        ({"ALERT_WEBHOOK_URL": "https://hooks.example.com/a"}, [("ALERT_WEBHOOK_URL",)]),
    ],
)
def test_the_variable_that_was_set_is_named(
    environ: dict[str, str], variables: list[tuple[str, ...]]
) -> None:
    """An address that sets other variables is named itself."""
    settings = read_settings(environ)

    assert [asked_by for asked_by, _ in settings.needs] == [is_set(*each) for each in variables]


def test_the_variable_of_a_file_and_of_a_prefix_is_named(tmp_path: Path) -> None:
    """Each is the name that the environment has."""
    file = tmp_path / "url"
    file.write_text("postgresql://db/app")
    settings = read_settings({"OPS_DATABASE_URL_FILE": str(file)}, env_prefix="OPS_")
    ((asked_by, extra),) = settings.needs
    line = prefixed(problem(asked_by, extra), "OPS_")

    assert line.startswith("OPS_DATABASE_URL_FILE is set, which needs viralfx[postgres]: pip ")


def test_nothing_is_needed_without_a_variable() -> None:
    """The defaults are in memory."""
    assert list(Settings().needs) == []
