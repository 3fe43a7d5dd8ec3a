"""Reading the environment: every wrong setting is one line that names the variable and the fix."""

from datetime import timedelta

import pytest

from identity_service.errors import ConfigurationError
from identity_service.settings import Settings, load


def test_defaults_are_those_of_the_contract():
    settings = load({}).settings
    assert settings.issuer_url == "http://localhost:8000"
    assert (settings.host, settings.port, settings.workers) == ("127.0.0.1", 8000, 1)
    assert settings.audience == ("api",)
    assert settings.access_lifetime == timedelta(seconds=600)
    assert settings.refresh_lifetime == timedelta(days=14)
    assert settings.session_lifetime == timedelta(days=30)
    assert settings.refresh_retry_window == timedelta(seconds=30)
    assert settings.key_publish_window == timedelta(seconds=900)
    assert settings.password_min_length == 15
    assert (settings.argon2_memory_kib, settings.argon2_time_cost, settings.argon2_parallelism) == (19456, 2, 1)
    assert settings.database_url is None
    assert not load({}).warnings


def test_the_default_issuer_follows_the_port():
    assert load({"IDENTITY_BIND": "0.0.0.0:9000"}).settings.issuer_url == "http://localhost:9000"


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"IDENTITY_BIND": "8000"}, "IDENTITY_BIND: must be HOST:PORT"),
        ({"IDENTITY_BIND": "localhost:99999"}, "IDENTITY_BIND: must be HOST:PORT"),
        ({"IDENTITY_BIND": ":8000"}, "IDENTITY_BIND: must be HOST:PORT"),
        ({"IDENTITY_WORKERS": "0"}, "IDENTITY_WORKERS: input should be greater than or equal to 1"),
        ({"IDENTITY_WORKERS": "many"}, "IDENTITY_WORKERS: input should be a valid integer"),
        ({"IDENTITY_ACCESS_LIFETIME": "10m"}, "IDENTITY_ACCESS_LIFETIME: must be a number of seconds"),
        ({"IDENTITY_ACCESS_LIFETIME": "nan"}, "IDENTITY_ACCESS_LIFETIME: must be a number of seconds"),
        ({"IDENTITY_ACCESS_LIFETIME": "1e300"}, "IDENTITY_ACCESS_LIFETIME: must be a number of seconds"),
        ({"IDENTITY_SESSION_LIFETIME": "-1"}, "IDENTITY_SESSION_LIFETIME: must be a number of seconds from 1"),
        ({"IDENTITY_PASSWORD_GRANT": "maybe"}, "IDENTITY_PASSWORD_GRANT: input should be 'on' or 'off'"),
        ({"IDENTITY_SIGNUP": "on"}, "IDENTITY_SIGNUP: input should be 'open' or 'closed'"),
        ({"IDENTITY_ISSUER_URL": "id.example.com"}, "IDENTITY_ISSUER_URL: must be scheme, host"),
        ({"IDENTITY_ISSUER_URL": "https://id.example.com/"}, "IDENTITY_ISSUER_URL: must be scheme, host"),
        ({"IDENTITY_ISSUER_URL": "https://id.example.com?x"}, "IDENTITY_ISSUER_URL: must be scheme, host"),
        ({"IDENTITY_ISSUER_URL": "https://u:p@id.example.com"}, "IDENTITY_ISSUER_URL: must be scheme, host"),
        ({"IDENTITY_ISSUER_URL": "https://id.example.com:x"}, "IDENTITY_ISSUER_URL: must be scheme, host"),
        ({"IDENTITY_ISSUER_URL": "http://id.example.com"}, "IDENTITY_ISSUER_URL: must use https"),
        ({"IDENTITY_ALLOWED_ORIGINS": "*"}, "IDENTITY_ALLOWED_ORIGINS: must list exact origins"),
        ({"IDENTITY_ALLOWED_ORIGINS": "https://a.example/x"}, "IDENTITY_ALLOWED_ORIGINS: must list exact origins"),
        ({"IDENTITY_ALLOWED_ORIGINS": "null"}, "IDENTITY_ALLOWED_ORIGINS: must list exact origins"),
        (
            {"IDENTITY_ALLOWED_ORIGINS": "https://a.example:443"},
            "IDENTITY_ALLOWED_ORIGINS: must list origins as browsers",
        ),
        (
            {"IDENTITY_ALLOWED_ORIGINS": "http://localhost:80"},
            "IDENTITY_ALLOWED_ORIGINS: must list origins as browsers",
        ),
        ({"IDENTITY_ALLOWED_HOSTS": "identity:8000"}, "IDENTITY_ALLOWED_HOSTS: must list host names"),
        ({"IDENTITY_ALLOWED_HOSTS": "https://identity"}, "IDENTITY_ALLOWED_HOSTS: must list host names"),
        ({"IDENTITY_ALLOWED_HOSTS": "*.example.com"}, "IDENTITY_ALLOWED_HOSTS: must list host names"),
        ({"IDENTITY_AUDIENCE": ","}, "IDENTITY_AUDIENCE: must name at least one audience"),
        ({"IDENTITY_TRUSTED_PROXIES": "10.0.0.1/8"}, "IDENTITY_TRUSTED_PROXIES: must list addresses or networks"),
        ({"IDENTITY_TRUSTED_PROXIES": "proxy"}, "IDENTITY_TRUSTED_PROXIES: must list addresses or networks"),
        ({"IDENTITY_TRUSTED_PROXIES": "0.0.0.0/0"}, "IDENTITY_TRUSTED_PROXIES: must not trust every address"),
        ({"IDENTITY_TRUSTED_PROXIES": "::ffff:0:0/96"}, "IDENTITY_TRUSTED_PROXIES: must not trust every address"),
        ({"IDENTITY_BREACH_CHECK_URL": "http://breaches.example/range"}, "IDENTITY_BREACH_CHECK_URL: must be an https"),
        ({"IDENTITY_BREACH_CHECK_URL": "https://b.example/?q="}, "IDENTITY_BREACH_CHECK_URL: must be an https"),
        ({"IDENTITY_BREACH_CHECK_URL": "breaches.example"}, "IDENTITY_BREACH_CHECK_URL: must be an https"),
        ({"IDENTITY_BREACH_CHECK_URL": "https://[x"}, "IDENTITY_BREACH_CHECK_URL: must be an https"),
        ({"IDENTITY_THROTTLE_EXEMPT": "*"}, "IDENTITY_THROTTLE_EXEMPT: must list addresses or networks"),
        ({"IDENTITY_PASSWORD_MIN_LENGTH": "4"}, "IDENTITY_PASSWORD_MIN_LENGTH: input should be greater"),
        ({"IDENTITY_ARGON2_MEMORY_KIB": "8", "IDENTITY_ARGON2_PARALLELISM": "4"}, "IDENTITY_ARGON2_MEMORY_KIB must be"),
        (
            {"IDENTITY_ARGON2_MEMORY_KIB": "2097152"},
            "IDENTITY_ARGON2_MEMORY_KIB: input should be less than or equal to",
        ),
        (
            {"IDENTITY_ARGON2_MEMORY_KIB": "65536", "IDENTITY_ARGON2_TIME_COST": "17"},
            "IDENTITY_ARGON2_MEMORY_KIB times",
        ),
        ({"IDENTITY_ARGON2_TIME_COST": "17", "IDENTITY_ARGON2_PARALLELISM": "16"}, "IDENTITY_ARGON2_TIME_COST times"),
        (
            {"IDENTITY_REFRESH_RETRY_WINDOW": "-1"},
            "WINDOW: must be a number of seconds from 0 to 31536000.",
        ),
        ({"IDENTITY_ACCESS_LIFETIME": "0"}, "LIFETIME: must be a number of seconds from 1 to 86400."),
        ({"IDENTITY_REFRESH_LIFETIME": "0.5"}, "LIFETIME: must be a number of seconds from 1 to 315360000."),
        ({"IDENTITY_AUDIENCE": "'orders'"}, "IDENTITY_AUDIENCE: must be names separated by spaces"),
        (
            {"IDENTITY_ACCESS_LIFETIME": "86401"},
            "LIFETIME: must be a number of seconds from 1 to 86400.",
        ),
        ({"DATABASE_URL": "postgresql://a/x", "IDENTITY_DATABASE_URL": "postgresql://b/x"}, "are both set and differ"),
        ({"IDENTITY_ALLOWED_ORIGINS": "http://app.example"}, "IDENTITY_ALLOWED_ORIGINS: must list https origins"),
        ({"IDENTITY_ISSUER_URL": 'https://"x"'}, "IDENTITY_ISSUER_URL: must be scheme, host"),
        ({"IDENTITY_KEYS_PASSPHRASE": "  "}, "IDENTITY_KEYS_PASSPHRASE is set but empty"),
        ({"DATABASE_URL": "host=db user=x password=hunter2"}, "DATABASE_URL: must be postgresql://"),
        ({"DATABASE_URL": "postgresql://identity:hunter2/x@db/x"}, "DATABASE_URL: must be postgresql://"),
        ({"DATABASE_URL": "postgresql://identity:hunter2#x@db/x"}, "DATABASE_URL: must be postgresql://"),
        ({"DATABASE_URL": "mysql://identity:hunter2@db/x"}, "DATABASE_URL: must be postgresql://"),
        ({"IDENTITY_KEYS_PASSPHRASE_FILE": "/nowhere"}, "IDENTITY_KEYS_PASSPHRASE_FILE names a file that cannot be"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(environ, says):
    with pytest.raises(ConfigurationError) as refused:
        load(environ)
    assert says in refused.value.text
    assert "\n" not in refused.value.text
    assert "hunter2" not in refused.value.text


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://identity@/postgres?host=/run/postgresql",
        "postgres://identity:p%2Fw%23@db.internal:5432/identity?sslmode=require",
        "postgresql+asyncpg://identity@one:5432,two:5432/identity?target_session_attrs=primary",
        "postgresql://db",
        "postgresql://identity:secret@[::1]:5432/identity",
    ],
)
def test_every_usual_database_url_is_taken(url):
    settings = load({"DATABASE_URL": url}).settings
    assert settings.database_url is not None
    assert settings.database_url.get_secret_value() == url


def test_a_file_that_is_empty_is_refused(tmp_path):
    (tmp_path / "passphrase").write_text("\n")
    with pytest.raises(ConfigurationError, match="names a file that is empty"):
        load({"IDENTITY_KEYS_PASSPHRASE_FILE": str(tmp_path / "passphrase")})


def test_a_secret_is_never_in_the_message_about_it(tmp_path):
    (tmp_path / "one").write_text("hunter2")
    environ = {"IDENTITY_KEYS_PASSPHRASE": "correct horse", "IDENTITY_KEYS_PASSPHRASE_FILE": str(tmp_path / "one")}
    with pytest.raises(ConfigurationError) as refused:
        load(environ)
    assert "hunter2" not in str(refused.value)
    assert "correct horse" not in str(refused.value)


def test_any_setting_is_read_from_a_file_without_its_last_line_break(tmp_path):
    (tmp_path / "url").write_text("postgresql://service:secret@db/identity\n")
    loaded = load({"DATABASE_URL_FILE": str(tmp_path / "url")})
    assert loaded.settings.database_url is not None
    assert loaded.settings.database_url.get_secret_value() == "postgresql://service:secret@db/identity"
    assert loaded.origins["database_url"] == f"DATABASE_URL_FILE ({tmp_path / 'url'})"
    assert "secret" not in repr(loaded)


def test_an_empty_variable_counts_as_absent():
    assert load({"DATABASE_URL": "", "IDENTITY_WORKERS": " "}).settings == load({}).settings


@pytest.mark.parametrize("bind", ["9464", "127.0.0.1", ":9464", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x"])
def test_an_address_for_metrics_has_a_host_and_a_port(bind):
    with pytest.raises(ConfigurationError, match="IDENTITY_METRICS_BIND: must be HOST:PORT"):
        load({"IDENTITY_METRICS_BIND": bind})


def test_metrics_are_off_by_default_and_never_on_the_main_address():
    assert load({}).settings.metrics_bind == ""
    assert load({"IDENTITY_METRICS_BIND": "[::1]:9464"}).settings.metrics_address == ("::1", 9464)
    with pytest.raises(ConfigurationError, match="must be another address than IDENTITY_BIND"):
        load({"IDENTITY_METRICS_BIND": "127.0.0.1:8000"})


def test_an_unknown_variable_is_a_warning_with_the_nearest_name():
    (warning,) = load({"IDENTITY_ACESS_LIFETIME": "60", "OTHER": "x"}).warnings
    assert warning == (
        "IDENTITY_ACESS_LIFETIME is not a setting of this service and is ignored. "
        "The nearest is IDENTITY_ACCESS_LIFETIME."
    )


def test_the_nearest_name_is_told_however_far_it_is():
    (warning,) = load({"IDENTITY_DB_URL": "1"}).warnings
    assert warning == (
        "IDENTITY_DB_URL is not a setting of this service and is ignored. The nearest is IDENTITY_DATABASE_URL."
    )


def test_an_audience_counts_once():
    assert load({"IDENTITY_AUDIENCE": "orders todos orders"}).settings.audience == ("orders", "todos")


def test_lists_take_spaces_and_commas():
    assert load({"IDENTITY_AUDIENCE": "orders, billing  api"}).settings.audience == ("orders", "billing", "api")


def test_networks_take_single_addresses_and_both_spellings_of_ipv4():
    given = "192.0.2.7, fd00::/8 ::ffff:10.0.0.0/104"
    networks = load({"IDENTITY_TRUSTED_PROXIES": given}).settings.trusted_proxies
    assert [str(network) for network in networks] == ["192.0.2.7/32", "fd00::/8", "10.0.0.0/8"]


def test_settings_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Settings().workers = 2


@pytest.mark.parametrize("issuer", ["http://127.0.0.1:8000", "http://[::1]:8000", "http://id.localhost"])
def test_plain_http_is_for_this_machine(issuer):
    assert load({"IDENTITY_ISSUER_URL": issuer}).settings.issuer_url == issuer


def test_an_issuer_that_is_not_ascii_is_refused():
    with pytest.raises(ConfigurationError):
        load({"IDENTITY_ISSUER_URL": "https://é.example"})


@pytest.mark.parametrize("name", ["IDENTITY_REFRESH_LIFETIME", "IDENTITY_SESSION_LIFETIME"])
def test_a_short_lifetime_alone_makes_the_retry_window_shorter(name):
    assert load({name: "10"}).settings.refresh_retry_window == timedelta(seconds=5)
    with pytest.raises(ConfigurationError, match="RETRY_WINDOW must be shorter"):
        load({name: "10", "IDENTITY_REFRESH_RETRY_WINDOW": "30"})


def test_words_of_a_choice_are_taken_in_any_case():
    settings = load({"IDENTITY_LOG_LEVEL": "INFO", "IDENTITY_SIGNUP": "Closed", "IDENTITY_DOCS": "OFF"}).settings
    assert (settings.log_level, settings.signup, settings.docs) == ("info", "closed", "off")


def test_a_list_may_be_a_json_array():
    assert load({"IDENTITY_AUDIENCE": '["api", "orders"]'}).settings.audience == ("api", "orders")
    for wrong in ("[api]", '[""]', '["two words"]', '["api", 1]', '{"a": 1}', '["api"'):
        with pytest.raises(ConfigurationError, match="IDENTITY_AUDIENCE"):
            load({"IDENTITY_AUDIENCE": wrong})
