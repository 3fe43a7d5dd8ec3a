"""Roles: what they may be called and give, who has them, and what a change does to sessions that live."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from identity_service.accounts import User, registration, roles
from identity_service.database import Connection
from identity_service.errors import (
    IdentityError,
    RoleBuiltIn,
    RoleInUse,
    RoleNotFound,
    RoleRejected,
    RoleTaken,
    UserNotFound,
)
from tests.conftest import START, TESTER, Api, until_somebody_waits


async def create(api: Api, name: str = "clerk", scope: str = "orders:read orders:write") -> None:
    await api.database.transact(lambda db: roles.create(db, name, scope=scope, by=TESTER, now=START))


async def change(
    api: Api, rule: Callable[..., Awaitable[User]], username: str, role: str, *, end_sessions: bool = False
) -> User:
    async def unit(db: Connection) -> User:
        user = await registration.find_named(db, username)
        return await rule(db, user.id, role, end_sessions=end_sessions, by=TESTER, now=api.clock())

    return await api.database.transact(unit)


@pytest.mark.parametrize("name", ["", "Clerk", "1st", "two words", "a,b", "x" * 65, "naïve", "a\n", "\udcff", "a\0"])
async def test_a_role_with_an_impossible_name_is_refused_and_never_found(api, name):
    async with api.database.connection() as db:
        with pytest.raises(RoleRejected):
            await roles.create(db, name, scope="", by=TESTER, now=START)
        for refused in (
            roles.find(db, name),
            roles.set_scopes(db, name, scope="", by=TESTER, now=START),
            roles.delete(db, name, by=TESTER, now=START),
        ):
            with pytest.raises(RoleNotFound):
                await refused
        with pytest.raises(RoleNotFound):
            await roles.keep(db, [name])


@pytest.mark.parametrize(
    "scope",
    [" ", "a  b", "a b ", 'say "please"', "naïve", "a\tb", "x" * 129, " ".join(f"s{n}" for n in range(65))],
)
async def test_a_role_cannot_give_what_is_no_scope(api, scope):
    await create(api)
    async with api.database.connection() as db:
        with pytest.raises(RoleRejected, match="at most 64 scopes"):
            await roles.create(db, "other", scope=scope, by=TESTER, now=START)
        with pytest.raises(RoleRejected, match="at most 64 scopes"):
            await roles.set_scopes(db, "clerk", scope=scope, by=TESTER, now=START)
        assert (await roles.find(db, "clerk")).scopes == ("orders:read", "orders:write")


async def test_scopes_between_commas_are_not_taken_for_one(api):
    """It would be a scope that no service ever asks for."""
    async with api.database.connection() as db:
        with pytest.raises(RoleRejected, match="not by commas"):
            await roles.create(db, "clerk", scope="orders:read,orders:write", by=TESTER, now=START)


@pytest.mark.parametrize("scope", ["identity:admin", "orders:read identity:anything", "identity:"])
async def test_no_other_role_can_give_what_belongs_to_this_service(api, scope):
    """Whoever may make roles must not become an administrator by it."""
    await create(api)
    async with api.database.connection() as db:
        with pytest.raises(RoleRejected, match="belong to this service"):
            await roles.create(db, "other", scope=scope, by=TESTER, now=START)
        with pytest.raises(RoleRejected, match="belong to this service"):
            await roles.set_scopes(db, "clerk", scope=scope, by=TESTER, now=START)


async def test_the_built_in_role_cannot_be_created_changed_or_deleted(api):
    async with api.database.connection() as db:
        for refused in (
            roles.create(db, "admin", scope="", by=TESTER, now=START),
            roles.set_scopes(db, "admin", scope="", by=TESTER, now=START),
            roles.delete(db, "admin", by=TESTER, now=START),
        ):
            with pytest.raises(RoleBuiltIn):
                await refused
        admin = await roles.find(db, "admin")
        assert (admin.scopes, admin.created_at) == (("identity:admin",), None)
        assert await roles.list_all(db) == [admin]


async def test_the_built_in_role_gives_its_scope_whatever_the_table_says(api, alice):
    await api.scalar("INSERT INTO roles VALUES ('admin', '{}', now()) RETURNING name")
    await change(api, roles.grant, "alice", "admin")
    assert (await alice.log_in(scope="identity:admin"))["scope"] == "identity:admin"


async def test_of_sixteen_who_make_the_same_role_one_does(api):
    made = await asyncio.gather(*(create(api, scope=f"s{n}") for n in range(16)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in made) == ["NoneType", *["RoleTaken"] * 15]
    with pytest.raises(RoleTaken):
        await create(api)


async def test_granting_twice_and_revoking_what_is_not_held_change_nothing(api, alice):
    await create(api)
    await create(api, "driver")
    for _ in range(2):
        assert (await change(api, roles.grant, "alice", "clerk")).roles == ("clerk",)
    assert (await change(api, roles.revoke, "alice", "driver")).roles == ("clerk",)
    for _ in range(2):
        assert (await change(api, roles.revoke, "alice", "clerk")).roles == ()
    recorded = "SELECT count(*) FROM audit_events WHERE event = 'user.roles_changed'"
    assert await api.scalar(recorded) == 2, "what changes nothing is not recorded"


@pytest.mark.parametrize("rule", [roles.grant, roles.revoke])
async def test_a_misspelt_role_or_user_is_not_found(api, alice, rule):
    """A misspelt role must not look like one that was taken away."""
    await create(api)
    with pytest.raises(RoleNotFound) as missing:
        await change(api, rule, "alice", "clerck")
    assert missing.value.detail == "clerck"
    with pytest.raises(UserNotFound):
        await change(api, rule, "alicia", "clerk")


@pytest.mark.parametrize("name", ["Old Clerk", "naïve", "gone"])
async def test_a_held_role_that_does_not_exist_or_has_an_impossible_name_can_be_taken_away(api, alice, name):
    """Users had roles before there was a table of them, and before names had a form."""
    await api.scalar("UPDATE users SET roles = ARRAY['admin', $1] RETURNING id", name)
    assert (await change(api, roles.revoke, "alice", name)).roles == ("admin",)
    with pytest.raises(RoleNotFound):
        await change(api, roles.revoke, "alice", name)


async def test_roles_granted_at_the_same_moment_are_all_there(api, alice):
    names = [f"role{n}" for n in range(16)]
    for name in names:
        await create(api, name)
    await asyncio.gather(*(change(api, roles.grant, "alice", name) for name in names))
    assert sorted(await api.scalar("SELECT roles FROM users")) == sorted(names)


async def test_a_role_that_users_have_is_not_deleted(api, alice, bob):
    await create(api)
    for username, says in (("alice", "1 user has this role."), ("bob", "2 users have this role.")):
        await change(api, roles.grant, username, "clerk")
        with pytest.raises(RoleInUse) as refused:
            await api.database.transact(lambda db: roles.delete(db, "clerk", by=TESTER, now=START))
        assert refused.value.text == says
    for username in ("alice", "bob"):
        await change(api, roles.revoke, username, "clerk")
    await api.database.transact(lambda db: roles.delete(db, "clerk", by=TESTER, now=START))
    assert await api.scalar("SELECT count(*) FROM roles") == 0


async def test_nobody_is_given_a_role_while_it_is_deleted(api, alice):
    """Whoever comes first wins: it is deleted and cannot be granted, or it is granted and cannot be deleted."""
    outcomes: set[type] = set()
    for attempt in range(400):
        if attempt >= 40 and outcomes == {RoleNotFound, RoleInUse}:
            break
        await create(api)
        granting = change(api, roles.grant, "alice", "clerk")
        deleting = api.database.transact(lambda db: roles.delete(db, "clerk", by=TESTER, now=START))
        both = [granting, deleting] if attempt % 2 else [deleting, granting]
        refused = [type(error) for error in await asyncio.gather(*both, return_exceptions=True)]
        outcomes |= {error for error in refused if issubclass(error, IdentityError)}
        exists = await api.scalar("SELECT count(*) FROM roles")
        assert await api.scalar("SELECT roles FROM users") == ["clerk"] * exists
        await api.scalar("UPDATE users SET roles = '{}' RETURNING id")
        await api.scalar("DELETE FROM roles RETURNING name")
    assert outcomes == {RoleNotFound, RoleInUse}


async def test_a_role_that_is_deleted_by_several_at_once_is_deleted_and_recorded_once(api):
    await create(api)
    deleting = [api.database.transact(lambda db: roles.delete(db, "clerk", by=TESTER, now=START)) for _ in range(8)]
    done = await asyncio.gather(*deleting, return_exceptions=True)
    assert [type(each) for each in done if each is not None] == [RoleNotFound] * 7
    assert await api.scalar("SELECT count(*) FROM audit_events WHERE event = 'role.deleted'") == 1


@pytest.mark.parametrize("rule", [roles.grant, roles.revoke])
async def test_ending_the_sessions_makes_a_change_take_effect_at_once(api, alice, bob, rule):
    await create(api)
    if rule is roles.revoke:
        await change(api, roles.grant, "alice", "clerk")
    ended, other = [await alice.log_in() for _ in range(2)], await bob.log_in()
    assert (await change(api, rule, "alice", "clerk", end_sessions=True)).username == "alice"
    for tokens in ended:
        assert (await api.me(tokens["access_token"])).status_code == 401
        assert (await api.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"
    assert await api.scalar("SELECT array_agg(DISTINCT reason) FROM revoked_tokens") == ["roles_changed"]
    assert (await api.refresh(other["refresh_token"])).status_code == 200


async def test_changing_a_role_logs_out_whoever_has_it_if_it_is_to_take_effect_at_once(api, alice, bob):
    await create(api)
    await change(api, roles.grant, "alice", "clerk")
    alices, bobs = await alice.log_in(), await bob.log_in()
    for end_sessions, status in ((False, 200), (True, 401)):
        await api.database.transact(
            lambda db, end=end_sessions: roles.set_scopes(
                db, "clerk", scope="", end_sessions=end, by=TESTER, now=api.clock()
            )
        )
        assert (await api.me(alices["access_token"])).status_code == status
        assert (await api.me(bobs["access_token"])).status_code == 200
    assert await api.scalar("SELECT array_agg(reason) FROM audit_events WHERE event = 'session.ended'") == [
        "roles_changed"
    ]


async def test_a_session_that_is_over_is_not_ended_again_with_those_of_a_role(api, alice):
    await create(api)
    await change(api, roles.grant, "alice", "clerk")
    over, _ = await alice.log_in(), await alice.log_in()
    await api.http.post("/revoke", data={"token": over["refresh_token"]})
    await api.database.transact(
        lambda db: roles.set_scopes(db, "clerk", scope="", end_sessions=True, by=TESTER, now=api.clock())
    )
    recorded = "SELECT array_agg(reason ORDER BY id) FROM audit_events WHERE event = 'session.ended'"
    assert await api.scalar(recorded) == ["revoked", "roles_changed"]


async def test_a_login_that_waits_meanwhile_gets_what_the_role_gives_afterwards(api, alice):
    """Its session is not there yet when the others are ended, and it began to look before the role was changed."""
    await create(api)
    await change(api, roles.grant, "alice", "clerk")
    async with api.database.connection() as other, other.transaction():
        await other.execute("UPDATE users SET email = 'alice@example.com' WHERE username = 'alice'")
        login = asyncio.create_task(alice.log_in())
        await until_somebody_waits(api)
        await api.database.transact(
            lambda db: roles.set_scopes(db, "clerk", scope="orders:read", end_sessions=True, by=TESTER, now=api.clock())
        )
    assert "orders:write" not in (await login)["scope"]


async def test_a_failed_change_of_roles_ends_no_session(api, alice):
    token = (await alice.log_in())["refresh_token"]
    with pytest.raises(RoleNotFound):
        await change(api, roles.grant, "alice", "clerk", end_sessions=True)
    assert (await api.refresh(token)).status_code == 200
