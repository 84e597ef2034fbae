"""Commands that speak to registries: push, login, logout."""

from __future__ import annotations

import os

from dolium.cli import credentials
from dolium.cli.context import Context
from dolium.cli.flags import Command, Flag, UsageError
from dolium.cli.images import ALL_PLATFORMS, Bars
from dolium.cli.transport import Client, query, quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

PUSH = Command("push", "NAME[:TAG|@DIGEST]", "Send an image to the registry in its name.", [
    Flag("-a --all-tags", "bool", "all tags of the repository"), Flag("-q --quiet", "bool", "no progress"), ALL_PLATFORMS],
    minimum=1, maximum=1, examples=["dolium tag debian:12 127.0.0.1:5000/debian:12", "dolium push 127.0.0.1:5000/debian:12"])
LOGIN = Command("login", "[SERVER]", "Keep the credentials of a registry, once it has accepted them.", [
    Flag("-u --username", "str", "the user", "NAME"), Flag("-p --password", "str", "the password", "WORD"),
    Flag("--password-stdin", "bool", "read the password from standard input")], maximum=1,
    examples=["dolium login -u me --password-stdin registry.example.com < password"])
LOGOUT = Command("logout", "[SERVER]", "Forget the credentials of a registry.", [], maximum=1)


def push(client: Client, context: Context, words: list[str]) -> int:
    """``dolium push``."""
    options, names = PUSH.parse(words)
    if options.get("help"):
        context.stdout.write(PUSH.usage())
        return 0
    context.own_process()
    name, at, digest = names[0].partition("@")
    last = name.rpartition("/")[2]
    tag = last.partition(":")[2]
    repository = name[: len(name) - len(last)] + last.partition(":")[0]
    if options["all_tags"] and (tag or at):
        raise UsageError("tag can't be used with --all-tags/-a")
    wanted = digest or tag or ("" if options["all_tags"] else "latest")
    target = f"/images/{quote(repository)}/push{query(tag=wanted, allPlatforms=options['all_platforms'])}"
    response = client.open("POST", target, headers=credentials.header(context, repository))
    file: Any = context.stdout
    bars = Bars(file, os.isatty(context.stdout_fd))
    for row in response.lines():
        if "error" in row or not options["quiet"]:
            bars.show(row)
    if options["quiet"]:
        context.say(names[0])
    return 0


def login(client: Client, context: Context, words: list[str]) -> int:
    """``dolium login``."""
    options, servers = LOGIN.parse(words)
    if options.get("help"):
        context.stdout.write(LOGIN.usage())
        return 0
    context.own_process()
    server = servers[0] if servers else credentials.HUB
    key = credentials.key_of(server)
    if options["password"] and options["password_stdin"]:
        raise UsageError("--password and --password-stdin are mutually exclusive")
    user, password = options["username"], options["password"]
    if options["password_stdin"]:
        if not user:
            raise UsageError("must provide --username with --password-stdin")
        with open(context.stdin_fd, "rb", closefd=False) as stream:
            password = stream.read().decode().rstrip("\r\n")
    if not user or not password:
        known = credentials.find(context, key) if not user and not password else {}
        if known:
            return _accepted(client, context, key, known, keep=False)
        user, password = _ask(context, user, password)
    return _accepted(client, context, key, {"username": user, "password": password}, keep=True)


def _ask(context: Context, user: str | None, password: str | None) -> tuple[str, str]:
    if not context.is_terminal(context.stdin_fd):
        raise UsageError("cannot ask for a name and a password without a terminal: give --username and --password-stdin")
    import getpass

    if not user:
        context.stderr.write("Username: ")
        context.stderr.flush()
        with open(context.stdin_fd, "r", closefd=False) as stream:
            user = stream.readline().strip()
    return user, password or getpass.getpass()


def _accepted(client: Client, context: Context, key: str, found: dict[str, str], *, keep: bool) -> int:
    answer = client.call("POST", "/auth", {**found, "serveraddress": key})
    if keep:
        place = credentials.keep(context, key, found["username"], found["password"], answer.get("IdentityToken") or "")
        if "helper" not in place:
            context.complain(f"the password is stored unencrypted in {place}; a credential helper keeps it safer")
    context.say(answer["Status"])
    return 0


def logout(client: Client, context: Context, words: list[str]) -> int:
    """``dolium logout``."""
    options, servers = LOGOUT.parse(words)
    if options.get("help"):
        context.stdout.write(LOGOUT.usage())
        return 0
    context.own_process()
    key = credentials.key_of(servers[0] if servers else credentials.HUB)
    if credentials.drop(context, key):
        context.say(f"Removing login credentials for {key}")
    else:
        context.say(f"Not logged in to {key}")
    return 0
