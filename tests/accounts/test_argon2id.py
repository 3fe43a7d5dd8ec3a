"""Argon2id in memory that a thread keeps: the same as the library by itself, to the last bit."""

import mmap
import threading
from collections.abc import Callable
from typing import Any

import argon2
import pytest
from argon2.exceptions import HashingError
from argon2.low_level import Type, ffi, hash_secret
from hypothesis import given, settings
from hypothesis import strategies as st

from identity_service.accounts import argon2id
from identity_service.accounts.argon2id import Argon2Cost, Argon2id, keep_memory
from identity_service.accounts.hashing import PasswordHashing
from identity_service.errors import HashingOverloaded

CHEAP = Argon2Cost(64, 2, 1)
SALT = bytes(range(16))


def in_a_thread(work: Callable[[], Any]) -> Any:
    """Return what becomes of it in a thread of its own, which may keep memory without others having it."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work())
        except Exception as error:  # noqa: BLE001 - it is raised below
            outcome.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(outcome[0], Exception):
        raise outcome[0]
    return outcome[0]


def of_library(cost: Argon2Cost, password: str, salt: bytes = SALT) -> str:
    memory, passes, lanes = cost.memory_kib, cost.time_cost, cost.parallelism
    return hash_secret(password.encode(), salt, passes, memory, lanes, 32, Type.ID).decode()


def kept(cost: Argon2Cost, password: str) -> str:
    keep_memory(cost)
    return Argon2id(cost).hash(password, SALT)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("memory", [32, 33, 1024, 3000, 19456])
@pytest.mark.parametrize("passes", [1, 3])
def test_a_hash_is_the_librarys_with_memory_kept_and_without(memory, passes, lanes):
    cost = Argon2Cost(memory, passes, lanes)
    expected = of_library(cost, "correct horse battery staple")
    assert Argon2id(cost).hash("correct horse battery staple", SALT) == expected
    assert in_a_thread(lambda: kept(cost, "correct horse battery staple")) == expected


@settings(deadline=None, max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.binary(min_size=16, max_size=16))
def test_whatever_the_password_each_verifies_what_the_other_made(password, salt):
    hasher = Argon2id(CHEAP)
    ours, theirs = hasher.hash(password, salt), of_library(CHEAP, password, salt)
    assert ours == theirs
    assert argon2.PasswordHasher().verify(ours, password)
    assert hasher.has_made(theirs)
    assert hasher.verify(theirs, password)
    assert not hasher.verify(theirs, password + "x")


def test_what_was_hashed_before_in_the_same_memory_makes_no_difference():
    def many() -> list[str]:
        keep_memory(CHEAP)
        return [Argon2id(CHEAP).hash(password, SALT) for password in ("a", "b", "a", "", "a")]

    first, second, again, nothing, last = in_a_thread(many)
    assert first == again == last == of_library(CHEAP, "a")
    assert (second, nothing) == (of_library(CHEAP, "b"), of_library(CHEAP, ""))


def test_threads_at_the_same_time_do_not_share_their_memory():
    cost = Argon2Cost(4096, 3, 1)
    found: list[tuple[str, str]] = []
    together = threading.Barrier(4)

    def work(password: str) -> None:
        keep_memory(cost)
        together.wait()
        found.extend((password, Argon2id(cost).hash(password, SALT)) for _ in range(5))

    threads = [threading.Thread(target=work, args=(password,)) for password in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert set(found) == {(password, of_library(cost, password)) for password in "abcd"}


def test_the_memory_is_wiped_after_each_hash():
    """Nothing of a password is left in what the thread keeps."""

    def zeros() -> int:
        keep_memory(CHEAP)
        memory = argon2id._of_thread.memory._map
        memory[:] = b"x" * len(memory)
        Argon2id(CHEAP).hash("correct horse battery staple", SALT)
        return int(memory[:].count(0))

    assert in_a_thread(zeros) == CHEAP.memory_kib * 1024


def test_a_hash_for_which_the_memory_is_too_small_has_its_own():
    cost = Argon2Cost(128, 1, 1)

    def work() -> str:
        keep_memory(CHEAP)
        return Argon2id(cost).hash("a", SALT)

    assert in_a_thread(work) == of_library(cost, "a")


def test_a_library_that_asks_for_more_than_the_memory_gets_none():
    def work() -> int:
        keep_memory(CHEAP)
        return argon2id._hand_over(ffi.new("uint8_t **"), CHEAP.memory_kib * 1024 + 1)

    assert in_a_thread(work) == argon2id._FAILED


def test_what_the_library_refuses_is_an_error_and_no_hash():
    with pytest.raises(HashingError, match="emory"):
        Argon2id(Argon2Cost(4, 1, 1)).hash("a", SALT)


def test_where_no_function_can_be_made_for_c_it_does_without(monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(argon2id, "ffi", type("Refusing", (), {"callback": refuse}))
    assert argon2id._callback("int(uint8_t **, size_t)", lambda: None) is None
    monkeypatch.undo()
    monkeypatch.setattr(argon2id, "_lend", None)
    assert in_a_thread(lambda: kept(CHEAP, "a")) == of_library(CHEAP, "a")


def test_where_there_are_no_huge_pages_it_does_without(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert in_a_thread(lambda: kept(CHEAP, "a")) == of_library(CHEAP, "a")


OWN = of_library(CHEAP, "a")


@pytest.mark.parametrize(
    "other",
    [
        "",
        "!",
        OWN + "A",
        OWN[:-1],
        OWN + "\n",
        OWN[:-1] + "B",  # bits beyond the digest
        OWN.replace("argon2id", "argon2i"),
        OWN.replace("m=64", "m=640"),
        OWN.replace("v=19", "v=16"),
        OWN.replace("t=2", "t=1"),
        OWN.replace("p=1", "p=2"),
        hash_secret(b"a", bytes(8), 2, 64, 1, 32, Type.ID).decode(),
        hash_secret(b"a", bytes(16), 2, 64, 1, 16, Type.ID).decode(),
    ],
)
def test_what_is_not_exactly_of_this_kind_was_not_made_here(other):
    assert Argon2id(CHEAP).has_made(OWN)
    assert not Argon2id(CHEAP).has_made(other)


async def test_without_memory_to_keep_passwords_are_hashed_all_the_same(monkeypatch):
    """A thread that cannot begin would take the whole pool with it, until a restart."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    passwords = PasswordHashing(CHEAP, threads=1)
    made = await passwords.hash("a")
    assert (await passwords.verify(made, "a")).matched
    assert passwords.waiting == 0
    passwords.close()


@pytest.mark.parametrize("error", [HashingError("Memory allocation error"), MemoryError()])
async def test_a_hash_for_which_there_is_no_memory_is_asked_for_again_later(monkeypatch, error):
    """It says nothing about the password, and 503 rather than 500 to whoever asked."""
    passwords = PasswordHashing(CHEAP, threads=1)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Argon2id, "hash", fail)
    with pytest.raises(HashingOverloaded) as refused:
        await passwords.hash("a")
    assert refused.value.retry_after > 0
    assert passwords.waiting == 0
    passwords.close()


async def test_work_that_cannot_be_handed_over_is_asked_for_again_later():
    passwords = PasswordHashing(CHEAP, threads=1)
    passwords.close()
    with pytest.raises(HashingOverloaded):
        await passwords.hash("a")
    assert passwords.waiting == 0


async def test_a_hash_for_which_no_thread_can_be_started_is_asked_for_again_later(monkeypatch):
    def fail(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    passwords = PasswordHashing(CHEAP, threads=1)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(HashingOverloaded):
            await passwords.hash("a")
    assert passwords.waiting == 0
    assert (await passwords.verify(await passwords.hash("a"), "a")).matched
    passwords.close()
